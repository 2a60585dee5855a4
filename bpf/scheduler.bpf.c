// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * scheduler: when the threads of a service ran, what they did when they did not, and who let them go on.
 *
 * Measured: every stretch for which a thread of a target process was not on a CPU, with what it slept on, when and by
 * whom it was woken, and how long it waited for a CPU then; the messages on sockets that lead from one thread to the
 * next; and, added up per service, the time on CPUs, asleep by reason, in run queues and out of CPU quota.
 *
 * How: sched_switch tells that a thread leaves its CPU; what it waits for is read from its system call's registers.
 * sched_waking runs in the context of the waker, sched_switch then tells that the thread runs again and makes the record.
 * A wake-up by a socket is nested in sk_data_ready, which leaves a note on its CPU of which socket that was. Every leave is
 * checked against the kernel's own count of the thread's switches: one that was not seen (there are kernels that do not trace
 * all) makes the next interval an INTERVAL_FIRST, and what was before it is not guessed.
 *
 * Not measured: threads of 32-bit programs have wrong reasons (other system call numbers). A thread that runs for ever
 * adds to on_cpu_ns only when it leaves its CPU, which a competitor makes it do every few milliseconds. Time from the end
 * of the quota's period to running is part of the quota's time where the group has a competitor. Before Linux 6.18 a
 * thread that already stood in a run queue when its group ran out of quota counts as waiting for a CPU. A sender over TCP
 * is known when the kernel delivers the bytes within its own call: not when they waited for the receiver's window or came
 * by ksoftirqd. On kernels with PREEMPT_RT interrupts are threads, and wakers are what they look like: tasks.
 *
 * A wait for a GPU is a sleep in ioctl, read or another call on one of its device files, deep ones included but those
 * that the kernel counts as I/O; and one in poll or ppoll that waits for nothing but at least one of them and eventfds, at
 * most POLLED_MAX descriptors in all, and that the GPU's driver ended: not the timeout, and no thread of a service. Each
 * sleep is one wait: a call may have several. Not seen: epoll and select on a device; page faults in memory that the GPU
 * holds; and the thread that asks the GPU in a loop, which is CUDA's default: it runs.
 *
 * Before Linux 6.3, which has neither sk_data_ready nor sock_send_length and sock_recv_length, user space loads the programs
 * of the last section in place of data_ready, sent and received. They know TCP alone: who wakes another thread over a Unix
 * socket is then WAKER_TASK, and neither such sockets nor UDP have messages. Needs bpf_task_pt_regs (5.15) to say what a
 * thread slept on, and there who sent; before, it is WAIT_OTHER, and no send is seen.
 */
#include "service_stats.bpf.h"
#include "sockets.bpf.h"
#include "targets.bpf.h"
#include <asm/unistd.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define TASK_INTERRUPTIBLE 1
#define TASK_UNINTERRUPTIBLE 2
#define TASK_STOPPED_TRACED_FROZEN (0x4 | 0x8 | 0x8000)
#define JOBCTL_STANDS_STILL (1UL << 23 | 1UL << 26 | 1UL << 27) /* frozen by its cgroup, stopped, traced */
#define PF_EXITING 4
#define ANON_INODE_FS_MAGIC 0x09041934
#define SOFTIRQ_SERVED 0x100 /* not merely switched off, which is 0x200 */
#define HARDIRQ_OR_NMI 0xff0000

/*
 * x86: from this CPU's `runqueues` to its `__preempt_count`, or to `pcpu_hot` (Linux 6.2 to 6.14), in bytes; 0: not known,
 * and then no waker is named. User space takes it from the kernel's BTF. A __ksym would need CONFIG_KALLSYMS_ALL, without
 * which the load fails.
 */
const volatile s64 preempt_count_distance = 0;

/* A waking by another CPU is seen before the leave that it ends, when the two race; not by more than this. */
#define RACE_NS 100000
/*
 * A wake-up that comes with bytes is nested in sk_data_ready and follows within a microsecond or two. Beyond this it is
 * something else that the same interrupt did, such as making room in another socket's buffer.
 */
#define NESTED_NS 20000
/* The same from tcp_probe on, which comes before TCP's own work: 7 to 13 us when nothing of it is in the caches. */
#define NESTED_IN_TCP_NS 50000

struct scheduler_stats {
	struct histogram
		run_queue_wait; /* from the wake-up, or from being taken off, to running; less throttled time */
	u64 on_cpu_ns; /* up to the last time that a thread left its CPU */
	u64 off_cpu_ns[WAIT_MAX]; /* asleep, by reason */
	u64 cpu_quota_ns;
	u64 migrations;
	u64 switches;
	struct histogram gpu_wait; /* asleep, of intervals with INTERVAL_GPU; a part of off_cpu_ns */
};

/* one element for each CPU and service; see service_stats.bpf.h */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct scheduler_stats);
} stats SEC(".maps");

struct thread_state {
	struct thread_interval interval; /* as far as it is known. off_ns is 0 while the thread runs */
	u64 running_ns; /* it got its CPU; 0: not seen */
	u64 switches; /* the kernel's count when it was last seen */
	u8 waking_flags; /* of the interval; apart from `flags`, because another CPU writes them meanwhile */
	u8 named; /* its name was told */
	u8 pad[6];
	u32 gpu_poll_us; /* of a poll on GPUs: its timeout, FOR_EVER: none; 0: it is no such poll */
	u32 revision; /* of the targets, when its service was looked up */
};

/*
 * tid -> what the thread is in. Not an LRU: a thread may sleep for hours. An entry goes when the thread exits. The waker's
 * CPU and the thread's own write different members; what is read at switch-in was ordered by the run queue's lock.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u32);
	__type(value, struct thread_state);
} threads SEC(".maps");

/* Device number (major << 20 | minor) of a GPU's device file -> 1. User space keeps it. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, u32);
	__type(value, u8);
} gpu_devices SEC(".maps");

/* How many of them there are: where there is none, the hash need not be asked, nor a poll looked into. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u32);
} gpu_devices_cnt SEC(".maps");

enum context {
	CONTEXT_TASK,
	CONTEXT_SOFTIRQ,
	CONTEXT_HARDIRQ,
	CONTEXT_UNKNOWN,
};

/* The socket whose readers this CPU is waking. */
struct note {
	u64 sk; /* 0: none */
	u64 until_ns; /* a wake-up after this is something else's */
	u64 who; /* pid_tgid of the task that runs, or was interrupted */
	enum context context;
	u32 sent; /* 1: that task sent the bytes */
};

/* one per CPU: an interrupt may replace a task's note, which is then no longer found */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct note);
} notes SEC(".maps");

