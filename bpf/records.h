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

/*
 * What the probe counts, per CPU. `seen` is every record that was due; it equals those delivered plus those lost.
 * Lost and unfollowed things are never silent: each early return of the probe that drops something counts here.
 */
enum count {
	CNT_SEEN_READS,
	CNT_SEEN_WRITES,
	CNT_SEEN_EVENTS,
	CNT_LOST_READS_RING_FULL, /* no room in the ring of reads: the reader is too slow */
	CNT_LOST_WRITES_RING_FULL, /* no room in the ring of writes */
	CNT_LOST_EVENTS_RING_FULL, /* no room in the ring of events */
	CNT_CONNECTIONS_FULL, /* a connection was not followed: the table is full */
	CNT_CALLS_FULL, /* a call was not followed: the table of calls under way is full */
	CNT_TARGETS_FULL, /* a forked process was not followed: the table of targets is full */
	CNT_UNREADABLE, /* the bytes of a call could not be copied: page not present, or the memory was unmapped */
	CNT_TOO_MANY_SEGMENTS, /* a vector had more than MAX_SEGMENTS segments (or MAX_MESSAGES messages) */
	CNT_CAPPED_CALLS, /* a call moved more than CALL_CAP_BYTES; the rest was not copied */
	CNT_UNSEEN_BYTES_CALLS, /* sendfile, splice, MSG_TRUNC: the bytes never were in the memory of the service */
	CNT_UNFOLLOWED_IO, /* the stream moved on without a call that is followed: io_uring, or another process */
	CNT_STALE_CONNECTION, /* a socket's memory was reused before its end was seen; a new connection was begun */
	CNT_MAX,
};

#endif
