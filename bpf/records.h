/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Every record that crosses to user space, and every reason for which one is missing.
 *
 * The Python side builds its numpy types from the BTF of these structures, so this file is the only definition.
 * Instants are CLOCK_MONOTONIC in nanoseconds. Positions are TCP sequence numbers in host order: they wrap at 2^32.
 */
#ifndef FOOTLIGHT_RECORDS_H
#define FOOTLIGHT_RECORDS_H

/*
 * One record class per direction. A request is mostly one read of some kilobytes, a response is hundreds of frames of
 * 100 to 400 bytes, so one size for both would waste either copies or ring space. With the ring's own 8 bytes a
 * record fills 4096 and 512 bytes: no record straddles more pages than it must.
 */
#define READ_PAYLOAD_BYTES 4032
#define WRITE_PAYLOAD_BYTES 448

/* Of one call at most this much is copied; the rest is counted (CNT_CAPPED_CALLS) and skipped by the decoders. */
#define CALL_CAP_BYTES (256 * 1024)
/*
 * Segments of a vector that are followed, and messages of one sendmmsg or recvmmsg. Node joins what one turn of its loop
 * wrote, three segments for each chunk: the last token, the usage and [DONE] together are nine and more.
 */
#define MAX_SEGMENTS 32
#define MAX_MESSAGES 8

struct chunk_header {
	u64 conn; /* which connection: unique while the host runs */
	u64 seen_ns; /* when this record was made: the order of things */
	u64 at_ns; /* read: when the call returned; write: when it was made */
	u32 position; /* of the first byte of the payload in its direction's stream */
	u32 size; /* bytes of payload that are valid */
	u32 uncaptured; /* bytes of the stream that follow the payload and that no record carries */
	u32 service;
	u32 tgid;
	u32 tid;
	u32 lost; /* records of this direction of this connection lost before this one, in all */
	u32 lost_other; /* the same of the other direction */
};

/* Bytes that the service read from a connection. Payload past `size` is what an older record left in the ring. */
struct read_chunk {
	struct chunk_header header;
	u8 payload[READ_PAYLOAD_BYTES];
};

/* Bytes that the service wrote to a connection. */
struct write_chunk {
	struct chunk_header header;
	u8 payload[WRITE_PAYLOAD_BYTES];
};

enum event_kind {
	EVENT_OPENED = 1, /* first sight; `born`: from its beginning. The positions are the next bytes */
	EVENT_ACCEPTED = 2, /* the service took it from the accept queue */
	EVENT_SEGMENT = 3, /* `size` bytes at `position` entered the receive path */
	EVENT_STATE = 4, /* TCP went from old_state to new_state. The positions are those after the last records */
	EVENT_RESET = 5, /* the peer sent RST */
};

struct connection_event {
	u64 conn;
	u64 seen_ns;
	enum event_kind kind;
	u32 position;
	u32 tx_position;
	u32 size;
	u32 service;
	u32 tgid; /* 0 where the kernel acted on its own (interrupt) */
	u32 tid;
	u16 local_port;
	u16 peer_port;
	u8 old_state;
	u8 new_state;
	u8 family;
	u8 born;
	u32 error; /* of a change to TCP_CLOSE: the errno that the socket died of, 0 when the service closed it */
	u8 peer[16]; /* IPv4 in the first four bytes */
};

/* ---- what threads of a service did: scheduler, memory ---- */

/* What a thread slept on. */
enum wait_reason {
	WAIT_CPU, /* nothing: it was taken off its CPU while it could run */
	WAIT_FUTEX,
	WAIT_POLL, /* epoll, poll, select */
	WAIT_SOCKET, /* a call on a socket */
	WAIT_PIPE, /* a call on a pipe, an eventfd or the like */
	WAIT_DISK, /* uninterruptible I/O that no page fault began */
	WAIT_PAGE_FAULT, /* asleep in a page fault */
	WAIT_TIMER, /* nanosleep and the like */
	WAIT_DEVICE, /* a call on a character device */
	WAIT_STOPPED, /* by a signal or a debugger */
	WAIT_OTHER,
	WAIT_MAX,
};

/* Who ended the sleep of a thread. */
enum waker {
	WAKER_NONE, /* it did not sleep, or its waking was not seen */
	WAKER_TASK, /* a task, by a call of its own */
	WAKER_MESSAGE, /* a task that sent to `ready_sk`, the wake-up came with the bytes: a socket of this host */
	WAKER_NETWORK, /* an interrupt that brought bytes for `ready_sk`; whose task it interrupted means nothing */
	WAKER_SOFTIRQ, /* another deferred interrupt: room in a socket's buffer, a timer, a disk */
	WAKER_HARDIRQ, /* a timer, a disk */
	WAKER_PARENT, /* it was just created, by the waker */
	WAKER_MAX,
};

