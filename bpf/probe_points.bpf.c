/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Counts look-ups in an engine's KV cache at places in its code that the config names: functions, seen at their entry,
 * and USDT probes. For each service, place and model: calls, tokens that were looked up, tokens that were found.
 *
 * Which argument is what stands in `points`, filled before anything is attached. The counters are an array that the
 * reader maps and reads like memory.
 *
 * Not seen: look-ups of processes before they are followed, what returns from the function, and a model's name that is
 * not in memory when the function is called (it is counted: a program at a uprobe cannot wait for a page).
 */
#include <linux/ptrace.h>
#include "targets.bpf.h"

/* libbpf takes one for each place of a probe in each file or process that it attaches to, and gives it back. */
#define BPF_USDT_MAX_SPEC_CNT 1024
#include <bpf/usdt.bpf.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define MAX_POINTS 8
#define MAX_SLOTS 1024
#define MODEL_BYTES 128 /* the zero at the end included */
#define ANY_SERVICE 0xffffffff

/*
 * No look-up is of more tokens. Compilers leave the upper half of a register undefined when an argument has 32 bits, and
 * nothing in a function's symbol says how many it has. So the lower half is all that is looked at, and this is where a
 * negative one begins.
 */
#define MAX_TOKENS 0x7fffffff

/* Which arguments are what, from 1; 0: there is none. `service` is the only one for which it counts. */
struct point {
	u32 model;
	u32 hit_tokens;
	u32 looked_up_tokens;
	u32 service;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_POINTS);
	__type(key, u32);
	__type(value, struct point);
} points SEC(".maps");

struct slot_key {
	u32 service;
	u32 point;
	char model[MODEL_BYTES];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_SLOTS);
	__type(key, struct slot_key);
	__type(value, u32);
} slot_of SEC(".maps");

/* Numbers of slots that nobody has: user space fills it once. A counter would need fetching atomics (Linux 5.12). */
struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, MAX_SLOTS);
	__type(value, u32);
} free_slots SEC(".maps");

/*
 * What was counted. A slot without calls is nobody's, or is being taken; one is never given back. A reader on another CPU
 * may see the first call before all of the name: it reads the name anew each time.
 */
struct point_slot {
	char model[MODEL_BYTES];
	u32 service;
	u32 point;
	u64 calls;
	u64 hit_tokens;
	u64 looked_up_tokens;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAX_SLOTS);
	__type(key, u32);
	__type(value, struct point_slot);
} slots SEC(".maps");

/* libbpf 1.1 has names for the first five only. */
#if defined(__TARGET_ARCH_arm64)
#define SIXTH_ARGUMENT(ctx) (__PT_REGS_CAST(ctx)->regs[5])
#else
#define SIXTH_ARGUMENT(ctx) (__PT_REGS_CAST(ctx)->r9)
#endif

struct lookup {
	u32 point;
	u32 service;
	bool named; /* there is an argument for the model */
	u64 model; /* its address */
	u64 hit_tokens;
	u64 looked_up_tokens;
};

static __always_inline struct point_slot *new_slot(const struct slot_key *key)
{
	struct point_slot *slot;
	u32 index, *theirs;

	if (bpf_map_pop_elem(&free_slots, &index))
		return NULL;
	slot = bpf_map_lookup_elem(&slots, &index);
	if (!slot)
		return NULL;
	__builtin_memcpy(slot->model, key->model, sizeof(slot->model));
	slot->service = key->service;
	slot->point = key->point;
	if (!bpf_map_update_elem(&slot_of, key, &index, BPF_NOEXIST))
		return slot;
	/* Another thread was first, or the kernel has no memory: then the look-up finds none either. */
	bpf_map_push_elem(&free_slots, &index, 0);
	theirs = bpf_map_lookup_elem(&slot_of, key);
	return theirs ? bpf_map_lookup_elem(&slots, theirs) : NULL;
}

