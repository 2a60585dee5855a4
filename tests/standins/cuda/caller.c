// SPDX-License-Identifier: Apache-2.0
/*
 * Calls a libcuda.so.1 as it is told. For each line on stdin, NAME [COUNT [ARGUMENT]], it does something COUNT times and
 * prints a line when it is done: the ns that one took on average, or what the order is about.
 *
 * open is the first order; a program that the library comes with from the start says so in LD_PRELOAD.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef int (*launch_fn)(void *, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int,
			 unsigned int, void *, void **, void **);
typedef int (*launch_ex_fn)(const void *, void *, void **, void **);
typedef int (*graph_fn)(void *, void *);
typedef int (*wait_fn)(void);
typedef int (*wait_for_fn)(void *);
typedef int (*copy_fn)(unsigned long long, unsigned long long, size_t);
typedef int (*copy_async_fn)(unsigned long long, unsigned long long, size_t, void *);
typedef int (*allocate_more_fn)(unsigned long long *, size_t, void *);
typedef int (*free_async_fn)(unsigned long long, void *);

#define KEPT 65536
#define COPIED 65536

static void *library;
static unsigned long long kept[KEPT];
static int kept_count;
static char from[COPIED], to[COPIED];
static sigjmp_buf way_out;

static void *symbol(const char *name)
{
	void *found = dlsym(library ? library : RTLD_DEFAULT, name);

	if (found)
		return found;
	fprintf(stderr, "no symbol %s\n", name);
	exit(2);
}

static void launch(const char *name, long argument)
{
	static launch_fn function;

	if (!function)
		function = symbol("cuLaunchKernel");
	function(NULL, 1, 1, 1, 32, 1, 1, 0, NULL, NULL, NULL);
}

static void launch_per_thread(const char *name, long argument)
{
	((launch_fn)symbol("cuLaunchKernel_ptsz"))(NULL, 1, 1, 1, 32, 1, 1, 0, NULL, NULL, NULL);
}

static void launch_ex(const char *name, long argument)
{
	((launch_ex_fn)symbol("cuLaunchKernelEx"))(NULL, NULL, NULL, NULL);
}

static void graph(const char *name, long argument)
{
	((graph_fn)symbol("cuGraphLaunch"))(NULL, NULL);
}

static void query(const char *name, long argument)
{
	static wait_fn function;

	if (!function)
		function = symbol("cuCtxSynchronize");
	function();
}

/* cuCtxSynchronize takes nothing; the others do not mind */
static void wait_named(const char *name, long argument)
{
	((wait_for_fn)symbol(name))(NULL);
}

static void copy(const char *name, long bytes)
{
	((copy_fn)symbol(name))((unsigned long long)to, (unsigned long long)from, bytes);
}

static void copy_async(const char *name, long bytes)
{
	((copy_async_fn)symbol(name))((unsigned long long)to, (unsigned long long)from, bytes, NULL);
}

static void allocate(const char *name, long bytes)
{
	unsigned long long address = 0;

	((allocate_more_fn)symbol(name))(&address, bytes, NULL);
	if (address && kept_count < KEPT)
		kept[kept_count++] = address;
}

static void release(const char *name, long argument)
{
	if (kept_count)
		((free_async_fn)symbol(name))(kept[--kept_count], NULL);
}

/* What fails is kept; ARGUMENT is the result. */
static void fail(const char *name, long result)
{
	((void (*)(int))symbol("standin_fail"))(result);
}

static void busy(const char *name, long us)
{
	((void (*)(long))symbol("standin_busy_us"))(us);
}

static void jump(void)
{
	siglongjmp(way_out, 1);
}

static void abandon(const char *name, long argument)
{
	void (*hook)(void (*)(void)) = symbol("standin_hook");

	hook(jump);
	if (!sigsetjmp(way_out, 0))
		query(name, 0);
	hook(NULL);
}