#define CLIENT_TCP 1
#define CLIENT_UDP 2

/* Bytes by number, in one value: a look-up of an array's only element is inlined. */
struct byte_table {
	u8 at[65536];
};

/*
 * CLIENT_* for the local ports of connections that services opened themselves, whatever the network namespace. A port that
 * is set and should not be costs records of messages that nobody needs, no more.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct byte_table);
} client_ports SEC(".maps");

/*
 * struct sock * -> its local port, 0 until it has one: to clear client_ports at TCP_CLOSE, when the port has been given
 * back. LRU: what is evicted leaves a port set, see there.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, u64);
	__type(value, u32);
} clients SEC(".maps");

/*
 * 1 where the last send on a socket of that hash found no room. Two sockets with one hash cost a record that nobody needs.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct byte_table);
} stalled SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} intervals_ring SEC(".maps"), messages_ring SEC(".maps"), names_ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(u32));
} intervals_perf SEC(".maps"), messages_perf SEC(".maps"), names_perf SEC(".maps");

/* User space takes its numpy types from BTF, which holds only the types that a variable or a map has. */
struct thread_interval interval_type SEC(".rodata.types");
struct message message_type SEC(".rodata.types");
struct thread_name name_type SEC(".rodata.types");
enum wait_reason reason_type SEC(".rodata.types");
enum waker waker_type SEC(".rodata.types");
enum message_kind message_kind_type SEC(".rodata.types");

/* Messages have no sequence of their own thread, so that each says how many were lost before it. */
u32 messages_lost;

/* ---- system calls ---- */

/* What is known of a call by its number. */
enum call {
	CALL_OTHER,
	CALL_FUTEX, /* (address, operation, value, timeout) */
	CALL_FUTEXES, /* (waiters, count, flags, timeout) */
	CALL_EPOLL, /* (descriptor, events, size, milliseconds) */
	CALL_EPOLL2, /* (descriptor, events, size, timeout) */
	CALL_POLL, /* (descriptors, count, milliseconds) */
	CALL_PPOLL, /* (descriptors, count, timeout) */
	CALL_SELECT, /* (count, read, write, except, timeout) */
	CALL_TIMER,
	CALL_DESCRIPTOR, /* (descriptor, ...), which may be anything */
	CALL_DEVICE, /* the same, mostly a device: ioctl */
	CALL_FILE, /* works on a file or a path, and sleeps for nothing but the disk */
	CALL_MASK = 0x1f,
	CALL_SENDS = 0x80, /* may send on the socket of its first argument */
};

static const u8 calls[512] = {
	[__NR_futex] = CALL_FUTEX,
	[449] = CALL_FUTEXES, /* futex_waitv; numbers from 424 on are the same on every architecture */
	[455] = CALL_FUTEX, /* futex_wait */
#ifdef __NR_epoll_wait
	[__NR_epoll_wait] = CALL_EPOLL,
#endif
	[__NR_epoll_pwait] = CALL_EPOLL,
	[441] = CALL_EPOLL2, /* epoll_pwait2 */
#ifdef __NR_poll
	[__NR_poll] = CALL_POLL,
#endif
	[__NR_ppoll] = CALL_PPOLL,
#ifdef __NR_select
	[__NR_select] = CALL_SELECT,
#endif
	[__NR_pselect6] = CALL_SELECT,
	[__NR_nanosleep] = CALL_TIMER,
	[__NR_clock_nanosleep] = CALL_TIMER,
	[__NR_read] = CALL_DESCRIPTOR,
	[__NR_write] = CALL_DESCRIPTOR | CALL_SENDS,
	[__NR_readv] = CALL_DESCRIPTOR,
	[__NR_writev] = CALL_DESCRIPTOR | CALL_SENDS,
	[__NR_pread64] = CALL_DESCRIPTOR,
	[__NR_pwrite64] = CALL_DESCRIPTOR,
	[__NR_preadv] = CALL_DESCRIPTOR,
	[__NR_pwritev] = CALL_DESCRIPTOR,
	[__NR_preadv2] = CALL_DESCRIPTOR,
	[__NR_pwritev2] = CALL_DESCRIPTOR,
	[__NR_recvfrom] = CALL_DESCRIPTOR,
	[__NR_recvmsg] = CALL_DESCRIPTOR,
	[__NR_recvmmsg] = CALL_DESCRIPTOR,
	[__NR_sendto] = CALL_DESCRIPTOR | CALL_SENDS,
	[__NR_sendmsg] = CALL_DESCRIPTOR | CALL_SENDS,
	[__NR_sendmmsg] = CALL_DESCRIPTOR | CALL_SENDS,
	[__NR_sendfile] = CALL_DESCRIPTOR | CALL_SENDS,
	[__NR_accept] = CALL_DESCRIPTOR,
	[__NR_accept4] = CALL_DESCRIPTOR,
	[__NR_connect] = CALL_DESCRIPTOR,
	[__NR_ioctl] = CALL_DEVICE,
	[__NR_fsync] = CALL_FILE,
	[__NR_fdatasync] = CALL_FILE,
	[__NR_sync_file_range] = CALL_FILE,
	[__NR_syncfs] = CALL_FILE,
	[__NR_fallocate] = CALL_FILE,
	[__NR_ftruncate] = CALL_FILE,
	[__NR_truncate] = CALL_FILE,
	[__NR_openat] = CALL_FILE,
	[437] = CALL_FILE, /* openat2 */
	[__NR_getdents64] = CALL_FILE,
	[__NR_statx] = CALL_FILE,
	[__NR_unlinkat] = CALL_FILE,
	[__NR_renameat2] = CALL_FILE,
	[__NR_mkdirat] = CALL_FILE,
	[__NR_close] = CALL_FILE,
	[__NR_readahead] = CALL_FILE,
	[__NR_execve] = CALL_FILE,
#ifdef __NR_open
	[__NR_open] = CALL_FILE,
#endif
#ifdef __NR_stat
	[__NR_stat] = CALL_FILE,
#endif
#ifdef __NR_unlink
	[__NR_unlink] = CALL_FILE,
#endif
#ifdef __NR_rename
	[__NR_rename] = CALL_FILE,
#endif
#ifdef __NR_mkdir
	[__NR_mkdir] = CALL_FILE,
#endif
};

/* The user's registers, as the kernel saved them. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct pt_regs___saved_x86 {
	unsigned long orig_ax, di, si, dx, r10, r8;
};

struct pt_regs___saved_arm64 {
	u64 regs[31];
	u64 orig_x0;
	s32 syscallno;
};

struct thread_info {
	u64 preempt_count; /* arm64 */
};