static __always_inline int add_lookup(const struct lookup *lookup)
{
	struct slot_key key = { .service = lookup->service, .point = lookup->point };
	struct point_slot *slot;
	u32 *index;
	long size;

	if (lookup->hit_tokens > lookup->looked_up_tokens || lookup->looked_up_tokens > MAX_TOKENS) {
		count(CNT_IMPLAUSIBLE_LOOKUPS);
		return 0;
	}
	if (lookup->named) {
		size = bpf_probe_read_user_str(key.model, sizeof(key.model), (const void *)lookup->model);
		if (size < 0) {
			count(CNT_UNREADABLE);
			return 0;
		}
		if (size == sizeof(key.model))
			count(CNT_MODEL_NAMES_CUT);
	}
	index = bpf_map_lookup_elem(&slot_of, &key);
	slot = index ? bpf_map_lookup_elem(&slots, index) : new_slot(&key);
	if (!slot) {
		count(CNT_SLOTS_FULL);
		return 0;
	}
	__sync_fetch_and_add(&slot->calls, 1);
	__sync_fetch_and_add(&slot->hit_tokens, lookup->hit_tokens);
	__sync_fetch_and_add(&slot->looked_up_tokens, lookup->looked_up_tokens);
	return 0;
}

/* What this thread's look-up counts for; NULL when it counts for nothing. */
static __always_inline const struct point *point_of_task(u32 number, struct lookup *lookup)
{
	u32 *service = service_of_task();
	struct point *point;

	if (!service)
		return NULL;
	point = bpf_map_lookup_elem(&points, &number);
	if (!point || (point->service != ANY_SERVICE && point->service != *service))
		return NULL;
	count(CNT_SEEN_LOOKUPS);
	lookup->point = number;
	lookup->service = *service;
	lookup->named = point->model;
	return point;
}

/*
 * An argument of the function that was entered. Only a constant offset into the context passes the verifier: the barrier
 * keeps the compiler from computing one.
 */
static __always_inline u64 argument_of(const struct pt_regs *ctx, u32 number)
{
	u64 value = 0;

	if (number == 1)
		value = PT_REGS_PARM1(ctx);
	barrier_var(value);
	if (number == 2)
		value = PT_REGS_PARM2(ctx);
	barrier_var(value);
	if (number == 3)
		value = PT_REGS_PARM3(ctx);
	barrier_var(value);
	if (number == 4)
		value = PT_REGS_PARM4(ctx);
	barrier_var(value);
	if (number == 5)
		value = PT_REGS_PARM5(ctx);
	barrier_var(value);
	if (number == 6)
		value = SIXTH_ARGUMENT(ctx);
	return value;
}

static __noinline int on_function(struct pt_regs *ctx, u32 number)
{
	struct lookup lookup = {};
	const struct point *point = point_of_task(number, &lookup);

	if (!point)
		return 0;
	lookup.model = argument_of(ctx, point->model);
	lookup.hit_tokens = (u32)argument_of(ctx, point->hit_tokens);
	lookup.looked_up_tokens = (u32)argument_of(ctx, point->looked_up_tokens);
	return add_lookup(&lookup);
}

/* A program for each point: a cookie that tells them apart is for Linux 5.15 and later. */
#define FUNCTION(number)                           \
	SEC("uprobe")                              \
	int function_##number(struct pt_regs *ctx) \
	{                                          \
		return on_function(ctx, number);   \
	}

FUNCTION(0)
FUNCTION(1)
FUNCTION(2)
FUNCTION(3)
FUNCTION(4)
FUNCTION(5)
FUNCTION(6)
FUNCTION(7)

/* The cookie is the number of the point; libbpf has a way to keep one where the kernel has none. */
SEC("usdt")
int statically_defined(struct pt_regs *ctx)
{
	struct lookup lookup = {};
	const struct point *point = point_of_task(bpf_usdt_cookie(ctx), &lookup);
	long model = 0, hit_tokens, looked_up_tokens;

	if (!point)
		return 0;
	if ((lookup.named && bpf_usdt_arg(ctx, point->model - 1, &model)) ||
	    bpf_usdt_arg(ctx, point->hit_tokens - 1, &hit_tokens) ||
	    bpf_usdt_arg(ctx, point->looked_up_tokens - 1, &looked_up_tokens)) {
		count(CNT_UNREADABLE); /* in memory that is not there, or the probe has fewer arguments */
		return 0;
	}
	lookup.model = model;
	lookup.hit_tokens = hit_tokens;
	lookup.looked_up_tokens = looked_up_tokens;
	return add_lookup(&lookup);
}
