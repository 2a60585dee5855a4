/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Which processes and which listening ports belong to a watched service.
 *
 * User space finds the first processes and the ports; a child of a target is a target from its first instruction on,
 * because the fork tracepoint makes it one. Entries of dead processes go when their last thread exits. The requests probe
 * keeps these maps (lifecycle.bpf.h); all other objects are given its maps before they are loaded.
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

/*
 * Not 0 where some target's tgid ends in these 16 bits. Every process of the host is asked about, on each switch and call:
 * this costs 2 ns where the hash costs 30. Programs write 1; user space clears what no target needs, see probes/requests.py.
 */
#define TARGET_BITS 65536
struct target_filter {
	u8 maybe[TARGET_BITS];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct target_filter);
} target_filter SEC(".maps");

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

/*
 * Another number after each change that user space made to `targets` or `ports`: a process that goes to another service, a
 * port that does. Whoever keeps a service for longer than an event asks again then.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u32);
} revision SEC(".maps");

static __always_inline u32 revision_now(void)
{
	u32 zero = 0, *number = bpf_map_lookup_elem(&revision, &zero);

	return number ? *number : 0;
}

/* The service of a process, or NULL when it is no target. */
static __always_inline u32 *service_of_process(u32 tgid)
{
	u32 zero = 0;
	struct target_filter *filter = bpf_map_lookup_elem(&target_filter, &zero);

	if (!filter || !filter->maybe[tgid % TARGET_BITS])
		return NULL;
	return bpf_map_lookup_elem(&targets, &tgid);
}

static __always_inline u32 *service_of_task(void)
{
	return service_of_process(bpf_get_current_pid_tgid() >> 32);
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

#endif
