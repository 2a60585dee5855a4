/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The reader in C, on libbpf's own ring buffer manager: a callback per record.
 *
 * Usage: consumer OBJECT TGID RING_BYTES. Says "ready" on stdout once attached, reads every 20 ms until stdin ends,
 * then says how many records came, what the programs counted, the CPU time since "ready", and the histogram.
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <bpf/bpf.h>
#include <bpf/libbpf.h>

#define BUCKETS 61
#define POLL_MS 20

struct bench_record {
	unsigned long long seen_ns, number, tgid_tid, cookie;
	unsigned int bucket, cpu;
};

static unsigned long long histogram[BUCKETS];

static int on_record(void *context, void *data, size_t size)
{
	const struct bench_record *record = data;

	(void)context;
	if (size != sizeof(*record) || record->bucket >= BUCKETS)
		return -EINVAL;
	histogram[record->bucket]++;
	return 0;
}

static double cpu_seconds(void)
{
	struct rusage usage;

	getrusage(RUSAGE_SELF, &usage);
	return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec + (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

static int fail(const char *what)
{
	perror(what);
	return 1;
}

int main(int argc, char **argv)
{
	struct pollfd input = { .fd = 0, .events = POLLIN };
	unsigned long long received = 0, counts[2];
	struct ring_buffer *reader;
	struct bpf_object *object;
	unsigned int key;
	double began;
	size_t size;
	char *tgid;

	if (argc != 4)
		return 2;
	object = bpf_object__open(argv[1]);
	if (!object)
		return fail("open");
	tgid = (char *)bpf_map__initial_value(bpf_object__find_map_by_name(object, ".rodata"), &size);
	/* tgid is the first global of the object, see producer.bpf.c */
	*(unsigned int *)tgid = atoi(argv[2]);
	bpf_map__set_max_entries(bpf_object__find_map_by_name(object, "ring"), atoi(argv[3]));
	bpf_map__set_autocreate(bpf_object__find_map_by_name(object, "perf"), false);
	if (bpf_object__load(object))
		return fail("load");
	reader = ring_buffer__new(bpf_object__find_map_fd_by_name(object, "ring"), on_record, NULL, NULL);
	if (!reader || !bpf_program__attach(bpf_object__find_program_by_name(object, "offer")))
		return fail("attach");
	puts("ready");
	fflush(stdout);
	began = cpu_seconds();
	while (!poll(&input, 1, POLL_MS))
		if (ring_buffer__consume(reader) < 0)
			return fail("consume");
	if (ring_buffer__consume(reader) < 0)
		return fail("consume");
	began = cpu_seconds() - began;
	for (key = 0; key < 2; key++)
		bpf_map_lookup_elem(bpf_object__find_map_fd_by_name(object, "counts"), &key, &counts[key]);
	for (key = 0; key < BUCKETS; key++)
		received += histogram[key];
	printf("{\"received\": %llu, \"offered\": %llu, \"lost\": %llu, \"cpu_seconds\": %.6f, "
	       "\"histogram\": [",
	       received, counts[0], counts[1], began);
	for (key = 0; key < BUCKETS; key++)
		printf("%s%llu", key ? ", " : "", histogram[key]);
	puts("]}");
	return 0;
}
