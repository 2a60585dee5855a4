// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * cuda: what the threads of a service ask the CUDA driver, libcuda.so.1, to do. Opt-in: each call costs a breakpoint.
 *
 * Measured, by service: kernels and graphs launched; how long calls took that wait for the GPU, which are those that
 * synchronise (context, stream, event) and copies that are not asynchronous; copies and their bytes by direction;
 * allocations, frees, and the bytes that are allocated; calls that failed. Each wait is a record as well.
 *
 * How: uprobes at the entry of the functions, and at the return of all but the launches. User space attaches them to the
 * processes that map the library (probes/cuda.py), the cookie is an enum cuda_call. Everything above the driver goes
 * through it (the runtime, cuBLAS, Triton), so nothing else is looked at, and nothing counts twice. A launch is counted
 * when it is called, whatever comes of it: its return would cost as much again, up to 100,000 times a second. Copies,
 * allocations and frees count when they succeeded; a wait counts, and takes its time, even if its call failed.
 *
 * A function of the driver that calls another one is one call: the return address says so, it lies in the library. Where
 * the library is not known yet, the stack does: the outer call's frame is still on it.
 *
 * Uprobes may be preempted by others on the same CPU: every addition is atomic.
 *
 * Not measured: failed launches; copies of arrays, of two and three dimensions, between contexts, and batches of them;
 * memory that is mapped by hand (cuMemCreate), pitched, or allocated before the process was attached to, whose free is
 * counted as unknown; managed memory that moves by itself; waits of code on the GPU, and of the host in a loop of
 * cuStreamQuery or cuEventQuery. What is asynchronous is not known to have ended.
 *
 * Needs bpf_get_attach_cookie (Linux 5.15).
 */
#include <linux/ptrace.h>

#include "service_stats.bpf.h"
#include "targets.bpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* What a function is; the same as probes/cuda.py, a test holds the two together. */
enum cuda_call {
	CUDA_LAUNCH_KERNEL,
	CUDA_LAUNCH_GRAPH,
	CUDA_SYNC_CONTEXT,
	CUDA_SYNC_STREAM,
	CUDA_SYNC_EVENT,
	CUDA_COPY_UNKNOWN, /* the driver finds out from the addresses; this and the next three in the order of copies[] */
	CUDA_COPY_HOST_TO_DEVICE,
	CUDA_COPY_DEVICE_TO_HOST,
	CUDA_COPY_DEVICE_TO_DEVICE,
	CUDA_COPY_ASYNC_UNKNOWN,
	CUDA_COPY_ASYNC_HOST_TO_DEVICE,
	CUDA_COPY_ASYNC_DEVICE_TO_HOST,
	CUDA_COPY_ASYNC_DEVICE_TO_DEVICE,
	CUDA_ALLOCATE,
	CUDA_FREE,
};

#define LAUNCHES 2
#define DIRECTIONS 4
#define WAITS 4 /* context, stream, event, copy */

struct cuda_stats {
	u64 launches[LAUNCHES];
	u64 copies[DIRECTIONS];
	u64 copied_bytes[DIRECTIONS];
	u64 allocations;
	u64 frees;
	u64 allocated_bytes; /* of the allocations that are followed */
	u64 freed_bytes; /* of them, what was freed or went with its process */
	u64 wait_errors;
	u64 copy_errors;
	u64 allocation_errors;
	u64 free_errors;
	struct histogram waits[WAITS];
};

/* CPU * service_count + service -> what that CPU saw; see service_stats.bpf.h */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct cuda_stats);
} stats SEC(".maps");

struct cuda_function {
	u64 stack; /* at its entry */
	u64 begin_ns;
	u64 argument; /* a copy's and an allocation's bytes, the address that is freed */
	u64 pointer; /* where an allocation's address will be; the bytes that are freed, 0: not known */
	u32 service;
	enum cuda_call what;
};

/* pid_tgid -> the outermost function that the thread is in; the exit tracepoint deletes what dies in one */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u64);
	__type(value, struct cuda_function);
} cuda_functions SEC(".maps");

struct code {
	u64 start;
	u64 end;
};

