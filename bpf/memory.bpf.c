// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * memory: when threads of a service had to free memory themselves, and when the kernel killed one of its processes.
 *
 * Measured: direct reclaim, of the host (an allocation found too few free pages) and of the memory cgroup (the limit
 * was reached, or memory.high was passed), from begin to end, running or asleep; the pages it freed; processes that
 * the OOM killer chose, of the host or of a cgroup.
 *
 * How: begin and end fire in the thread that reclaims. One inside another is part of it. A victim is marked once for
 * each of its threads that hits the limit while it dies, so its process is remembered until it is gone.
 *
 * Not measured: what kswapd and other kernel threads reclaim; node reclaim (vm.zone_reclaim_mode); compaction; the
 * sleep that memory.high imposes on a thread on its way to user space, which has no tracepoint (the scheduler probe
 * sees that it sleeps; PSI counts it as memory where it is on); major faults, which /proc/PID/stat counts
 * (probes/processes.py).
 *
 * Without CONFIG_MEMCG the two tracepoints of memory cgroups do not exist, and there is nothing to miss.
 */
#include "service_stats.bpf.h"
#include "targets.bpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct memory_stats {
	struct histogram direct_reclaim;
	u64 reclaimed_pages;
	u64 oom_kills;
};

/* CPU * service_count + service -> what that CPU saw; see service_stats.bpf.h */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct memory_stats);
} stats SEC(".maps");

struct reclaim {
	u64 begin_ns;
	u32 service;
	u32 depth; /* how many begins have had no end */
};

/* tid -> the reclaim that the thread is in; the exit tracepoint deletes what a thread that died in it leaves */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, u32);
	__type(value, struct reclaim);
} reclaims SEC(".maps");

/* tgid -> 1 for a process that the OOM killer chose and that has not ended. LRU: a few hundred at once will not be. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, u32);
	__type(value, u8);
} victims SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 18);
} spans_ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(u32));
} spans_perf SEC(".maps");

/* User space takes its numpy type from BTF, which holds only the types that a variable or a map has. */
struct thread_span span_type SEC(".rodata.types");
enum span_kind span_kind_type SEC(".rodata.types");

/*
 * Before Linux 6.9 (72ba14deb40a) the only argument was the victim's tid. libbpf finds two types of functions compatible
 * when they take as many arguments. To go when 6.8 is no longer supported.
 */
typedef void (*btf_trace_mark_victim___old)(void *, int);

static __always_inline int begin(void)
{
	u64 who = bpf_get_current_pid_tgid();
	u32 tid = (u32)who, *service = service_of_process(who >> 32);
	struct reclaim fresh = {}, *outer;

	if (!service)
		return 0;
	outer = bpf_map_lookup_elem(&reclaims, &tid);
	if (outer) {
		outer->depth++;
		return 0;
	}
	fresh.begin_ns = bpf_ktime_get_ns();
	fresh.service = *service;
	fresh.depth = 1;
	if (bpf_map_update_elem(&reclaims, &tid, &fresh, BPF_ANY))
		count(CNT_SPANS_FULL);
	return 0;
}

static __always_inline int end(void *ctx, u64 reclaimed_pages)
{
	u64 who = bpf_get_current_pid_tgid();
	u32 tid = (u32)who;
	struct reclaim *reclaim;
	struct memory_stats *mine;
	struct thread_span span = {
		.kind = SPAN_RECLAIM,
		.tid = tid,
		.tgid = who >> 32,
	};

	reclaim = bpf_map_lookup_elem(&reclaims, &tid);
	if (!reclaim)
		return 0; /* no target's; or it began before it was watched, or was counted in CNT_SPANS_FULL */
	if (--reclaim->depth)
		return 0;
	span.begin_ns = reclaim->begin_ns;
	span.service = reclaim->service;
	bpf_map_delete_elem(&reclaims, &tid);
	span.end_ns = bpf_ktime_get_ns();
	if (span.end_ns < span.begin_ns) {
		count(CNT_CLOCK_BACKWARDS);
		return 0;
	}
	mine = stats_of(&stats, span.service);
	if (mine) {
		observe_atomic(&mine->direct_reclaim, span.end_ns - span.begin_ns);
		__sync_fetch_and_add(&mine->reclaimed_pages, reclaimed_pages);
	}
	send_record(ctx, &spans_ring, &spans_perf, &span, sizeof(span), CNT_SEEN_SPANS, CNT_LOST_SPANS_RING_FULL);
	return 0;
}

SEC("tp_btf/mm_vmscan_direct_reclaim_begin")
int direct_begin(void *ctx)
{
	return begin();
}

SEC("tp_btf/mm_vmscan_direct_reclaim_end")
int BPF_PROG(direct_end, unsigned long reclaimed_pages)
{
	return end(ctx, reclaimed_pages);
}

SEC("tp_btf/mm_vmscan_memcg_reclaim_begin")
int memcg_begin(void *ctx)
{
	return begin();
}

SEC("tp_btf/mm_vmscan_memcg_reclaim_end")
int BPF_PROG(memcg_end, unsigned long reclaimed_pages)
{
	return end(ctx, reclaimed_pages);
}

static __always_inline int count_victim(u32 tgid)
{
	u32 *service = service_of_process(tgid);
	struct memory_stats *mine;
	u8 one = 1;

	if (!service || bpf_map_update_elem(&victims, &tgid, &one, BPF_NOEXIST))
		return 0; /* not ours, or another thread of a process that was counted */
	mine = stats_of(&stats, *service);
	if (mine)
		__sync_fetch_and_add(&mine->oom_kills, 1);
	return 0;
}

SEC("tp_btf/mark_victim")
int victim_marked(u64 *ctx)
{
	if (bpf_core_type_exists(btf_trace_mark_victim___old))
		return count_victim(ctx[0]); /* no process when the leader is gone: then it is not counted */
	return count_victim(((struct task_struct *)ctx[0])->tgid);
}

SEC("tp_btf/sched_process_exit")
int task_exited(u64 *ctx)
{
	struct task_struct *task = (struct task_struct *)ctx[0];
	u32 tid = task->pid, tgid = task->tgid;

	bpf_map_delete_elem(&reclaims, &tid);
	if (!task->signal->live.counter)
		bpf_map_delete_elem(&victims, &tgid);
	return 0;
}
