/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Which processes and which listening ports belong to a watched service.
 *
 * User space finds the first processes and the ports; a child of a target is a target from its first instruction on,
 * because the fork tracepoint makes it one here. Entries of dead processes go when their last thread exits.
 */
#ifndef FOOTLIGHT_TARGETS_BPF_H
#define FOOTLIGHT_TARGETS_BPF_H

#include "transport.bpf.h"

/* tgid -> service */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u32);
	__type(value, u32);
} targets SEC(".maps");

struct port_key {
	u32 netns; /* inode number of the network namespace */
	u32 port;
};

/* listening port of a service, in its network namespace -> service */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct port_key);
	__type(value, u32);
} ports SEC(".maps");

/*
 * 1 for a port that stands in `ports` for some namespace. Every TCP segment of the host is asked about: an array look-up
 * is inlined by the JIT, a hash look-up is not.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 65536);
	__type(key, u32);
	__type(value, u8);
} port_bits SEC(".maps");

static __always_inline u32 *service_of_task(void)
{
	u32 tgid = bpf_get_current_pid_tgid() >> 32;

	return bpf_map_lookup_elem(&targets, &tgid);
}

static __always_inline u32 *service_of_socket(const struct sock *sk)
{
	u32 port = BPF_CORE_READ(sk, __sk_common.skc_num);
	u8 *bit = bpf_map_lookup_elem(&port_bits, &port);
	struct port_key key = { .port = port };

	if (!bit || !*bit)
		return NULL;
	key.netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
	return bpf_map_lookup_elem(&ports, &key);
}

SEC("tp_btf/sched_process_fork")
int BPF_PROG(follow_fork, struct task_struct *parent, struct task_struct *child)
{
	u32 parent_tgid = parent->tgid, tgid = child->tgid;
	u32 *service;

	if (tgid == parent_tgid)
		return 0; /* a thread */
	service = bpf_map_lookup_elem(&targets, &parent_tgid);
	if (service && bpf_map_update_elem(&targets, &tgid, service, BPF_ANY))
		count(CNT_TARGETS_FULL);
	return 0;
}

#endif
