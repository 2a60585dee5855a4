/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* producer.bpf.c for BCC, which has its own way to name maps. TGID and PAGES are given when it is compiled. */
#define RECORDS_PER_CALL 101
#define BUCKETS 61

struct bench_record {
	u64 seen_ns;
	u64 number;
	u64 tgid_tid;
	u64 cookie;
	u32 bucket;
	u32 cpu;
};

BPF_RINGBUF_OUTPUT(ring, PAGES);
BPF_ARRAY(counts, u64, 2);

TRACEPOINT_PROBE(syscalls, sys_enter_getpgid)
{
	int offered_key = 0, lost_key = 1, index;
	u64 *offered, *lost;

	if (bpf_get_current_pid_tgid() >> 32 != TGID)
		return 0;
	offered = counts.lookup(&offered_key);
	lost = counts.lookup(&lost_key);
	if (!offered || !lost)
		return 0;
	for (index = 0; index < RECORDS_PER_CALL; index++) {
		u64 number = (*offered)++;
		struct bench_record *record = ring.ringbuf_reserve(sizeof(struct bench_record));

		if (!record) {
			(*lost)++;
			continue;
		}
		record->seen_ns = bpf_ktime_get_ns();
		record->number = number;
		record->tgid_tid = TGID;
		record->cookie = ~number;
		record->bucket = number % BUCKETS;
		record->cpu = 0;
		ring.ringbuf_submit(record, BPF_RB_NO_WAKEUP);
	}
	return 0;
}
