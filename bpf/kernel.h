/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The few kernel structures that the probes read, with only the members that they read.
 *
 * Offsets come from the running kernel's BTF when the object is loaded (CO-RE), so the order and the size of
 * these declarations do not matter; names and types do. There is no vmlinux.h here: a dump of one kernel hides
 * which members we depend on.
 */
#ifndef FOOTLIGHT_KERNEL_H
#define FOOTLIGHT_KERNEL_H

#include <stdbool.h>
#include <linux/types.h>

/* helpers' prototypes name these */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_tracing.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s64 s64;

#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define S_IFMT 00170000
#define S_IFSOCK 0140000
#define MSG_OOB 1
#define MSG_PEEK 2
#define MSG_TRUNC 0x20
#define MSG_ERRQUEUE 0x2000

enum {
	TCP_ESTABLISHED = 1,
	TCP_SYN_RECV = 3,
	TCP_CLOSE = 7,
	TCP_CLOSE_WAIT = 8,
	TCP_LAST_ACK = 9,
	TCP_CLOSING = 11,
};

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct inode {
	unsigned short i_mode;
};

struct file {
	struct inode *f_inode;
	void *private_data;
};

struct fdtable {
	unsigned int max_fds;
	struct file **fd;
};

struct files_struct {
	struct fdtable *fdt;
};

typedef struct {
	int counter;
} atomic_t;

struct signal_struct {
	atomic_t live;
};

struct task_struct {
	int pid;
	int tgid;
	struct files_struct *files;
	struct signal_struct *signal;
};

struct ns_common {
	unsigned int inum;
};

struct net {
	struct ns_common ns;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct in6_addr {
	union {
		__u8 u6_addr8[16];
	} in6_u;
};

struct sock_common {
	__be32 skc_daddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	possible_net_t skc_net;
	struct in6_addr skc_v6_daddr;
};

struct sock {
	struct sock_common __sk_common;
	int sk_err;
};

struct socket {
	short type;
	struct sock *sk;
};

struct tcp_sock {
	u32 rcv_nxt; /* one past the last byte, or FIN, that the peer sent in order */
	u32 copied_seq; /* the first received byte that the application has not read */
	u32 write_seq; /* one past the last byte that the application has handed over */
};

struct sk_buff {
	unsigned int len;
	unsigned char *data;
};

#pragma clang attribute pop

/* What user space hands to the kernel: a stable ABI, no relocation. */
struct user_iovec {
	u64 base;
	u64 len;
};

struct user_message {
	u64 name;
	u32 name_len;
	u32 pad;
	u64 iov;
	u64 iov_cnt;
	u64 control;
	u64 control_len;
	u32 flags;
	u32 pad2;
};

struct user_many_messages {
	struct user_message message;
	u32 len;
	u32 pad;
};

struct tcp_header {
	__be16 source;
	__be16 dest;
	__be32 seq;
	__be32 ack_seq;
	u8 doff_reserved; /* the header's length in 32-bit words, in the upper four bits */
	u8 flags;
};

/* The context of a classic syscalls:sys_enter_* tracepoint, the same on every 64-bit architecture. */
struct enter_context {
	u64 common;
	s64 syscall;
	u64 args[6];
};

struct exit_context {
	u64 common;
	s64 syscall;
	s64 ret;
};

#endif