#define INTERVAL_THROTTLED 1 /* its cgroup had used up its CPU quota */
#define INTERVAL_IOWAIT 2 /* the kernel counts the wait as I/O */
#define INTERVAL_TIMEOUT 4 /* the call that slept had a timeout */
#define INTERVAL_BORN 8 /* the first one of a thread whose creation was seen: off_ns is when */
/*
 * What the thread did before off_ns is not known: it was there before it was watched, or a switch of it was not seen, which
 * leaves no hole in `sequence`. The kernel does not tell every switch of a busy machine.
 */
#define INTERVAL_FIRST 16
#define INTERVAL_WAKER_TARGET 32 /* the waker is a thread of a watched service */
#define INTERVAL_GPU 64 /* WAIT_DEVICE, and the device is a GPU's */

/* A stretch for which a thread of a service was not on a CPU; made when it gets one again. */
struct thread_interval {
	u64 off_ns; /* it left its CPU */
	u64 wake_ns; /* its sleep ended; 0: it did not sleep, or its waking was not seen */
	u64 on_ns; /* it runs again */
	/* what it waited for: a futex's address, a struct sock * or struct file *, a device's number; 0: not known */
	u64 object;
	u64 ready_sk; /* the struct sock * whose bytes ended the sleep; 0: none */
	u32 tid;
	u32 tgid;
	u32 waker_tid; /* of WAKER_TASK, WAKER_MESSAGE and WAKER_PARENT; else 0 */
	u32 waker_tgid;
	u32 service;
	u32 sequence; /* counts the thread's intervals from 1: a hole is a loss, another 1 another thread */
	u16 syscall; /* the number of the system call that it was in; NO_SYSCALL: none */
	u16 cpu; /* it got */
	u8 reason; /* enum wait_reason */
	u8 waker; /* enum waker */
	u8 flags; /* INTERVAL_* */
	u8 pad;
};

#define NO_SYSCALL 0xffff

enum message_kind {
	MESSAGE_READY = 1, /* a thread of a service sent to `sk`, a socket that a service reads: the bytes are there */
	MESSAGE_SENT = 2, /* a thread of a service called send on `sk`; `result` as the call returned it */
	MESSAGE_RECEIVED = 3, /* a thread of a service called receive on `sk` */
};

/* Bytes on a socket inside a service, or between a service and a server that it asks something. */
struct message {
	u64 at_ns;
	u64 sk;
	u32 tid; /* of the sender (READY, SENT), or the receiver */
	u32 tgid;
	u32 service;
	s32 result; /* bytes, or -errno; 0 for READY */
	u32 lost; /* messages of the host that were lost before this one, in all */
	u16 local_port; /* of sk; 0 where it has none */
	u16 peer_port;
	u8 kind; /* enum message_kind */
	u8 family;
	u8 full; /* SENT: the send buffer had no room for more, or for anything */
	u8 pad[5];
	u8 peer[16]; /* IPv4 in the first four bytes */
};

/* The name of a thread of a service: at first sight, and when it changes. */
struct thread_name {
	u64 at_ns;
	u32 tid;
	u32 tgid;
	u8 comm[16];
};

enum span_kind {
	SPAN_RECLAIM = 1, /* the thread freed memory for itself: direct reclaim, of the host or of its memory cgroup */
	SPAN_GPU_SYNC = 2, /* the thread was in a call of the CUDA driver that waits for the GPU, asleep or not */
};

/* Something that a thread did from begin_ns to end_ns, running or not. */
struct thread_span {
	u64 begin_ns;
	u64 end_ns;
	u32 tid;
	u32 tgid;
	u32 service;
	u8 kind; /* enum span_kind */
	u8 pad[3];
};

enum tcp_event_kind {
	TCP_RETRANSMIT = 1,
	TCP_RESET_SENT = 2,
	TCP_RESET_RECEIVED = 3,
	TCP_CONNECTED = 4, /* a connection that the service opened; it took duration_ns */
	TCP_SEND_STALL = 5, /* no room in the send buffer for duration_ns, which ended at at_ns */
};

struct tcp_event {
	u64 at_ns;
	u64 duration_ns;
	u32 tgid; /* 0 where the kernel acted on its own */
	u32 tid;
	u32 service;
	u16 local_port;
	u16 peer_port;
	u8 kind; /* enum tcp_event_kind */
	u8 family;
	u8 pad[6];
	u8 peer[16];
};

enum block_operation {
	BLOCK_READ,
	BLOCK_WRITE,
	BLOCK_FLUSH,
	BLOCK_DISCARD,
	BLOCK_MAX,
};

