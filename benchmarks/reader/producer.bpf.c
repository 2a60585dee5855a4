/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Offers records as fast as it is called: each getpgid() of the process `tgid` makes RECORDS_PER_CALL of them.
 * producer_bcc.c is the same for BCC.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define RECORDS_PER_CALL 101
#define BUCKETS 61

enum count {
	CNT_OFFERED, /* records that were due */
	CNT_LOST, /* records for which there was no room */
	CNT_MAX,
};

struct bench_record {
	__u64 seen_ns; /* CLOCK_MONOTONIC */
	__u64 number; /* from 0, those that were lost included */
	__u64 tgid_tid;
	__u64 cookie;
	__u32 bucket; /* number % BUCKETS: what the readers count */
	__u32 cpu;
};

const volatile __u32 tgid = 0; /* the process whose calls count; 0: none */
const volatile __u8 use_perf = 0; /* 1: perf buffers, 0: ring buffer */

/* BTF keeps only the types that a variable or a map names. */
const struct bench_record *record_for_btf;

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
} perf SEC(".maps");

/* enum count -> u64. One process on one CPU makes all calls, so nothing here is atomic. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, CNT_MAX);
	__type(key, enum count);
	__type(value, __u64);
} counts SEC(".maps");

static __always_inline void fill(struct bench_record *record, __u64 number)
{
	record->seen_ns = bpf_ktime_get_ns();
	record->number = number;
	record->tgid_tid = tgid;
	record->cookie = ~number;
	record->bucket = number % BUCKETS;
	record->cpu = 0;
}

SEC("tp/syscalls/sys_enter_getpgid")
int offer(void *ctx)
{
	enum count offered_key = CNT_OFFERED, lost_key = CNT_LOST;
	__u64 *offered, *lost;
	int index;

	if (bpf_get_current_pid_tgid() >> 32 != tgid)
		return 0;
	offered = bpf_map_lookup_elem(&counts, &offered_key);
	lost = bpf_map_lookup_elem(&counts, &lost_key);
	if (!offered || !lost)
		return 0;
	for (index = 0; index < RECORDS_PER_CALL; index++) {
		__u64 number = (*offered)++;
		struct bench_record *record;

		if (use_perf) {
			struct bench_record copy;

			fill(&copy, number);
			if (bpf_perf_event_output(ctx, &perf, BPF_F_CURRENT_CPU, &copy, sizeof(copy)))
				(*lost)++;
			continue;
		}
		record = bpf_ringbuf_reserve(&ring, sizeof(*record), 0);
		if (!record) {
			(*lost)++;
			continue;
		}
		fill(record, number);
		bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
	}
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
