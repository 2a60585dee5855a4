/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What a probe counts in the kernel for each service, and how the reader gets it without asking.
 *
 * An object that counts defines one struct of u64 and struct histogram members and a map `stats` of it: an array with
 * BPF_F_MMAPABLE, one element for each CPU and service, CPU by CPU. User space sets `service_count` and the size before
 * loading, maps the array and reads it like memory. An element belongs to one CPU, so plain additions do where no other
 * program of that CPU can come between; where an interrupt may, use the atomic ones.
 */
#ifndef FOOTLIGHT_SERVICE_STATS_BPF_H
#define FOOTLIGHT_SERVICE_STATS_BPF_H

#include "kernel.h"

const volatile u32 service_count = 1;

/*
 * counts[i] are the values above 2^(i-1) and up to 2^i microseconds, counts[0] those up to 1 us, the last one those above
 * 2^26 us (67 s). The sum is exact; a quantile that is read off the bounds is right within a factor of two.
 */
#define HISTOGRAM_BUCKETS 28
struct histogram {
	u64 sum_ns;
	u64 counts[HISTOGRAM_BUCKETS];
};

/* The element of `stats` for this CPU and service; NULL for a service that is not there. */
static __always_inline void *stats_of(void *stats, u32 service)
{
	u32 index = bpf_get_smp_processor_id() * service_count + service;

	return service < service_count ? bpf_map_lookup_elem(stats, &index) : NULL;
}

/* How many bits `value` has: 0 for 0, 1 for 1, 2 for 2 and 3, ... Without a loop or a branch on each bit. */
static __always_inline u32 bit_length(u64 value)
{
	u32 bits = 0, step;

	step = (value > 0xffffffff) << 5;
	value >>= step;
	bits += step;
	step = (value > 0xffff) << 4;
	value >>= step;
	bits += step;
	step = (value > 0xff) << 3;
	value >>= step;
	bits += step;
	step = (value > 0xf) << 2;
	value >>= step;
	bits += step;
	step = (value > 0x3) << 1;
	value >>= step;
	bits += step;
	step = value > 0x1;
	value >>= step;
	return bits + step + value;
}

static __always_inline u32 bucket_of(u64 ns)
{
	u32 bucket = ns <= 1000 ? 0 : bit_length((ns - 1) / 1000);

	return bucket < HISTOGRAM_BUCKETS ? bucket : HISTOGRAM_BUCKETS - 1;
}

static __always_inline void observe(struct histogram *histogram, u64 ns)
{
	histogram->sum_ns += ns;
	histogram->counts[bucket_of(ns)]++;
}

static __always_inline void observe_atomic(struct histogram *histogram, u64 ns)
{
	__sync_fetch_and_add(&histogram->sum_ns, ns);
	__sync_fetch_and_add(&histogram->counts[bucket_of(ns)], 1);
}

#endif