/* tgid -> where libcuda's code is in it; user space keeps it */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u32);
	__type(value, struct code);
} libraries SEC(".maps");

struct owner {
	u64 since_ns; /* tells processes of one tgid apart */
	u64 bytes; /* that it has allocated and not freed */
	u32 service;
	u32 pad;
};

/* tgid -> a process that allocated; deleted when it ends or executes a program */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u32);
	__type(value, struct owner);
} owners SEC(".maps");

struct allocation_key {
	u64 address;
	u32 tgid;
	u32 pad;
};

struct allocation {
	u64 bytes;
	u64 since_ns; /* its owner's; another one is a process that is gone */
};

/* User space deletes what processes leave that are gone. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, struct allocation_key);
	__type(value, struct allocation);
} allocations SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 18);
} gpu_spans_ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(u32));
} gpu_spans_perf SEC(".maps");

/* User space takes its numpy type from BTF, which holds only the types that a variable or a map has. */
struct thread_span span_type SEC(".rodata.types");
enum span_kind span_kind_type SEC(".rodata.types");

#ifdef __TARGET_ARCH_arm64
#define PUSHED_BY_CALL 0
#else
#define PUSHED_BY_CALL 8 /* the return address, which is gone from the stack at the return */
#endif

enum caller {
	CALLER_UNKNOWN,
	CALLER_LIBRARY,
	CALLER_OTHER,
};

/* Who calls the function that has just been entered. */
static __always_inline enum caller caller_of(struct pt_regs *ctx, u32 tgid)
{
	struct code *library = bpf_map_lookup_elem(&libraries, &tgid);
	u64 address = 0;

	if (!library)
		return CALLER_UNKNOWN;
#ifdef __TARGET_ARCH_arm64
	address = PT_REGS_RET(ctx);
#else
	bpf_probe_read_user(&address, sizeof(address), (void *)PT_REGS_SP(ctx));
#endif
	return address >= library->start && address < library->end ? CALLER_LIBRARY : CALLER_OTHER;
}

SEC("uprobe")
int launched(struct pt_regs *ctx)
{
	u32 tgid = bpf_get_current_pid_tgid() >> 32, *service = service_of_process(tgid);
	u64 what = bpf_get_attach_cookie(ctx);
	struct cuda_stats *mine;

	if (!service || what >= LAUNCHES || caller_of(ctx, tgid) == CALLER_LIBRARY)
		return 0;
	mine = stats_of(&stats, *service);
	if (mine)
		__sync_fetch_and_add(&mine->launches[what], 1);
	return 0;
}

/* A process that another service has now takes along what it has allocated. */
static __always_inline void move_owner(struct owner *owner, u32 service)
{
	struct cuda_stats *old = stats_of(&stats, owner->service), *mine = stats_of(&stats, service);

	if (owner->service == service)
		return;
	owner->service = service;
	if (old)
		__sync_fetch_and_add(&old->freed_bytes, owner->bytes);
	if (mine)
		__sync_fetch_and_add(&mine->allocated_bytes, owner->bytes);
}

static __always_inline struct owner *owner_of(u32 tgid, u32 service)
{
	struct owner *owner = bpf_map_lookup_elem(&owners, &tgid), fresh = {};

	if (owner) {
		move_owner(owner, service);
		return owner;
	}
	fresh.since_ns = bpf_ktime_get_ns();
	fresh.service = service;
	bpf_map_update_elem(&owners, &tgid, &fresh, BPF_NOEXIST); /* another thread may be faster */
	return bpf_map_lookup_elem(&owners, &tgid);
}

/* Forgets an allocation; returns its bytes, 0 where none is known. */
static __always_inline u64 take_allocation(u32 tgid, u64 address)
{
	struct allocation_key key = { .address = address, .tgid = tgid };
	struct allocation *allocation = bpf_map_lookup_elem(&allocations, &key);
	struct owner *owner = bpf_map_lookup_elem(&owners, &tgid);
	u64 bytes;

	if (!allocation)
		return 0;
	bytes = owner && owner->since_ns == allocation->since_ns ? allocation->bytes : 0;
	/* A double free is an error of the program: of two threads that free the same, both take the bytes. */
	bpf_map_delete_elem(&allocations, &key);
	return bytes;
}

