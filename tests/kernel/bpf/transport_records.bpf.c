/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Makes records on demand, for the tests of the transports: each getpgid() of the process `tgid` makes as many records
 * as the argument's low 16 bits say, in the manner that the bits above say. Both kinds of transport are in the object;
 * the one that is not used is not created. It measures nothing.
 */
#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>

#define MAX_RECORDS_PER_CALL 1024
#define HOLD_LIMIT_NS 200000000ULL /* how long MANNER_HOLD may keep a record busy */

enum manner {
	MANNER_SUBMIT = 0,
	MANNER_DISCARD_ODD = 1, /* reserve every record, submit those with an even number */
	MANNER_DISCARD_ALL = 2,
	MANNER_HOLD = 3, /* reserve one record, submit it when `release` is set or HOLD_LIMIT_NS are over */
};

enum count {
	CNT_SEEN, /* records that were due */
	CNT_LOST, /* records without room */
	CNT_DISCARDED,
	CNT_MAX,
};

struct test_record {
	__u64 number; /* from 0, those that were lost or discarded included */
	__u64 seen_ns; /* CLOCK_MONOTONIC */
	__u32 cpu;
	__u16 low; /* the low 16 bits of number */
	__s8 negative; /* -1 */
	bool odd;
	char name[16];
};

const volatile __u32 tgid = 0; /* the process whose calls count; 0: none */
const volatile __u8 use_perf = 0; /* 1: perf buffers, 0: ring buffer */

/* BTF keeps only the types that a variable or a map names. */
const volatile enum manner manner_for_btf = MANNER_SUBMIT;
const struct test_record *record_for_btf;

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 65536);
} ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
} perf SEC(".maps");

/* enum count -> u64 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, CNT_MAX);
	__type(key, enum count);
	__type(value, __u64);
} counts SEC(".maps");

/* 0 -> the number of the next record; 1 -> not zero when MANNER_HOLD is to let go */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, __u64);
} state SEC(".maps");

/* number -> cpu, only to have a hash to look up in batches */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64);
	__type(value, __u32);
} numbers SEC(".maps");

/* The front of the tracepoint's record (/sys/kernel/tracing/events/syscalls/sys_enter_getpgid/format). */
struct enter {
	__u64 common;
	__s64 syscall;
	__u64 argument;
};

static __always_inline void count(__u32 what)
{
	__u64 *slot = bpf_map_lookup_elem(&counts, &what);

	if (slot)
		__sync_fetch_and_add(slot, 1);
}

static __always_inline void fill(struct test_record *record, __u64 number)
{
	__builtin_memset(record, 0, sizeof(*record));
	record->number = number;
	record->seen_ns = bpf_ktime_get_ns();
	record->cpu = bpf_get_smp_processor_id();
	record->low = number;
	record->negative = -1;
	record->odd = number & 1;
	bpf_get_current_comm(record->name, sizeof(record->name));
}

static long hold(__u32 index __attribute__((unused)), __u64 *until)
{
	__u32 release = 1;
	volatile __u64 *flag = bpf_map_lookup_elem(&state, &release);

	return !flag || *flag || bpf_ktime_get_ns() > *until;
}

static __always_inline void make_in_ring(__u64 number, enum manner manner)
{
	struct test_record *record = bpf_ringbuf_reserve(&ring, sizeof(*record), 0);
	__u64 until = bpf_ktime_get_ns() + HOLD_LIMIT_NS;

	if (!record) {
		count(CNT_LOST);
		return;
	}
	fill(record, number);
	if (manner == MANNER_HOLD)
		bpf_loop(1 << 23, hold, &until, 0);
	if (manner == MANNER_DISCARD_ALL || (manner == MANNER_DISCARD_ODD && (number & 1))) {
		bpf_ringbuf_discard(record, BPF_RB_NO_WAKEUP);
		count(CNT_DISCARDED);
		return;
	}
	bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
}

static __always_inline void make_in_perf(void *ctx, __u64 number)
{
	struct test_record record;

	fill(&record, number);
	if (bpf_perf_event_output(ctx, &perf, BPF_F_CURRENT_CPU, &record, sizeof(record)))
		count(CNT_LOST);
}

SEC("tp/syscalls/sys_enter_getpgid")
int make_records(struct enter *ctx)
{
	__u32 wanted = ctx->argument & 0xffff, first = 0, index;
	enum manner manner = ctx->argument >> 16 & 0xff;
	__u64 *next;

	if (bpf_get_current_pid_tgid() >> 32 != tgid)
		return 0;
	next = bpf_map_lookup_elem(&state, &first);
	if (!next)
		return 0;
	for (index = 0; index < MAX_RECORDS_PER_CALL && index < wanted; index++) {
		__u64 number = __sync_fetch_and_add(next, 1);

		count(CNT_SEEN);
		if (use_perf)
			make_in_perf(ctx, number);
		else
			make_in_ring(number, manner);
	}
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