struct pcpu_hot {
	int preempt_count;
};

struct task_struct___arm64 {
	struct thread_info thread_info;
};
#pragma clang attribute pop

/* The system call that a task is in: its number or NO_SYSCALL, what is known of it, and those arguments that are used. */
struct syscall {
	u64 first;
	u64 second;
	u64 third;
	u64 fourth;
	u64 fifth;
	u32 number;
	u32 call;
};

static __always_inline struct syscall syscall_of(struct task_struct *task)
{
	struct syscall syscall = { .number = NO_SYSCALL };
	s64 number;

	/* since Linux 5.15, d6d6ccbe72ba; a call of a helper that is not there would not load */
	if (!bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_task_pt_regs))
		return syscall;
#if defined(__TARGET_ARCH_x86)
	struct pt_regs___saved_x86 *regs = (void *)bpf_task_pt_regs(task);

	number = regs->orig_ax; /* -1: an exception or an interrupt */
	syscall.first = regs->di;
	syscall.second = regs->si;
	syscall.third = regs->dx;
	syscall.fourth = regs->r10;
	syscall.fifth = regs->r8;
#elif defined(__TARGET_ARCH_arm64)
	struct pt_regs___saved_arm64 *regs = (void *)bpf_task_pt_regs(task);

	number = regs->syscallno;
	syscall.first = regs->orig_x0;
	syscall.second = regs->regs[1];
	syscall.third = regs->regs[2];
	syscall.fourth = regs->regs[3];
	syscall.fifth = regs->regs[4];
#else
#error "where does this architecture keep the number of the system call?"
#endif
	if (number >= 0 && number < NO_SYSCALL)
		syscall.number = number;
	if (number >= 0 && number < (s64)sizeof(calls))
		syscall.call = calls[number];
	return syscall;
}

/* ---- files and sockets ---- */

static __always_inline struct file *file_of(struct task_struct *task, u32 number)
{
	struct fdtable *table = BPF_CORE_READ(task, files, fdt);
	struct file **slot;
	struct file *file = NULL;

	if (number >= BPF_CORE_READ(table, max_fds))
		return NULL;
	slot = BPF_CORE_READ(table, fd);
	bpf_probe_read_kernel(&file, sizeof(file), slot + number);
	return file;
}

static __always_inline struct sock *socket_of_file(struct file *file)
{
	struct socket *socket;

	if (!file || (BPF_CORE_READ(file, f_inode, i_mode) & S_IFMT) != S_IFSOCK)
		return NULL;
	socket = BPF_CORE_READ(file, private_data);
	return BPF_CORE_READ(socket, sk);
}

static __always_inline u8 *byte_at(void *table, u32 index)
{
	u32 zero = 0;
	struct byte_table *bytes = bpf_map_lookup_elem(table, &zero);

	/* The compiler leaves out the mask of what is a u16 already; Linux 6.1 does not know that of a u16 in a socket. */
	asm volatile("" : "+r"(index));
	return bytes ? &bytes->at[index & 0xffff] : NULL;
}

static __always_inline bool is_service_port(u32 port)
{
	u8 *bit = bpf_map_lookup_elem(&port_bits, &port);

	return bit && *bit;
}

static __always_inline bool is_client_port(u32 port, u8 which)
{
	u8 *bits = byte_at(&client_ports, port);

	return bits && *bits & which;
}

/* A service opened this TCP connection; it `opens` it right now, or it is found out. */
static __always_inline void note_client(const struct sock *sk, bool opens)
{
	u32 port = BPF_CORE_READ(sk, __sk_common.skc_num);
	u8 *bits = byte_at(&client_ports, port);
	u64 key = (u64)sk;

	if (!bits || (!opens && *bits & CLIENT_TCP))
		return;
	*bits |= CLIENT_TCP;
	/* What fails leaves a port set, see client_ports. */
	bpf_map_update_elem(&clients, &key, &port, BPF_ANY);
}

/* ---- who does it ---- */

static __always_inline enum context context_now(void)
{
	u32 preempt_count = 0;
#if defined(__TARGET_ARCH_x86)
	s64 distance = preempt_count_distance;
	struct rq *rq;

	if (!distance || !bpf_core_field_exists(struct cfs_rq, rq))
		return CONTEXT_UNKNOWN;
	if (bpf_core_type_exists(struct pcpu_hot))
		distance += bpf_core_field_offset(struct pcpu_hot, preempt_count);
	/* Every task has a queue of its CPU, whatever its class. That it runs here makes the queue this CPU's. */
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_get_current_task_btf)) /* Linux 5.11 */
		rq = bpf_get_current_task_btf()->se.cfs_rq->rq;
	else
		rq = BPF_CORE_READ((struct task_struct *)bpf_get_current_task(), se.cfs_rq, rq);
	if (!rq || bpf_probe_read_kernel(&preempt_count, sizeof(preempt_count), (void *)rq + distance))
		return CONTEXT_UNKNOWN;
#elif defined(__TARGET_ARCH_arm64)
	struct task_struct___arm64 *task = (struct task_struct___arm64 *)bpf_get_current_task();

	preempt_count = BPF_CORE_READ(task, thread_info.preempt_count);
#endif
	if (preempt_count & HARDIRQ_OR_NMI)
		return CONTEXT_HARDIRQ;
	return preempt_count & SOFTIRQ_SERVED ? CONTEXT_SOFTIRQ : CONTEXT_TASK;
}

/* Not certain, see target_filter; for those who look into `threads` next. */
static __always_inline bool may_be_target(u32 tgid)
{
	u32 zero = 0;
	struct target_filter *filter = bpf_map_lookup_elem(&target_filter, &zero);

	return filter && filter->maybe[tgid % TARGET_BITS];
}

/* ---- leaving a CPU ---- */

/* What a call on a descriptor waits for, by what the descriptor is; WAIT_OTHER: it cannot be told. */
static __always_inline u32 reason_of_file(struct file *file, u64 *object)
{
	struct inode *inode = BPF_CORE_READ(file, f_inode);

	switch (BPF_CORE_READ(inode, i_mode) & S_IFMT) {
	case S_IFSOCK:
		*object = (u64)socket_of_file(file);
		return WAIT_SOCKET;
	case S_IFIFO:
		*object = (u64)inode; /* each end has a file of its own */
		return WAIT_PIPE;
	case S_IFCHR:
		*object = BPF_CORE_READ(inode, i_rdev);
		return WAIT_DEVICE;
	default:
		/* Since Linux 6.16 (cfd86ef7e8e7) the inode behind eventfd and the like says that it is a regular file. */
		if (BPF_CORE_READ(inode, i_sb, s_magic) == ANON_INODE_FS_MAGIC) {
			*object = (u64)file;
			return WAIT_PIPE;
		}
		return WAIT_DISK;
	}
}