static void *many(void *count)
{
	for (long turn = 0; turn < *(long *)count; turn++) {
		launch(NULL, 0);
		copy_async("cuMemcpyHtoDAsync_v2", 3);
	}
	return NULL;
}

static void threads(const char *name, long count)
{
	pthread_t made[5];

	for (int index = 0; index < 5; index++)
		pthread_create(&made[index], NULL, many, &count);
	for (int index = 0; index < 5; index++)
		pthread_join(made[index], NULL);
}

static void ask_parent(const char *name, long argument)
{
	syscall(SYS_getppid);
}

static const struct {
	const char *order;
	void (*once)(const char *name, long argument);
	const char *name;
} orders[] = {
	{ "launch", launch, "" },
	{ "launch_per_thread", launch_per_thread, "" },
	{ "launch_ex", launch_ex, "" },
	{ "graph", graph, "" },
	{ "synchronize", query, "" },
	{ "context", wait_named, "cuCtxSynchronize" },
	{ "stream", wait_named, "cuStreamSynchronize" },
	{ "event", wait_named, "cuEventSynchronize" },
	{ "copy", copy, "cuMemcpy" },
	{ "copy_in", copy, "cuMemcpyHtoD_v2" },
	{ "copy_out", copy, "cuMemcpyDtoH_v2" },
	{ "copy_within", copy, "cuMemcpyDtoD_v2" },
	{ "copy_async", copy_async, "cuMemcpyAsync" },
	{ "copy_in_async", copy_async, "cuMemcpyHtoDAsync_v2" },
	{ "copy_out_async", copy_async, "cuMemcpyDtoHAsync_v2" },
	{ "copy_within_async", copy_async, "cuMemcpyDtoDAsync_v2" },
	{ "allocate", allocate, "cuMemAlloc_v2" },
	{ "allocate_managed", allocate, "cuMemAllocManaged" },
	{ "allocate_async", allocate, "cuMemAllocAsync" },
	{ "free", release, "cuMemFree_v2" },
	{ "free_async", release, "cuMemFreeAsync" },
	{ "fail", fail, "" },
	{ "busy", busy, "" },
	{ "abandon", abandon, "" },
	{ "threads", threads, "" },
	{ "getppid", ask_parent, "" },
};

static double now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1e9 + now.tv_nsec;
}

static void repeat(const char *order, long count, long argument)
{
	double began = now_ns();

	for (size_t index = 0; index < sizeof(orders) / sizeof(*orders); index++) {
		if (strcmp(orders[index].order, order))
			continue;
		for (long turn = 0; turn < count; turn++)
			orders[index].once(orders[index].name, argument);
		printf("%.1f\n", (now_ns() - began) / count);
		return;
	}
	printf("unknown order %s\n", order);
}

/* A line, byte by byte: a forked child goes on where its parent was. */
static int read_line(char *line, size_t size)
{
	size_t length = 0;

	while (length < size - 1 && read(0, line + length, 1) == 1 && line[length] != '\n')
		length++;
	line[length] = 0;
	return length > 0;
}

int main(int argc, char **argv)
{
	char line[4096], order[64], path[3900];
	long count, argument;

	printf("%d\n", getpid());
	fflush(stdout);
	while (read_line(line, sizeof(line))) {
		count = 1;
		argument = 0;
		if (sscanf(line, "open %3899s", path) == 1) {
			library = dlopen(path, RTLD_NOW);
			printf("%s\n", library ? "opened" : dlerror());
		} else if (!strcmp(line, "fork")) {
			/* the child does what follows; its end is the end of that */
			pid_t child = fork();

			if (child) {
				waitpid(child, NULL, 0);
				printf("reaped\n");
			} else {
				printf("%d\n", getpid());
			}
		} else if (!strcmp(line, "exit")) {
			_exit(0);
		} else if (!strcmp(line, "exec")) {
			execv(argv[0], argv);
		} else if (sscanf(line, "%63s %ld %ld", order, &count, &argument) >= 1) {
			repeat(order, count, argument);
		}
		fflush(stdout);
	}
	return 0;
}
