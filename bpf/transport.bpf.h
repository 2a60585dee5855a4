/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * How a record leaves the kernel: through a ring buffer, or through per-CPU perf buffers where there is none.
 *
 * Which one is a constant when the program is verified, so the other branch is dead code and its map is never created.
 * Nothing wakes the reader: it polls, which costs the watched service less than a wake-up per record.
 */
#ifndef FOOTLIGHT_TRANSPORT_BPF_H
#define FOOTLIGHT_TRANSPORT_BPF_H

#include "kernel.h"
#include "records.h"

const volatile u8 use_perf = 0; /* 1: per-CPU perf buffers, 0: ring buffers */

/* enum count -> u64, one slot per CPU */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, CNT_MAX);
	__type(key, enum count);
	__type(value, u64);
} counts SEC(".maps");

static __always_inline void count_many(enum count what, u64 how_many)
{
	u64 *slot = bpf_map_lookup_elem(&counts, &what);

	/*
	 * A program in an interrupt may run between load and add of one in a task on the same CPU, so this has to be
	 * atomic even though the slot is this CPU's own.
	 */
	if (slot)
		__sync_fetch_and_add(slot, how_many);
}

static __always_inline void count(enum count what)
{
	count_many(what, 1);
}

/*
 * Memory for one record of `size` bytes, or NULL when there is no room, which is counted as `cnt_lost`. With perf buffers
 * the record is built in `scratch` (a per-CPU array of one): only programs in task context may use it, they run with
 * preemption off, so nothing else on the CPU fills it meanwhile. Inlined, so that map and size are constants.
 */
static __always_inline void *reserve_record(void *ring, void *scratch, u32 size, u32 cnt_seen, u32 cnt_lost)
{
	void *record;
	u32 zero = 0;

	count(cnt_seen);
	if (use_perf)
		record = bpf_map_lookup_elem(scratch, &zero);
	else
		record = bpf_ringbuf_reserve(ring, size, 0);
	if (!record)
		count(cnt_lost);
	return record;
}

/*
 * Copies a small record that was built on the stack: the way for programs that may run in an interrupt. False when there
 * was no room, which is counted.
 */
static __always_inline bool send_record(void *ctx, void *ring, void *perf, void *record, u32 size, u32 cnt_seen,
					u32 cnt_lost)
{
	s64 error;

	count(cnt_seen);
	if (use_perf)
		error = bpf_perf_event_output(ctx, perf, BPF_F_CURRENT_CPU, record, size);
	else
		error = bpf_ringbuf_output(ring, record, size, BPF_RB_NO_WAKEUP);
	if (error)
		count(cnt_lost);
	return !error;
}

#endif
