// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * syscalls: how long each system call of a watched service takes. Opt-in: every call of every process of the host pays.
 *
 * Measured: from the entry of a call to its return, asleep or not, by service and number of the call. A call that a signal
 * interrupts and that the kernel begins again counts twice.
 *
 * How: an entry for each thread of a service keeps the call that it is in; it stays from the thread's first call to its
 * end, so that a call costs no insertion. Any other process costs a look-up in an array that the JIT inlines.
 *
 * Not measured: calls that do not return (exit, a successful rt_sigreturn does); the call that a thread was in when it
 * began to be followed; calls of 32-bit programs, whose numbers mean other calls (on x86; elsewhere they are taken for
 * 64-bit ones); what the vDSO answers without a call.
 */
#include "service_stats.bpf.h"
#include "targets.bpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct call {
	u64 start_ns; /* 0: in none */
	u32 service;
	u32 number;
};

/* pid_tgid -> the call that the thread is in; deleted when the thread ends */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u64);
	__type(value, struct call);
} syscalls SEC(".maps");

struct syscall_key {
	u32 service;
	u32 number;
};

struct syscall_latency {
	struct histogram latency;
};

/* what was called -> how long it took, of all CPUs: added to atomically */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct syscall_key);
	__type(value, struct syscall_latency);
} syscall_stats SEC(".maps");

#ifdef __TARGET_ARCH_x86
#define USER32_CODE_SEGMENT 0x23

/* The kernel's registers of the program that calls; <asm/ptrace.h> has a structure of this name with other members. */
struct pt_regs___code_segment {
	u16 cs;
} __attribute__((preserve_access_index));

static __always_inline bool is_32_bit(const struct pt_regs *registers)
{
	return ((const struct pt_regs___code_segment *)registers)->cs == USER32_CODE_SEGMENT;
}
#else
static __always_inline bool is_32_bit(const struct pt_regs *registers)
{
	return false;
}
#endif

SEC("tp_btf/sys_enter")
int BPF_PROG(entered, struct pt_regs *registers, long number)
{
	u64 who = bpf_get_current_pid_tgid();
	u32 *service = service_of_process(who >> 32);
	struct call *call, fresh = {};

	if (!service || is_32_bit(registers))
		return 0;
	call = bpf_map_lookup_elem(&syscalls, &who);
	if (!call) {
		fresh.number = number;
		fresh.service = *service;
		fresh.start_ns = bpf_ktime_get_ns();
		if (bpf_map_update_elem(&syscalls, &who, &fresh, BPF_ANY))
			count(CNT_SYSCALLS_FULL);
		return 0;
	}
	call->number = number;
	call->service = *service;
	call->start_ns = bpf_ktime_get_ns();
	return 0;
}

SEC("tp_btf/sys_exit")
int BPF_PROG(returned, struct pt_regs *registers, long result)
{
	u64 who = bpf_get_current_pid_tgid(), now, start;
	struct syscall_latency *latency;
	static const struct syscall_latency none = {};
	struct syscall_key key;
	struct call *call;

	if (!service_of_process(who >> 32))
		return 0;
	call = bpf_map_lookup_elem(&syscalls, &who);
	if (!call || !call->start_ns)
		return 0; /* a new thread, which comes out of a call that its parent made */
	now = bpf_ktime_get_ns();
	start = call->start_ns;
	key.service = call->service;
	key.number = call->number;
	call->start_ns = 0;
	count(CNT_SEEN_SYSCALLS);
	if (now < start) {
		count(CNT_CLOCK_BACKWARDS);
		return 0;
	}
	latency = bpf_map_lookup_elem(&syscall_stats, &key);
	if (!latency) {
		bpf_map_update_elem(&syscall_stats, &key, &none, BPF_NOEXIST); /* another CPU may be faster */
		latency = bpf_map_lookup_elem(&syscall_stats, &key);
	}
	if (!latency) {
		count(CNT_SYSCALLS_FULL);
		return 0;
	}
	observe_atomic(&latency->latency, now - start);
	return 0;
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(thread_ended, struct task_struct *task)
{
	u64 who = (u64)task->tgid << 32 | (u32)task->pid;

	bpf_map_delete_elem(&syscalls, &who);
	return 0;
}

/* A thread that executes a program takes its process's number, and its own one goes without an end. */
SEC("tp_btf/sched_process_exec")
int BPF_PROG(program_executed, struct task_struct *task, int old_tid)
{
	u64 who = (u64)task->tgid << 32 | (u32)old_tid;

	if (old_tid != task->pid)
		bpf_map_delete_elem(&syscalls, &who);
	return 0;
}
