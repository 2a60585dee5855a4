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
typedef __s16 s16;
typedef __s32 s32;
typedef __s64 s64;

#define AF_UNIX 1
#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define S_IFMT 00170000
#define S_IFSOCK 0140000
#define S_IFREG 0100000
#define S_IFBLK 0060000
#define S_IFDIR 0040000
#define S_IFCHR 0020000
#define S_IFIFO 0010000
#define PF_LOCAL_THROTTLE 0x00100000 /* writes for a device or a file system above; before Linux 5.8 PF_LESS_THROTTLE */
#define MSG_OOB 1
#define MSG_PEEK 2
#define MSG_TRUNC 0x20
#define MSG_ERRQUEUE 0x2000
#define O_NONBLOCK 00004000
#define EAGAIN 11
#define SOCK_NOSPACE 2 /* bit of socket.flags */

enum {
	TCP_ESTABLISHED = 1,
	TCP_SYN_SENT = 2,
	TCP_SYN_RECV = 3,
	TCP_CLOSE = 7,
	TCP_CLOSE_WAIT = 8,
	TCP_LAST_ACK = 9,
	TCP_CLOSING = 11,
};

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct super_block {
	unsigned long s_magic;
};

struct inode {
	unsigned short i_mode;
	u32 i_rdev;
	struct super_block *i_sb;
};

struct qstr {
	const unsigned char *name;
};

struct dentry {
	struct qstr d_name;
};

struct path {
	struct dentry *dentry;
};

struct file {
	struct inode *f_inode;
	struct path f_path;
	unsigned int f_flags;
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

struct rq;

struct cfs_rq {
	struct rq *rq;
	int throttle_count;
};

struct sched_entity {
	struct cfs_rq *cfs_rq;
};

/* before Linux 5.14 */
struct task_struct___old {
	volatile long state;
};

struct task_struct {
	int pid;
	int tgid;
	struct files_struct *files;
	struct signal_struct *signal;
	unsigned int __state; /* since Linux 5.14 */
	unsigned int flags;
	unsigned int in_iowait : 1;
	unsigned long jobctl;
	unsigned long nvcsw;
	unsigned long nivcsw;
	struct sched_entity se;
	bool throttled; /* since Linux 6.18: it was taken off its queue because its group has no quota left */
	char comm[16];
};

/* ---- block I/O ---- */

struct kernfs_node {
	u64 id; /* the inode number of the directory */
};

struct cgroup {
	struct kernfs_node *kn;
};

struct cgroup_subsys_state {
	struct cgroup *cgroup;
};

struct blkcg {
	struct cgroup_subsys_state css;
};

struct blkcg_gq {
	struct blkcg *blkcg;
};

struct gendisk {
	int major;
	int first_minor;
};

struct block_device {
	struct gendisk *bd_disk;
};

struct bvec_iter {
	unsigned int bi_size;
};

struct bio {
	struct bio *bi_next;
	struct gendisk *bi_disk; /* before Linux 5.12 */
	struct block_device *bi_bdev;
	unsigned int bi_opf;
	unsigned short bi_flags;
	struct bvec_iter bi_iter;
	struct blkcg_gq *bi_blkg; /* with CONFIG_BLK_CGROUP */
	void *bi_private;
};

struct request {
	unsigned int cmd_flags;
	unsigned int __data_len;
	struct bio *bio;
	struct bio *biotail;
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
	__be32 skc_rcv_saddr;
	unsigned int skc_hash; /* of addresses and ports */
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	possible_net_t skc_net;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
};

struct sock {
	struct sock_common __sk_common;
	int sk_err;
	u16 sk_protocol;
	int sk_wmem_queued; /* bytes of the send buffer that are taken */
	int sk_sndbuf;
	struct socket *sk_socket;
};

struct socket {
	short type;
	unsigned long flags;
	struct file *file;
	struct sock *sk;
};

struct inet_sock {
	__be16 inet_sport; /* the local port; kept when skc_num is put back */
};

struct tcp_sock {
	u32 rcv_nxt; /* one past the last byte, or FIN, that the peer sent in order */
	u32 copied_seq; /* the first received byte that the application has not read */
	u32 write_seq; /* one past the last byte that the application has handed over */
	u32 srtt_us; /* smoothed round trip, in eighths of a microsecond */
};

struct net_device {
	possible_net_t nd_net;
};

struct sk_buff {
	unsigned int len;
	unsigned char *data;
	unsigned char *head;
	u16 transport_header; /* from head */
	u16 network_header;
	struct net_device *dev;
};

/* The event of a classic tracepoint, only to learn which arguments this kernel's tracepoint has. */
struct trace_event_raw_tcp_retransmit_skb {
	int err;
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