/* ---- GPUs ---- */

#define POLLED_MAX 8
#define FOR_EVER 0xffffffff
/* A poll's timeout begins when it is called, which is before the thread leaves its CPU. */
#define POLL_EARLY_US 1000
#define NS_PER_US 1000
#define US_PER_MS 1000
#define US_PER_S 1000000

/* What user space hands to poll and ppoll: a stable ABI. */
struct user_pollfd {
	s32 fd;
	s16 events;
	s16 revents;
};

struct user_timespec {
	s64 seconds;
	s64 ns;
};

static __always_inline bool are_gpus_known(void)
{
	u32 zero = 0, *cnt = bpf_map_lookup_elem(&gpu_devices_cnt, &zero);

	return cnt && *cnt;
}

/* `object` as reason_of_file() gives it: an address is no device's number. */
static __always_inline bool is_gpu(u64 object)
{
	u32 device = object;

	return object && object == device && bpf_map_lookup_elem(&gpu_devices, &device);
}

/* Of what lies behind anonymous inodes it is the one that tells nothing of itself. */
static __always_inline bool is_eventfd(struct file *file)
{
	const char wanted[] = "[eventfd]";
	char name[sizeof(wanted)] = {};
	u32 index;

	if (BPF_CORE_READ(file, f_inode, i_sb, s_magic) != ANON_INODE_FS_MAGIC)
		return false;
	bpf_probe_read_kernel_str(name, sizeof(name), BPF_CORE_READ(file, f_path.dentry, d_name.name));
	for (index = 0; index < sizeof(wanted); index++)
		if (name[index] != wanted[index])
			return false;
	return true;
}

/* The device number of the first GPU that the running task polls; 0 when it polls none, or anything else as well. */
static __always_inline u32 polled_gpu(struct task_struct *task, u64 descriptors, u32 cnt)
{
	struct user_pollfd polled[POLLED_MAX] = {};
	u32 index, gpu = 0;
	struct file *file;
	u64 object;

	if (!cnt || cnt > POLLED_MAX)
		return 0;
	if (bpf_probe_read_user(polled, cnt * sizeof(*polled), (void *)descriptors)) {
		count(CNT_UNREADABLE);
		return 0;
	}
	for (index = 0; index < POLLED_MAX; index++) {
		if (index >= cnt)
			break;
		if (polled[index].fd < 0)
			continue; /* poll leaves it out, too */
		file = file_of(task, polled[index].fd);
		if (!file)
			return 0;
		if (reason_of_file(file, &object) == WAIT_DEVICE && is_gpu(object))
			gpu = gpu ? gpu : object;
		else if (!is_eventfd(file))
			return 0;
	}
	return gpu;
}

/* How long a poll or ppoll sleeps at the most, for gpu_poll_us; 0: it cannot be told. */
static __always_inline u32 poll_timeout_us(const struct syscall *syscall)
{
	struct user_timespec timeout;
	u64 us;

	if ((syscall->call & CALL_MASK) == CALL_POLL) {
		if ((s32)syscall->third < 0)
			return FOR_EVER;
		us = (u64)(u32)syscall->third * US_PER_MS;
	} else {
		if (!syscall->third)
			return FOR_EVER;
		if (bpf_probe_read_user(&timeout, sizeof(timeout), (void *)syscall->third)) {
			count(CNT_UNREADABLE);
			return 0;
		}
		us = timeout.seconds > FOR_EVER / US_PER_S ? FOR_EVER
							   : timeout.seconds * US_PER_S + (u64)timeout.ns / NS_PER_US;
	}
	return us < FOR_EVER ? us : FOR_EVER;
}

/* Says so when what was found out about a sleep is that it is one for a GPU. */
static __always_inline void explain_gpu(struct thread_state *thread, struct task_struct *task,
					const struct syscall *syscall)
{
	struct thread_interval *interval = &thread->interval;
	u32 call = syscall->call & CALL_MASK, gpu;

	if (interval->reason == WAIT_DEVICE) {
		if (!(interval->flags & INTERVAL_IOWAIT) && are_gpus_known() && is_gpu(interval->object))
			interval->flags |= INTERVAL_GPU;
	} else if (interval->reason == WAIT_POLL && (call == CALL_POLL || call == CALL_PPOLL) && are_gpus_known()) {
		gpu = polled_gpu(task, syscall->first, syscall->second);
		if (!gpu)
			return;
		thread->gpu_poll_us = poll_timeout_us(syscall);
		if (!thread->gpu_poll_us)
			return;
		interval->reason = WAIT_DEVICE;
		interval->object = gpu;
		interval->flags |= INTERVAL_GPU;
	}
}

/* Whether the poll on GPUs whose interval is over was ended by something else than the GPUs' driver. */
static __always_inline bool was_no_gpu(const struct thread_state *thread)
{
	const struct thread_interval *interval = &thread->interval;

	if (!interval->wake_ns || interval->flags & INTERVAL_WAKER_TARGET)
		return true;
	return interval->waker != WAKER_TASK && thread->gpu_poll_us != FOR_EVER &&
	       (interval->wake_ns - interval->off_ns) / NS_PER_US + POLL_EARLY_US >= thread->gpu_poll_us;
}

/* ---- what a thread sleeps on ---- */

