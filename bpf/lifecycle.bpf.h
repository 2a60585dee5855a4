/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Keeps the table of targets as processes come: a child of a target is a target from its first instruction on.
 *
 * For the one object that keeps the maps of targets.bpf.h; where processes go is that object's own business.
 */
#ifndef FOOTLIGHT_LIFECYCLE_BPF_H
#define FOOTLIGHT_LIFECYCLE_BPF_H

#include "targets.bpf.h"

SEC("tp_btf/sched_process_fork")
int BPF_PROG(follow_fork, struct task_struct *parent, struct task_struct *child)
{
	u32 parent_tgid = parent->tgid, tgid = child->tgid, zero = 0;
	struct target_filter *filter;
	u32 *service;

	if (tgid == parent_tgid)
		return 0; /* a thread */
	service = service_of_process(parent_tgid);
	if (!service)
		return 0;
	if (bpf_map_update_elem(&targets, &tgid, service, BPF_ANY)) {
		count(CNT_TARGETS_FULL);
		return 0;
	}
	filter = bpf_map_lookup_elem(&target_filter, &zero);
	if (filter)
		filter->maybe[tgid % TARGET_BITS] = 1;
	return 0;
}

#endif
