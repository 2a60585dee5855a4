// SPDX-License-Identifier: Apache-2.0
/*
 * A process that does a few things over and over and says how long one of each takes.
 *
 * Prints the port it listens on. For each line on stdin it measures everything once and prints one JSON object: the
 * median over BATCHES batches of the mean ns in a batch. Run it at real-time priority, on one CPU: what it measures are
 * hundreds of nanoseconds.
 */
#include <fcntl.h>
#include <linux/futex.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BATCHES 101
#define BATCH_NS 1000000.0

static int zero_fd, null_fd, listen_fd, client_fd, server_fd;
static struct sockaddr_in address = { .sin_family = AF_INET };

static void must(int good, const char *what)
{
	if (good)
		return;
	perror(what);
	exit(1);
}

static double now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1e9 + now.tv_nsec;
}

static void ask_parent(void)
{
	syscall(SYS_getppid);
}

static void read_zero(void)
{
	char byte;

	must(read(zero_fd, &byte, 1) == 1, "read");
}

static void write_null(void)
{
	must(write(null_fd, "x", 1) == 1, "write");
}

/* A byte there and back: two segments and their acknowledgements, four system calls. */
static void round_trip(void)
{
	char byte = 'x';

	must(send(client_fd, &byte, 1, 0) == 1, "send");
	must(recv(server_fd, &byte, 1, 0) == 1, "recv");
	must(send(server_fd, &byte, 1, 0) == 1, "send");
	must(recv(client_fd, &byte, 1, 0) == 1, "recv");
}

static void connect_both(int *client, int *server)
{
	int one = 1;

	*client = socket(AF_INET, SOCK_STREAM, 0);
	must(*client >= 0, "socket");
	must(!connect(*client, (struct sockaddr *)&address, sizeof(address)), "connect");
	*server = accept(listen_fd, NULL, NULL);
	must(*server >= 0, "accept");
	setsockopt(*client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	setsockopt(*server, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
}

/* From SYN to the end of both sides. A reset ends it: 28,000 ports in TIME_WAIT would end the benchmark. */
static void connection(void)
{
	struct linger at_once = { .l_onoff = 1 };
	int client, server;

	connect_both(&client, &server);
	setsockopt(client, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
	close(client);
	close(server);
}

static void child(void)
{
	pid_t pid = fork();

	if (!pid)
		_exit(0);
	must(pid > 0 && waitpid(pid, NULL, 0) == pid, "fork");
}

/* Whose turn it is: two processes on one CPU that wake each other and sleep. Nothing but the scheduler is on the way. */
static unsigned int *turn;

static void hand_over(unsigned int from, unsigned int to)
{
	__atomic_store_n(turn, to, __ATOMIC_RELEASE);
	syscall(SYS_futex, turn, FUTEX_WAKE, 1, NULL, NULL, 0);
	while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != from)
		syscall(SYS_futex, turn, FUTEX_WAIT, to, NULL, NULL, 0);
}

static void start_partner(void)
{
	struct sched_param first = { .sched_priority = 1 };

	turn = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	must(turn != MAP_FAILED, "mmap");
	if (fork())
		return;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	/* the one that it was started with went with the fork; without root it stays an ordinary one */
	sched_setscheduler(0, SCHED_FIFO, &first);
	close(listen_fd);
	for (;;) {
		while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != 1)
			syscall(SYS_futex, turn, FUTEX_WAIT, 0, NULL, NULL, 0);
		hand_over(1, 0);
	}
}

/* There and back: two sleeps, two wake-ups, two switches. */
static void two_switches(void)
{
	hand_over(0, 1);
}

static const struct {
	const char *name;
	void (*once)(void);
} acts[] = {
	{ "getppid", ask_parent },	  { "read", read_zero },
	{ "write", write_null },	  { "tcp_round_trip", round_trip },
	{ "tcp_connection", connection }, { "process", child },
	{ "two_switches", two_switches },
};

static int compare(const void *left, const void *right)
{
	double a = *(const double *)left, b = *(const double *)right;

	return (a > b) - (a < b);
}

static double measure(void (*once)(void))
{
	double batches[BATCHES], began = now_ns();
	long count = 0, turns;

	do {
		once();
		count++;
	} while (now_ns() - began < 10 * BATCH_NS);
	turns = count / 10 ? count / 10 : 1;
	for (int batch = 0; batch < BATCHES; batch++) {
		began = now_ns();
		for (long turn = 0; turn < turns; turn++)
			once();
		batches[batch] = (now_ns() - began) / turns;
	}
	qsort(batches, BATCHES, sizeof(batches[0]), compare);
	return batches[BATCHES / 2];
}

int main(void)
{
	socklen_t size = sizeof(address);
	char line[16];

	zero_fd = open("/dev/zero", O_RDONLY);
	null_fd = open("/dev/null", O_WRONLY);
	listen_fd = socket(AF_INET, SOCK_STREAM, 0);
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	must(!bind(listen_fd, (struct sockaddr *)&address, sizeof(address)), "bind");
	must(!listen(listen_fd, 16), "listen");
	must(!getsockname(listen_fd, (struct sockaddr *)&address, &size), "getsockname");
	start_partner();
	printf("http://127.0.0.1:%d\n", ntohs(address.sin_port));
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		/* anew each time: an agent that comes later follows it from its first byte */
		connect_both(&client_fd, &server_fd);
		for (unsigned int i = 0; i < sizeof(acts) / sizeof(acts[0]); i++)
			printf("%s\"%s\": %.1f", i ? ", " : "{", acts[i].name, measure(acts[i].once));
		printf("}\n");
		fflush(stdout);
		close(client_fd);
		close(server_fd);
	}
	return 0;
}