/* Finds out what a thread that leaves its CPU sleeps on. */
static __always_inline void explain_sleep(struct thread_state *thread, struct task_struct *task, u32 task_state)
{
	struct thread_interval *interval = &thread->interval;
	struct syscall syscall = syscall_of(task);
	u32 reason = WAIT_OTHER, call = syscall.call & CALL_MASK;
	bool iowait = BPF_CORE_READ_BITFIELD(task, in_iowait), deep = task_state & TASK_UNINTERRUPTIBLE;
	bool timeout = false;
	u64 object = 0;
	struct file *file;

	if (iowait)
		interval->flags |= INTERVAL_IOWAIT;
	interval->syscall = syscall.number;
	if (task_state & TASK_STOPPED_TRACED_FROZEN || (!deep && task->jobctl & JOBCTL_STANDS_STILL)) {
		reason = WAIT_STOPPED;
	} else if (syscall.number == NO_SYSCALL) {
		if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_task_pt_regs))
			reason = WAIT_PAGE_FAULT;
	} else if (call == CALL_DESCRIPTOR || call == CALL_DEVICE) {
		file = file_of(task, syscall.first);
		if (file)
			reason = reason_of_file(file, &object);
		/* A deep sleep in a call on a socket or a pipe is about memory or a lock of the kernel's. */
		if (deep && reason != WAIT_DEVICE && reason != WAIT_DISK)
			reason = iowait ? WAIT_DISK : WAIT_OTHER;
		else if (call == CALL_DEVICE)
			reason = WAIT_DEVICE; /* a GPU's buffers and fences are descriptors without a device */
		if (reason == WAIT_DISK || reason == WAIT_OTHER)
			object = 0;
	} else if (deep) {
		reason = iowait || call == CALL_FILE ? WAIT_DISK : WAIT_OTHER;
	} else {
		switch (call) {
		case CALL_FUTEX:
			reason = WAIT_FUTEX;
			object = syscall.first;
			timeout = syscall.number == 455 ? syscall.fifth : syscall.fourth;
			break;
		case CALL_FUTEXES:
			reason = WAIT_FUTEX;
			timeout = syscall.fourth;
			break;
		case CALL_EPOLL:
			reason = WAIT_POLL;
			timeout = (s32)syscall.fourth > 0;
			break;
		case CALL_EPOLL2:
			reason = WAIT_POLL;
			timeout = syscall.fourth;
			break;
		case CALL_POLL:
			reason = WAIT_POLL;
			timeout = (s32)syscall.third > 0;
			break;
		case CALL_PPOLL:
			reason = WAIT_POLL;
			timeout = syscall.third;
			break;
		case CALL_SELECT:
			reason = WAIT_POLL;
			timeout = syscall.fifth;
			break;
		case CALL_TIMER:
			reason = WAIT_TIMER;
			break;
		}
	}
	if (timeout)
		interval->flags |= INTERVAL_TIMEOUT;
	interval->reason = reason;
	interval->object = object;
	explain_gpu(thread, task, &syscall);
}

static __always_inline u32 state_of(struct task_struct *task)
{
	/* Linux 5.14, 2f064a59a11f: renamed. To be dropped with 5.10. */
	if (bpf_core_field_exists(task->__state))
		return task->__state;
	return BPF_CORE_READ((struct task_struct___old *)task, state);
}

/* Its group has used up its quota, and this is why it leaves its CPU, or does not get one. */
static __always_inline bool is_throttled(struct task_struct *task)
{
	/* Since Linux 6.18 (e1fad12dcb66) single tasks are taken off, at their return to user space; before, whole queues. */
	if (bpf_core_field_exists(task->throttled))
		return task->throttled;
	if (bpf_core_field_exists(struct cfs_rq, throttle_count))
		return BPF_CORE_READ(task, se.cfs_rq, throttle_count) > 0;
	return false;
}

/* `revision` was read before the service was looked up: a change in between is found at the thread's next leave. */
static __always_inline struct thread_state *begin_thread(u32 tid, u32 service, u32 revision)
{
	struct thread_state fresh = { .interval.service = service, .revision = revision };

	if (bpf_map_update_elem(&threads, &tid, &fresh, BPF_ANY)) {
		count(CNT_THREADS_FULL);
		return NULL;
	}
	return bpf_map_lookup_elem(&threads, &tid);
}

/* `preempted`, or its state is still TASK_RUNNING: it could go on and is not let. */
static __always_inline void leave_cpu(struct task_struct *task, bool preempted, u64 now)
{
	u32 tid = task->pid, state = state_of(task), revision = revision_now(), *service;
	struct thread_state *thread = bpf_map_lookup_elem(&threads, &tid);
	u64 switches = task->nvcsw + task->nivcsw;
	struct thread_interval *interval;
	struct scheduler_stats *sums;

	if (!thread) {
		if (task->flags & PF_EXITING)
			return; /* its end was told, nothing of it is left to be seen */
		service = service_of_process(task->tgid);
		thread = service ? begin_thread(tid, *service, revision) : NULL;
		if (!thread)
			return;
	}
	interval = &thread->interval;
	if (thread->revision != revision) {
		thread->revision = revision;
		service = service_of_process(task->tgid);
		if (service)
			interval->service = *service;
	}
	interval->flags = 0;
	thread->gpu_poll_us = 0;
	if (!thread->running_ns || switches != thread->switches + 1)
		interval->flags = INTERVAL_FIRST;
	else if (now < thread->running_ns)
		count(CNT_CLOCK_BACKWARDS);
	else if ((sums = stats_of(&stats, interval->service)))
		sums->on_cpu_ns += now - thread->running_ns;
	thread->running_ns = 0;
	thread->switches = switches;
	interval->off_ns = now;
	interval->tid = tid;
	interval->tgid = task->tgid;
	interval->cpu = bpf_get_smp_processor_id();
	if (preempted || !state) {
		interval->reason = WAIT_CPU;
		interval->object = 0;
		interval->syscall = syscall_of(task).number;
		if (is_throttled(task))
			interval->flags |= INTERVAL_THROTTLED;
	} else {
		explain_sleep(thread, task, state);
	}
}

/* ---- getting one ---- */

static __always_inline void send_name(void *ctx, struct task_struct *task, const char *name, u64 now)
{
	struct thread_name record = { .at_ns = now, .tid = task->pid, .tgid = task->tgid };

	bpf_probe_read_kernel_str(record.comm, sizeof(record.comm), name);
	send_record(ctx, &names_ring, &names_perf, &record, sizeof(record), CNT_SEEN_NAMES, CNT_LOST_NAMES_RING_FULL);
}

/* Adds up what the interval says, now that it is whole. */
static __always_inline void add_interval(const struct thread_interval *interval, bool moved)
{
	struct scheduler_stats *sums = stats_of(&stats, interval->service);
	u64 runnable_ns = interval->wake_ns ? interval->wake_ns : interval->on_ns;

	if (!sums)
		return;
	sums->switches++;
	sums->migrations += moved;
	if (interval->reason == WAIT_CPU)
		runnable_ns = interval->off_ns;
	else if (interval->reason < WAIT_MAX)
		sums->off_cpu_ns[interval->reason] += runnable_ns - interval->off_ns;
	if (interval->flags & INTERVAL_GPU)
		observe(&sums->gpu_wait, runnable_ns - interval->off_ns);
	if (interval->flags & INTERVAL_THROTTLED)
		sums->cpu_quota_ns += interval->on_ns - runnable_ns;
	else if (interval->reason == WAIT_CPU || interval->wake_ns)
		observe(&sums->run_queue_wait, interval->on_ns - runnable_ns);
}

