// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * switches: how many context switches the kernel tells, to be held against those that it counts: `footlight check`.
 *
 * Measured: switches of the whole host, and for each thread how often it was switched in and out.
 *
 * How: there are kernels, of sandboxes, that call no tracepoint while one of certain threads runs on the CPU. A switch
 * away from such a thread is not told, one to it is: who comes and never goes is one of them. An interrupt that comes
 * meanwhile is not told either, so every probe of this host now and then misses a packet, a timer, or who ran next.
 *
 * Attached for some seconds only: every switch of every process of the host pays.
 */
#include "kernel.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* told switches, one number per CPU */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u64);
} told SEC(".maps");

struct thread_switches {
	u64 in;
	u64 out;
};

/* tid -> its switches; the idle threads, one per CPU with the same tid 0, are left out */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u32);
	__type(value, struct thread_switches);
} threads SEC(".maps");

static __always_inline void count_switch(u32 tid, bool in)
{
	struct thread_switches *switches, none = {};

	if (!tid)
		return;
	switches = bpf_map_lookup_elem(&threads, &tid);
	if (!switches) {
		bpf_map_update_elem(&threads, &tid, &none, BPF_NOEXIST);
		switches = bpf_map_lookup_elem(&threads, &tid);
	}
	if (switches)
		__sync_fetch_and_add(in ? &switches->in : &switches->out, 1);
}

SEC("tp_btf/sched_switch")
int BPF_PROG(switched, bool preempted, struct task_struct *from, struct task_struct *to)
{
	u32 zero = 0;
	u64 *count = bpf_map_lookup_elem(&told, &zero);

	if (count)
		*count += 1; /* the scheduler's interrupts are off: nothing comes between */
	count_switch(from->pid, false);
	count_switch(to->pid, true);
	return 0;
}