static __always_inline bool keep_allocation(u32 tgid, struct owner *owner, u64 address, u64 bytes)
{
	struct allocation_key key = { .address = address, .tgid = tgid };
	struct allocation fresh = { .bytes = bytes };

	if (owner)
		fresh.since_ns = owner->since_ns;
	if (owner && !bpf_map_update_elem(&allocations, &key, &fresh, BPF_ANY))
		return true;
	count(CNT_ALLOCATIONS_FULL);
	return false;
}

SEC("uprobe")
int entered(struct pt_regs *ctx)
{
	u64 who = bpf_get_current_pid_tgid(), what = bpf_get_attach_cookie(ctx);
	u32 *service = service_of_process(who >> 32);
	struct cuda_function *outer, function = {};
	enum caller caller;

	if (!service)
		return 0;
	function.stack = PT_REGS_SP(ctx);
	function.service = *service;
	function.what = what;
	outer = bpf_map_lookup_elem(&cuda_functions, &who);
	if (outer) {
		caller = caller_of(ctx, who >> 32);
		if (caller == CALLER_LIBRARY || (caller == CALLER_UNKNOWN && function.stack < outer->stack))
			return 0;
		count(CNT_CUDA_RETURNS_UNSEEN);
	}
	switch (what) {
	case CUDA_COPY_UNKNOWN ... CUDA_COPY_ASYNC_DEVICE_TO_DEVICE:
		function.argument = PT_REGS_PARM3(ctx);
		break;
	case CUDA_ALLOCATE:
		function.pointer = PT_REGS_PARM1(ctx);
		function.argument = PT_REGS_PARM2(ctx);
		break;
	case CUDA_FREE:
		/* Now: once it is freed, another thread may be given the same address before this one returns. */
		function.argument = PT_REGS_PARM1(ctx);
		function.pointer = take_allocation(who >> 32, function.argument);
		break;
	}
	function.begin_ns = bpf_ktime_get_ns();
	if (!bpf_map_update_elem(&cuda_functions, &who, &function, BPF_ANY))
		return 0;
	count(CNT_CUDA_CALLS_FULL);
	if (function.pointer && what == CUDA_FREE)
		keep_allocation(who >> 32, bpf_map_lookup_elem(&owners, &(u32){ who >> 32 }), function.argument,
				function.pointer);
	return 0;
}

static __always_inline void allocated(struct cuda_stats *mine, const struct cuda_function *function, u32 tgid,
				      s32 error)
{
	struct owner *owner;
	u64 address = 0, replaced;

	if (error) {
		__sync_fetch_and_add(&mine->allocation_errors, 1);
		return;
	}
	__sync_fetch_and_add(&mine->allocations, 1);
	if (bpf_probe_read_user(&address, sizeof(address), (void *)function->pointer)) {
		count(CNT_UNREADABLE);
		return;
	}
	owner = owner_of(tgid, function->service);
	replaced = take_allocation(tgid, address); /* whose free was not seen */
	if (replaced && owner) {
		__sync_fetch_and_sub(&owner->bytes, replaced);
		__sync_fetch_and_add(&mine->freed_bytes, replaced);
	}
	if (!keep_allocation(tgid, owner, address, function->argument) || !owner)
		return;
	__sync_fetch_and_add(&owner->bytes, function->argument);
	__sync_fetch_and_add(&mine->allocated_bytes, function->argument);
}

static __always_inline void freed(struct cuda_stats *mine, const struct cuda_function *function, u32 tgid, s32 error)
{
	struct owner *owner = bpf_map_lookup_elem(&owners, &tgid);

	if (error) {
		__sync_fetch_and_add(&mine->free_errors, 1);
		if (function->pointer)
			keep_allocation(tgid, owner, function->argument, function->pointer);
		return;
	}
	__sync_fetch_and_add(&mine->frees, 1);
	if (function->pointer && owner) {
		move_owner(owner, function->service);
		__sync_fetch_and_sub(&owner->bytes, function->pointer);
		__sync_fetch_and_add(&mine->freed_bytes, function->pointer);
	} else if (function->argument) {
		count(CNT_UNKNOWN_FREES); /* to free nothing is no free of anything */
	}
}