static __always_inline void enter_cpu(void *ctx, struct task_struct *task, u64 now)
{
	u32 tid = task->pid, cpu = bpf_get_smp_processor_id();
	struct thread_state *thread = bpf_map_lookup_elem(&threads, &tid);
	u64 switches = task->nvcsw + task->nivcsw;
	struct thread_interval *interval;
	bool moved;

	if (!thread)
		return; /* it went to sleep before it was watched: its next leave begins what is known of it */
	interval = &thread->interval;
	if (!interval->off_ns || switches != thread->switches) {
		/* It was not watched when it left: it was no target then, or the kernel left the program out. */
		thread->running_ns = 0;
		interval->off_ns = 0;
		interval->wake_ns = 0;
		return;
	}
	thread->running_ns = now;
	if (now < interval->off_ns) {
		count(CNT_CLOCK_BACKWARDS);
		now = interval->off_ns;
	}
	interval->on_ns = now;
	/* the waking raced with the leave, or is an old one, of a sleep that did not come about */
	if (interval->wake_ns && interval->wake_ns < interval->off_ns)
		interval->wake_ns = interval->off_ns - interval->wake_ns < RACE_NS ? interval->off_ns : 0;
	if (interval->wake_ns > now) {
		count(CNT_CLOCK_BACKWARDS);
		interval->wake_ns = now;
	}
	if (interval->reason == WAIT_CPU)
		interval->wake_ns = 0;
	if (interval->wake_ns) {
		interval->flags |= thread->waking_flags;
	} else if (!(interval->flags & INTERVAL_BORN)) {
		interval->waker = WAKER_NONE;
		interval->waker_tid = 0;
		interval->waker_tgid = 0;
		interval->ready_sk = 0;
	}
	if (thread->gpu_poll_us && was_no_gpu(thread)) {
		interval->reason = WAIT_POLL;
		interval->object = 0;
		interval->flags &= ~INTERVAL_GPU;
	}
	moved = interval->cpu != cpu;
	interval->cpu = cpu;
	interval->sequence++;
	add_interval(interval, moved);
	send_record(ctx, &intervals_ring, &intervals_perf, interval, sizeof(*interval), CNT_SEEN_INTERVALS,
		    CNT_LOST_INTERVALS_RING_FULL);
	interval->off_ns = 0;
	interval->wake_ns = 0;
	if (!thread->named) {
		thread->named = 1;
		send_name(ctx, task, task->comm, now);
	}
}

SEC("tp_btf/sched_switch")
int BPF_PROG(switched, bool preempted, struct task_struct *prev, struct task_struct *next)
{
	bool leaves = may_be_target(prev->tgid), enters = may_be_target(next->tgid);
	u64 now;

	if (!leaves && !enters)
		return 0;
	now = bpf_ktime_get_ns();
	if (leaves)
		leave_cpu(prev, preempted, now);
	if (enters)
		enter_cpu(ctx, next, now);
	return 0;
}

/* ---- being woken ---- */

SEC("tp_btf/sched_waking")
int BPF_PROG(waking, struct task_struct *task)
{
	u64 who = bpf_get_current_pid_tgid(), now, ready_sk = 0;
	u32 tid = task->pid, zero = 0, waker = WAKER_NONE;
	struct thread_state *thread;
	enum context context;
	struct note *note;
	u8 flags = 0;

	if (!may_be_target(task->tgid))
		return 0;
	thread = bpf_map_lookup_elem(&threads, &tid);
	if (!thread)
		return 0; /* not watched when it went to sleep; see enter_cpu() */
	now = bpf_ktime_get_ns();
	context = context_now();
	note = bpf_map_lookup_elem(&notes, &zero);
	if (note && note->sk && note->who == who && note->context == context && now < note->until_ns) {
		ready_sk = note->sk;
		waker = note->sent ? WAKER_MESSAGE : WAKER_NETWORK;
	}
	if (context == CONTEXT_HARDIRQ)
		waker = WAKER_HARDIRQ;
	else if (context == CONTEXT_SOFTIRQ && !ready_sk)
		waker = WAKER_SOFTIRQ;
	else if (context == CONTEXT_TASK && waker != WAKER_MESSAGE)
		waker = WAKER_TASK;
	if (waker != WAKER_TASK && waker != WAKER_MESSAGE)
		who = 0;
	else if (service_of_process(who >> 32))
		flags |= INTERVAL_WAKER_TARGET;
	if (!bpf_core_field_exists(task->throttled) && is_throttled(task))
		flags |= INTERVAL_THROTTLED;
	thread->waking_flags = flags;
	thread->interval.waker = waker;
	thread->interval.waker_tid = (u32)who;
	thread->interval.waker_tgid = who >> 32;
	thread->interval.ready_sk = ready_sk;
	thread->interval.wake_ns = now;
	return 0;
}

/* ---- birth, death, names ---- */