/* An I/O of a service that the device has completed. */
struct block_io {
	u64 queued_ns; /* asked for; 0: not seen */
	u64 issued_ns; /* given to the device */
	u64 done_ns;
	u32 tid; /* that asked for it; 0: the kernel, on behalf of the service's cgroup */
	u32 tgid;
	u32 service;
	u32 device; /* major << 20 | minor */
	u32 bytes;
	u8 operation; /* enum block_operation */
	u8 pad[3];
};

/*
 * What the probes count, per CPU. `seen` is every record that was due; it equals those delivered plus those lost.
 * Lost and unfollowed things are never silent: each early return of a probe that drops something counts here.
 * Each object has a map of all of them and uses its own.
 */
enum count {
	CNT_SEEN_READS,
	CNT_SEEN_WRITES,
	CNT_SEEN_EVENTS,
	CNT_LOST_READS_RING_FULL, /* no room in the ring of reads: the reader is too slow */
	CNT_LOST_WRITES_RING_FULL, /* no room in the ring of writes */
	CNT_LOST_EVENTS_RING_FULL, /* no room in the ring of events */
	CNT_CONNECTIONS_FULL, /* an opening, accept, segment or call of a connection was not followed: the table is full */
	CNT_CALLS_FULL, /* a call was not followed: the table of calls under way is full */
	CNT_TARGETS_FULL, /* a process was not followed: the table of targets is full; user space counts what it found */
	CNT_UNREADABLE, /* the bytes of a call could not be copied: page not present, or the memory was unmapped */
	CNT_TOO_MANY_SEGMENTS, /* a vector had more than MAX_SEGMENTS segments (or MAX_MESSAGES messages) */
	CNT_CAPPED_CALLS, /* a call moved more than CALL_CAP_BYTES; the rest was not copied */
	CNT_UNSEEN_BYTES_CALLS, /* sendfile, splice, MSG_TRUNC: the bytes never were in the memory of the service */
	CNT_UNFOLLOWED_IO, /* the stream moved on without a call that is followed: io_uring, or another process */
	CNT_STALE_CONNECTION, /* its socket's memory is another's by now; its end was not seen, and is told then */
	/* scheduler */
	CNT_SEEN_INTERVALS,
	CNT_SEEN_MESSAGES,
	CNT_SEEN_NAMES,
	CNT_LOST_INTERVALS_RING_FULL,
	CNT_LOST_MESSAGES_RING_FULL,
	CNT_LOST_NAMES_RING_FULL,
	CNT_THREADS_FULL, /* a thread was not followed: the table of threads is full */
	CNT_CLOCK_BACKWARDS, /* an instant of one CPU was before an earlier one of another CPU; the time was left out */
	/* memory */
	CNT_SEEN_SPANS,
	CNT_LOST_SPANS_RING_FULL,
	CNT_SPANS_FULL, /* a span was not followed: the table of those under way is full */
	/* tcp */
	CNT_SEEN_TCP_EVENTS,
	CNT_LOST_TCP_EVENTS_RING_FULL,
	CNT_SOCKETS_FULL, /* a connect, stall or unread segment was not timed: the table is full */
	/* block */
	CNT_SEEN_BLOCK_IOS,
	CNT_LOST_BLOCK_IOS_RING_FULL,
	CNT_BLOCK_IOS_FULL, /* an I/O was not timed: the table of those under way is full */
	/* syscalls */
	CNT_SEEN_SYSCALLS,
	CNT_SYSCALLS_FULL, /* a call was not timed: the table is full */
	/* probe points */
	CNT_SEEN_LOOKUPS,
	CNT_IMPLAUSIBLE_LOOKUPS, /* a look-up was not counted: it found more tokens than it looked up, or 2^31 and more */
	CNT_MODEL_NAMES_CUT, /* a look-up was counted for the beginning of its model's name: the name is too long */
	CNT_SLOTS_FULL, /* a look-up was not counted: the table of models is full */
	/* cuda */
	CNT_SEEN_GPU_SYNCS,
	CNT_LOST_GPU_SYNCS_RING_FULL,
	CNT_CUDA_CALLS_FULL, /* a call was not counted: the table of calls under way is full */
	CNT_CUDA_RETURNS_UNSEEN, /* a call was not counted: it did not return where it was called */
	CNT_ALLOCATIONS_FULL, /* an allocation was not followed: the table is full */
	CNT_UNKNOWN_FREES, /* what was freed had been allocated before it was watched, or was not followed */
	CNT_NOT_ATTACHED, /* a library of a process could not be read or attached to; user space counts it */
	/* kept by user space, which counts */
	CNT_PORTS_FULL, /* a listening port was not followed: the table is full */
	CNT_CGROUPS_FULL, /* a cgroup was not followed: the table is full. I/O of its processes counts where they submit it */
	CNT_MAX,
};

#endif