static __always_inline void waited(void *ctx, struct cuda_stats *mine, const struct cuda_function *function, u64 who,
				   u32 wait)
{
	struct thread_span span = {
		.begin_ns = function->begin_ns,
		.tid = (u32)who,
		.tgid = who >> 32,
		.service = function->service,
		.kind = SPAN_GPU_SYNC,
	};

	span.end_ns = bpf_ktime_get_ns();
	if (span.end_ns < span.begin_ns) {
		count(CNT_CLOCK_BACKWARDS);
		return;
	}
	if (wait < WAITS)
		observe_atomic(&mine->waits[wait], span.end_ns - span.begin_ns);
	send_record(ctx, &gpu_spans_ring, &gpu_spans_perf, &span, sizeof(span), CNT_SEEN_GPU_SYNCS,
		    CNT_LOST_GPU_SYNCS_RING_FULL);
}

SEC("uretprobe")
int returned(struct pt_regs *ctx)
{
	u64 who = bpf_get_current_pid_tgid(), stack = PT_REGS_SP(ctx) - PUSHED_BY_CALL;
	struct cuda_function *found = bpf_map_lookup_elem(&cuda_functions, &who), function;
	s32 error = PT_REGS_RC(ctx); /* CUresult: an int, the rest of the register is anything */
	struct cuda_stats *mine;
	u32 direction;

	if (!found || stack < found->stack)
		return 0; /* it was called before it was attached to; or it is one that the driver called */
	function = *found;
	bpf_map_delete_elem(&cuda_functions, &who);
	if (stack != function.stack) {
		count(CNT_CUDA_RETURNS_UNSEEN); /* longjmp went over it */
		return 0;
	}
	mine = stats_of(&stats, function.service);
	if (!mine)
		return 0;
	switch (function.what) {
	case CUDA_SYNC_CONTEXT ... CUDA_SYNC_EVENT:
		if (error)
			__sync_fetch_and_add(&mine->wait_errors, 1);
		waited(ctx, mine, &function, who, function.what - CUDA_SYNC_CONTEXT);
		break;
	case CUDA_COPY_UNKNOWN ... CUDA_COPY_ASYNC_DEVICE_TO_DEVICE:
		direction = (function.what - CUDA_COPY_UNKNOWN) % DIRECTIONS;
		if (error) {
			__sync_fetch_and_add(&mine->copy_errors, 1);
		} else {
			__sync_fetch_and_add(&mine->copies[direction], 1);
			__sync_fetch_and_add(&mine->copied_bytes[direction], function.argument);
		}
		if (function.what < CUDA_COPY_ASYNC_UNKNOWN)
			waited(ctx, mine, &function, who, WAITS - 1);
		break;
	case CUDA_ALLOCATE:
		allocated(mine, &function, who >> 32, error);
		break;
	case CUDA_FREE:
		freed(mine, &function, who >> 32, error);
		break;
	default:
		break;
	}
	return 0;
}

/* The GPU's memory goes with the process that had it. */
static __always_inline void process_gone(u32 tgid)
{
	struct owner *owner = bpf_map_lookup_elem(&owners, &tgid);
	struct cuda_stats *mine;

	if (!owner)
		return;
	mine = stats_of(&stats, owner->service);
	if (mine)
		__sync_fetch_and_add(&mine->freed_bytes, owner->bytes);
	bpf_map_delete_elem(&owners, &tgid);
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(thread_ended, struct task_struct *task)
{
	u64 who = (u64)task->tgid << 32 | (u32)task->pid;

	bpf_map_delete_elem(&cuda_functions, &who);
	if (!task->signal->live.counter)
		process_gone(task->tgid);
	return 0;
}

/* A thread that executes a program takes its process's number, and its own one goes without an end. */
SEC("tp_btf/sched_process_exec")
int BPF_PROG(program_executed, struct task_struct *task, int old_tid)
{
	u64 who = (u64)task->tgid << 32 | (u32)old_tid;

	bpf_map_delete_elem(&cuda_functions, &who);
	process_gone(task->tgid);
	return 0;
}