SEC("tp_btf/sched_wakeup_new")
int BPF_PROG(born, struct task_struct *task)
{
	u64 who = bpf_get_current_pid_tgid();
	u32 revision = revision_now(), *service = service_of_process(task->tgid);
	struct thread_interval *interval;
	struct thread_state *thread;

	if (!service)
		return 0;
	thread = begin_thread(task->pid, *service, revision);
	if (!thread)
		return 0;
	interval = &thread->interval;
	thread->switches = task->nvcsw + task->nivcsw;
	interval->off_ns = bpf_ktime_get_ns();
	interval->tid = task->pid;
	interval->tgid = task->tgid;
	interval->reason = WAIT_CPU;
	interval->syscall = NO_SYSCALL;
	interval->cpu = bpf_get_smp_processor_id();
	interval->waker = WAKER_PARENT;
	interval->waker_tid = (u32)who;
	interval->waker_tgid = who >> 32;
	interval->flags = INTERVAL_BORN;
	if (service_of_process(who >> 32))
		interval->flags |= INTERVAL_WAKER_TARGET;
	return 0;
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(exited, struct task_struct *task)
{
	u32 tid = task->pid;

	/* whether it is a target still or not: it may have been one */
	bpf_map_delete_elem(&threads, &tid);
	return 0;
}

/* A thread that is not its process's first takes over the first one's tid, and its own is nobody's. */
SEC("tp_btf/sched_process_exec")
int BPF_PROG(executed, struct task_struct *task, int old_tid)
{
	u32 tid = old_tid;

	if (tid != (u32)task->pid)
		bpf_map_delete_elem(&threads, &tid);
	return 0;
}

SEC("tp_btf/task_rename")
int BPF_PROG(renamed, struct task_struct *task, const char *name)
{
	if (service_of_process(task->tgid))
		send_name(ctx, task, name, bpf_ktime_get_ns());
	return 0;
}

/* ---- messages ---- */

/* A socket, as far as messages are concerned with it. */
struct end {
	u32 family;
	u32 protocol;
	u32 hash;
	u16 local_port;
	u16 peer_port;
};

/* Of a socket that the kernel handed over, which costs no call. */
static __always_inline struct end end_of(const struct sock *sk)
{
	struct end end = {
		.family = sk->__sk_common.skc_family,
		.protocol = sk->sk_protocol,
		.hash = sk->__sk_common.skc_hash,
		.local_port = sk->__sk_common.skc_num,
		.peer_port = bpf_ntohs(sk->__sk_common.skc_dport),
	};

	return end;
}

static __always_inline void send_message(void *ctx, enum message_kind kind, const struct sock *sk,
					 const struct end *end, u32 service, s32 result, bool full)
{
	u64 who = bpf_get_current_pid_tgid();
	struct message message = {
		.at_ns = bpf_ktime_get_ns(),
		.sk = (u64)sk,
		.tid = (u32)who,
		.tgid = who >> 32,
		.service = service,
		.result = result,
		.lost = messages_lost,
		.full = full,
		.kind = kind,
		.family = end->family,
	};

	if (message.family != AF_UNIX) {
		message.local_port = end->local_port;
		message.peer_port = end->peer_port;
	}
	if (message.family == AF_INET6)
		BPF_CORE_READ_INTO(&message.peer, sk, __sk_common.skc_v6_daddr);
	else if (message.family == AF_INET)
		BPF_CORE_READ_INTO((__be32 *)message.peer, sk, __sk_common.skc_daddr);
	if (!send_record(ctx, &messages_ring, &messages_perf, &message, sizeof(message), CNT_SEEN_MESSAGES,
			 CNT_LOST_MESSAGES_RING_FULL))
		__sync_fetch_and_add(&messages_lost, 1);
}

/* Whether `sender` is the other end of the TCP socket `sk`, on this host. */
static __always_inline bool are_ends(const struct sock *sender, const struct sock *sk)
{
	u64 mine[2], theirs[2];

	if (BPF_CORE_READ(sender, sk_protocol) != IPPROTO_TCP ||
	    BPF_CORE_READ(sender, __sk_common.skc_num) != bpf_ntohs(sk->__sk_common.skc_dport) ||
	    bpf_ntohs(BPF_CORE_READ(sender, __sk_common.skc_dport)) != sk->__sk_common.skc_num)
		return false;
	if (sk->__sk_common.skc_family == AF_INET6 && BPF_CORE_READ(sender, __sk_common.skc_family) == AF_INET6) {
		BPF_CORE_READ_INTO(&mine, sender, __sk_common.skc_v6_rcv_saddr);
		BPF_CORE_READ_INTO(&theirs, sk, __sk_common.skc_v6_daddr);
		if (mine[0] != theirs[0] || mine[1] != theirs[1])
			return false;
		BPF_CORE_READ_INTO(&mine, sender, __sk_common.skc_v6_daddr);
		BPF_CORE_READ_INTO(&theirs, sk, __sk_common.skc_v6_rcv_saddr);
		return mine[0] == theirs[0] && mine[1] == theirs[1];
	}
	/* One of them may be an IPv6 socket with an IPv4 connection: the IPv4 addresses are there too. */
	return BPF_CORE_READ(sender, __sk_common.skc_rcv_saddr) == sk->__sk_common.skc_daddr &&
	       BPF_CORE_READ(sender, __sk_common.skc_daddr) == sk->__sk_common.skc_rcv_saddr;
}

/* The TCP socket on which the running task sends to `sk` right now, NULL when it does not. */
static __always_inline struct sock *sender_to(const struct sock *sk)
{
	struct task_struct *task;
	struct syscall syscall;
	struct sock *sender;

	if (!bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_task_pt_regs))
		return NULL;
	task = bpf_get_current_task_btf();
	syscall = syscall_of(task);
	if (!(syscall.call & CALL_SENDS))
		return NULL;
	sender = socket_of_file(file_of(task, syscall.first));
	return sender && are_ends(sender, sk) ? sender : NULL;
}

/*
 * Bytes came for `sk`, and those who wait for it are woken next. Called for every socket of the host: what no service can
 * have to do with is left at once.
 */
static __always_inline int note_ready(void *ctx, const struct sock *sk, u64 nested_ns)
{
	struct end end = end_of(sk);
	u32 zero = 0, family = end.family, local, peer;
	struct note *note = bpf_map_lookup_elem(&notes, &zero);
	enum context context = CONTEXT_TASK;
	bool sent = true, waited = false;
	struct sock *sender;
	u32 *service;

	if (!note)
		return 0; /* cannot be: an array of one */
	note->sk = 0;
	service = service_of_task();
	if (family == AF_INET || family == AF_INET6) {
		local = end.local_port;
		peer = end.peer_port;
		sent = false;
		if (end.protocol == IPPROTO_TCP) {
			/*
			 * Who answers its clients does so from a service's port, and most do it from this host only in
			 * tests and behind a proxy. That is no message within the service.
			 */
			waited = is_client_port(local, CLIENT_TCP);
			if (service && (waited || !is_service_port(peer))) {
				sender = sender_to(sk);
				sent = sender;
				if (sender && !is_service_port(peer))
					note_client(sender, false);
			}
			waited = waited || is_service_port(local);
		} else {
			waited = is_client_port(local, CLIENT_UDP);
		}
		if (!sent && !waited)
			return 0;
		context = context_now();
	} else if (family != AF_UNIX) {
		return 0;
	}
	note->until_ns = bpf_ktime_get_ns() + nested_ns;
	note->who = bpf_get_current_pid_tgid();
	note->context = context;
	note->sent = sent;
	note->sk = (u64)sk;
	if (service && sent)
		send_message(ctx, MESSAGE_READY, sk, &end, *service, 0, false);
	return 0;
}

SEC("tp_btf/sk_data_ready")
int BPF_PROG(data_ready, const struct sock *sk)
{
	return note_ready(ctx, sk, NESTED_NS);
}

/* Whom this CPU wakes from now on it does not wake by the bytes that came last. */
static __always_inline void end_note(void)
{
	u32 zero = 0;
	struct note *note = bpf_map_lookup_elem(&notes, &zero);

	if (note)
		note->sk = 0;
}

/* A task of a service has sent over TCP. Whether it matters: to its clients it does where there is no room, or was none. */
static __always_inline bool is_send_told(const struct sock *sk, const struct end *end, bool full)
{
	u8 *bits;

	if (is_service_port(end->local_port)) {
		bits = byte_at(&stalled, end->hash);
		if (!bits || (!full && !*bits))
			return false;
		*bits = full;
	} else {
		note_client(sk, false);
	}
	return true;
}

