// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Counts how often user code was at a place, by the cookie of the place. */
#include <stdbool.h>
#include <linux/types.h>

#include <linux/bpf.h>
#include <linux/ptrace.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/usdt.bpf.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* cookie -> how often */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 16);
	__type(key, __u32);
	__type(value, __u64);
} hits SEC(".maps");

static __always_inline int hit(__u32 cookie)
{
	__u64 *slot = bpf_map_lookup_elem(&hits, &cookie);

	if (slot)
		__sync_fetch_and_add(slot, 1);
	return 0;
}

SEC("uprobe")
int entered(struct pt_regs *ctx)
{
	return hit(bpf_get_attach_cookie(ctx));
}

SEC("uretprobe")
int returned(struct pt_regs *ctx)
{
	return hit(bpf_get_attach_cookie(ctx));
}

SEC("usdt")
int passed(struct pt_regs *ctx)
{
	return hit(bpf_usdt_cookie(ctx));
}