SEC("tp_btf/sock_send_length")
int BPF_PROG(sent, struct sock *sk, int result)
{
	u32 *service = service_of_task();
	struct end end;
	bool full;
	u8 *bits;

	if (!service)
		return 0;
	end_note();
	end = end_of(sk);
	full = no_room(sk, result);
	if (end.family == AF_UNIX) {
		if (result == -EAGAIN)
			send_message(ctx, MESSAGE_SENT, sk, &end, *service, result, full);
		return 0;
	}
	if (end.family != AF_INET && end.family != AF_INET6)
		return 0;
	if (end.protocol == IPPROTO_TCP) {
		if (!is_send_told(sk, &end, full))
			return 0;
	} else {
		bits = byte_at(&client_ports, end.local_port);
		if (bits)
			*bits |= CLIENT_UDP;
	}
	send_message(ctx, MESSAGE_SENT, sk, &end, *service, result, full);
	return 0;
}

/* What a client from outside asks is the requests probe's. */
static __always_inline bool is_request(const struct end *end)
{
	return is_service_port(end->local_port) && !is_client_port(end->peer_port, CLIENT_TCP);
}

SEC("tp_btf/sock_recv_length")
int BPF_PROG(received, struct sock *sk, int result, int flags)
{
	struct end end;
	u32 *service;

	if (result <= 0 || flags & MSG_PEEK)
		return 0;
	service = service_of_task();
	if (!service)
		return 0;
	end = end_of(sk);
	if (end.family != AF_UNIX && end.family != AF_INET && end.family != AF_INET6)
		return 0;
	if (end.family != AF_UNIX && end.protocol == IPPROTO_TCP && is_request(&end))
		return 0;
	send_message(ctx, MESSAGE_RECEIVED, sk, &end, *service, result, false);
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(client_state, const struct sock *sk, int old_state, int new_state)
{
	u64 key = (u64)sk;
	u32 zero = 0, *port;
	u8 *bits;

	if (new_state == TCP_SYN_SENT) {
		/* by connect(), in task context; it gets its port after this. What is evicted or fails: see client_ports */
		if (service_of_task())
			bpf_map_update_elem(&clients, &key, &zero, BPF_ANY);
	} else if (old_state == TCP_SYN_SENT && new_state == TCP_ESTABLISHED) {
		if (bpf_map_lookup_elem(&clients, &key))
			note_client(sk, true);
	} else if (new_state == TCP_CLOSE) {
		port = bpf_map_lookup_elem(&clients, &key);
		if (!port)
			return 0;
		bits = byte_at(&client_ports, *port);
		if (bits)
			*bits &= ~CLIENT_TCP;
		bpf_map_delete_elem(&clients, &key);
	}
	return 0;
}

/* ---- messages before Linux 6.3; to be dropped with 6.1 ---- */

/*
 * For data_ready. TCP tells of a segment of an established connection before it looks at it, in the context in which it
 * wakes the readers a moment later.
 */
SEC("tp_btf/tcp_probe")
int BPF_PROG(segment_arrived, struct sock *sk, const struct sk_buff *skb)
{
	struct tcp_header header;

	if (bpf_probe_read_kernel(&header, sizeof(header), skb->data) || skb->len <= (header.doff_reserved >> 4) * 4) {
		end_note(); /* an acknowledgement, no data: it wakes those who wait for room */
		return 0;
	}
	return note_ready(ctx, sk, NESTED_IN_TCP_NS);
}

/*
 * For received. By TCP, for each buffer that a read has taken bytes of, so that a read may have several messages; and for one
 * that it only peeked at. How many bytes is not said: the result is 1.
 */
SEC("tp_btf/tcp_rcv_space_adjust")
int BPF_PROG(bytes_read, struct sock *sk)
{
	u32 *service = service_of_task();
	struct end end;

	if (!service)
		return 0;
	end = end_of(sk);
	if (!is_request(&end))
		send_message(ctx, MESSAGE_RECEIVED, sk, &end, *service, 1, false);
	return 0;
}

/* no_room() of a socket that was looked up, not handed over by the kernel. */
static __always_inline bool no_room_in(const struct sock *sk, int result)
{
	if (result == -EAGAIN)
		return true;
	return result > 0 && BPF_CORE_READ(sk, sk_wmem_queued) >= BPF_CORE_READ(sk, sk_sndbuf) &&
	       BPF_CORE_READ(sk, sk_socket, flags) & (1 << SOCK_NOSPACE) &&
	       BPF_CORE_READ(sk, sk_socket, file, f_flags) & O_NONBLOCK;
}

/* For sent. The return of a call that may have sent on the socket of its first argument. */
static __always_inline int call_returned(struct exit_context *ctx)
{
	u32 *service = service_of_task();
	struct end end = {};
	struct sock *sk;
	bool full;

	/* of what fails, only the lack of room matters */
	if (!service || (ctx->ret <= 0 && ctx->ret != -EAGAIN))
		return 0;
	if (!bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_task_pt_regs))
		return 0;
	end_note();
	sk = socket_of_file(file_of(bpf_get_current_task_btf(), syscall_of(bpf_get_current_task_btf()).first));
	if (!sk)
		return 0;
	end.family = BPF_CORE_READ(sk, __sk_common.skc_family);
	end.protocol = BPF_CORE_READ(sk, sk_protocol);
	if ((end.family != AF_INET && end.family != AF_INET6) || end.protocol != IPPROTO_TCP)
		return 0;
	end.hash = BPF_CORE_READ(sk, __sk_common.skc_hash);
	end.local_port = BPF_CORE_READ(sk, __sk_common.skc_num);
	end.peer_port = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport));
	full = no_room_in(sk, ctx->ret);
	if (is_send_told(sk, &end, full))
		send_message(ctx, MESSAGE_SENT, sk, &end, *service, ctx->ret, full);
	return 0;
}

SEC("tp/syscalls/sys_exit_write")
int returned_write(struct exit_context *ctx)
{
	return call_returned(ctx);
}

SEC("tp/syscalls/sys_exit_writev")
int returned_writev(struct exit_context *ctx)
{
	return call_returned(ctx);
}

SEC("tp/syscalls/sys_exit_sendto")
int returned_sendto(struct exit_context *ctx)
{
	return call_returned(ctx);
}

SEC("tp/syscalls/sys_exit_sendmsg")
int returned_sendmsg(struct exit_context *ctx)
{
	return call_returned(ctx);
}

SEC("tp/syscalls/sys_exit_sendmmsg")
int returned_sendmmsg(struct exit_context *ctx)
{
	return call_returned(ctx);
}

SEC("tp/syscalls/sys_exit_sendfile64")
int returned_sendfile64(struct exit_context *ctx)
{
	return call_returned(ctx);
}
