// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * tcp: how the connections of a watched service fare, those that it serves and those that it opens.
 *
 * Measured, for each service:
 * - connect: from SYN_SENT to ESTABLISHED, of connections that a target opens and that come about.
 * - round_trip: the kernel's smoothed round trip. One sample for each connection when a segment comes and the last sample
 *   is 100 ms old: an idle connection says nothing, a busy one at most ten times a second.
 * - receive_queue: how long bytes lie in the socket. One segment of a connection is followed at a time, from its arrival
 *   in order until a read has passed its first byte; those that come meanwhile are not followed.
 * - send_stall: from a send of a non-blocking socket that found no room for all its bytes to the next send that moves
 *   some. What a blocking sender waits, it waits asleep inside its call, where the scheduler probe sees it.
 * - retransmits: packets that went out again, SYNs and loss probes among them; one may be several segments.
 * - resets_sent, resets_received.
 *
 * How: a socket is a service's by its local port, or because a target opened it, which is kept from SYN_SENT until the
 * socket is destroyed. Any other socket of the host costs two look-ups in arrays that the JIT inlines.
 *
 * Not measured: connections that a target had opened before the probe was attached, and those of simultaneous opens;
 * data on the last packet of the handshake and after the service's FIN (tcp_probe does not fire for either); SYN-ACKs that
 * went out again; a stall that ends with the connection; before Linux 6.3 any stall (there is no tracepoint); the partial
 * send of a socket with TCP_NOTSENT_LOWAT; a reset that the kernel answers with for a connection that a target had opened
 * and that is gone.
 */
#include "service_stats.bpf.h"
#include "sockets.bpf.h"
#include "targets.bpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define ROUND_TRIP_PERIOD_NS 100000000
#define SRTT_UNIT_NS 125 /* an eighth of a microsecond */

struct tcp_stats {
	struct histogram connect;
	struct histogram round_trip;
	struct histogram receive_queue;
	struct histogram send_stall;
	u64 retransmits;
	u64 resets_sent;
	u64 resets_received;
};

/* CPU * service_count + service -> counters; added to atomically, for these programs interrupt each other. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct tcp_stats);
} stats SEC(".maps");

/*
 * What is under way on a socket of a service. Programs that change it run under the lock of the socket, but for `sent`,
 * which alone has `stall_ns`, and which runs while its caller holds the socket's file.
 */
struct watched_socket {
	u64 connect_ns; /* since then in SYN_SENT; 0: not */
	u64 unread_ns; /* when the byte at unread_position came; 0: none is followed */
	u64 stall_ns; /* since then without room; 0: there is room */
	u64 sampled_ns; /* when round_trip had its last sample */
	u32 unread_position;
	u32 service;
	u32 tgid; /* that opened it */
	u32 tid;
	u32 opened_port; /* its local port, counted in opened_ports; 0: not opened by a target, or not yet */
	u32 revision; /* of the targets, when `service` was looked up */
};

/* struct sock * -> watched_socket; deleted when the socket is destroyed. User space sets the size from the configuration. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u64);
	__type(value, struct watched_socket);
} sockets SEC(".maps");

/* local port -> how many sockets, of any network namespace, a target has connected from there */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 65536);
	__type(key, u32);
	__type(value, u32);
} opened_ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 18);
} tcp_events_ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(u32));
} tcp_events_perf SEC(".maps");

/* User space takes its numpy type from BTF, which holds only the types that a variable or a map has. */
struct tcp_event event_type SEC(".rodata.types");
enum tcp_event_kind event_kind_type SEC(".rodata.types");

/* ---- whose socket it is ---- */

/* Its process or its port may belong to another service now. Of an opener that is no target any more it stays as it was. */
static __noinline void find_service_again(struct watched_socket *socket, const struct sock *sk)
{
	u32 *service;

	socket->revision = revision_now();
	service = socket->tgid ? service_of_process(socket->tgid) : service_of_socket(sk);
	if (service)
		socket->service = *service;
}

static __always_inline struct watched_socket *known_socket(const struct sock *sk)
{
	u64 key = (u64)sk;
	struct watched_socket *socket = bpf_map_lookup_elem(&sockets, &key);

	if (socket && socket->revision != revision_now())
		find_service_again(socket, sk);
	return socket;
}

/* False for nearly every socket of the host. Only for a `sk` that the verifier knows: it is read without a helper. */
static __always_inline bool maybe_watched(const struct sock *sk)
{
	u32 port = sk->__sk_common.skc_num;
	u8 *listening = bpf_map_lookup_elem(&port_bits, &port);
	u32 *opened;

	if (listening && *listening)
		return true;
	opened = bpf_map_lookup_elem(&opened_ports, &port);
	return opened && *opened;
}

/* The entry of a socket of a service, a new one where there is none yet. NULL: no service's, or counted as not followed. */
static __always_inline struct watched_socket *watched_socket_of(const struct sock *sk)
{
	struct watched_socket *socket, fresh = {};
	u64 key = (u64)sk;
	u32 *service;

	if (!maybe_watched(sk))
		return NULL;
	socket = known_socket(sk);
	if (socket)
		return socket;
	fresh.revision = revision_now();
	service = service_of_socket(sk);
	if (!service)
		return NULL;
	fresh.service = *service;
	if (bpf_map_update_elem(&sockets, &key, &fresh, BPF_ANY)) {
		count(CNT_SOCKETS_FULL);
		return NULL;
	}
	return bpf_map_lookup_elem(&sockets, &key);
}

/* The service of a socket that may be in SYN_SENT or TCP_CLOSE, where its port says nothing; for rare events. */
static __always_inline u32 *service_of_any(const struct sock *sk)
{
	struct watched_socket *socket = known_socket(sk);

	return socket ? &socket->service : service_of_socket(sk);
}

static __always_inline u32 *service_of_port(const struct net *net, u32 port)
{
	u8 *bit = bpf_map_lookup_elem(&port_bits, &port);
	struct port_key key = { .port = port };

	if (!bit || !*bit)
		return NULL;
	key.netns = BPF_CORE_READ(net, ns.inum);
	return bpf_map_lookup_elem(&ports, &key);
}

static __always_inline void forget(const struct sock *sk)
{
	struct watched_socket *socket = known_socket(sk);
	u64 key = (u64)sk;
	u32 port, *opened;

	if (!socket)
		return;
	port = socket->opened_port;
	if (bpf_map_delete_elem(&sockets, &key) || !port)
		return;
	opened = bpf_map_lookup_elem(&opened_ports, &port);
	if (opened)
		__sync_fetch_and_add(opened, -1);
}

/* ---- what leaves ---- */

/* From `then` to `now`. False where the clock of this CPU is behind that of another one, which is counted. */
static __always_inline bool passed(u64 then, u64 now, u64 *duration)
{
	*duration = now - then;
	if (now >= then)
		return true;
	count(CNT_CLOCK_BACKWARDS);
	return false;
}

/* An event on `sk`, zeroed but for what the socket says. */
static __always_inline struct tcp_event event_of(const struct sock *sk, u32 service, u32 kind)
{
	struct tcp_event event = {
		.service = service,
		.kind = kind,
		.family = BPF_CORE_READ(sk, __sk_common.skc_family),
		.local_port = bpf_ntohs(BPF_CORE_READ((const struct inet_sock *)sk, inet_sport)),
		.peer_port = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport)),
	};

	if (event.family == AF_INET6)
		BPF_CORE_READ_INTO(&event.peer, sk, __sk_common.skc_v6_daddr);
	else
		BPF_CORE_READ_INTO((__be32 *)event.peer, sk, __sk_common.skc_daddr);
	return event;
}

static __always_inline void send_event(void *ctx, struct tcp_event *event)
{
	if (!event->at_ns)
		event->at_ns = bpf_ktime_get_ns();
	send_record(ctx, &tcp_events_ring, &tcp_events_perf, event, sizeof(*event), CNT_SEEN_TCP_EVENTS,
		    CNT_LOST_TCP_EVENTS_RING_FULL);
}

/* ---- connections that a target opens ---- */

static __always_inline void begin_connect(const struct sock *sk)
{
	u64 key = (u64)sk, who = bpf_get_current_pid_tgid();
	struct watched_socket fresh = { .tgid = who >> 32, .tid = (u32)who, .revision = revision_now() };
	u32 *service = service_of_task();

	forget(sk); /* an earlier life of the memory, whose end was missed, or the same socket connects again */
	if (!service)
		return;
	fresh.service = *service;
	fresh.connect_ns = bpf_ktime_get_ns();
	if (bpf_map_update_elem(&sockets, &key, &fresh, BPF_ANY))
		count(CNT_SOCKETS_FULL);
}

static __always_inline void end_connect(void *ctx, const struct sock *sk)
{
	struct watched_socket *socket = known_socket(sk);
	struct tcp_stats *counters;
	struct tcp_event event;
	u32 port, *opened;
	u64 then;

	if (!socket || !socket->connect_ns)
		return;
	then = socket->connect_ns;
	socket->connect_ns = 0;
	port = sk->__sk_common.skc_num;
	opened = bpf_map_lookup_elem(&opened_ports, &port);
	if (opened) {
		__sync_fetch_and_add(opened, 1);
		socket->opened_port = port;
	}
	event = event_of(sk, socket->service, TCP_CONNECTED);
	event.at_ns = bpf_ktime_get_ns();
	event.tgid = socket->tgid;
	event.tid = socket->tid;
	if (!passed(then, event.at_ns, &event.duration_ns))
		return;
	counters = stats_of(&stats, event.service);
	if (counters)
		observe_atomic(&counters->connect, event.duration_ns);
	send_event(ctx, &event);
}

/*
 * The ends that tell_end() knows come twice: the kernel leaves a program out while it runs on that CPU already, and an
 * interrupt that comes meanwhile may end another connect. When one of the two is interrupted the other one runs; else it
 * finds nothing left to do. A connect begins in a task, which no interrupt does.
 */
static __always_inline void tell_end(void *ctx, const struct sock *sk, int old_state, int new_state)
{
	if (old_state == TCP_SYN_SENT && new_state == TCP_ESTABLISHED)
		end_connect(ctx, sk);
	else if (old_state == TCP_SYN_SENT && new_state == TCP_CLOSE)
		forget(sk);
	else if (new_state == TCP_ESTABLISHED && maybe_watched(sk))
		forget(sk); /* begins now: what is known is of an earlier life of the memory */
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(state_changed, const struct sock *sk, int old_state, int new_state)
{
	if (new_state == TCP_SYN_SENT)
		begin_connect(sk);
	else
		tell_end(ctx, sk, old_state, new_state);
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(state_changed_again, const struct sock *sk, int old_state, int new_state)
{
	tell_end(ctx, sk, old_state, new_state);
	return 0;
}

/* Not at TCP_CLOSE: a service that resets a connection closes it first, and whose the reset is must be known still. */
SEC("tp_btf/tcp_destroy_sock")
int BPF_PROG(destroyed, struct sock *sk)
{
	forget(sk);
	return 0;
}

SEC("tp_btf/tcp_destroy_sock")
int BPF_PROG(destroyed_again, struct sock *sk)
{
	forget(sk);
	return 0;
}

/* ---- bytes that come ---- */

/* A segment of an established connection, before TCP looks at it. */
SEC("tp_btf/tcp_probe")
int BPF_PROG(segment_arrived, struct sock *sk, const struct sk_buff *skb)
{
	const struct tcp_sock *tcp = (const struct tcp_sock *)sk;
	struct watched_socket *socket = watched_socket_of(sk);
	u32 size, header_bytes, first, next, round_trip;
	struct tcp_stats *counters;
	struct tcp_header header;
	u64 now;

	if (!socket)
		return 0;
	now = bpf_ktime_get_ns();
	if ((s64)(now - socket->sampled_ns) >= ROUND_TRIP_PERIOD_NS) {
		round_trip = BPF_CORE_READ(tcp, srtt_us);
		counters = stats_of(&stats, socket->service);
		if (round_trip && counters) {
			socket->sampled_ns = now;
			observe_atomic(&counters->round_trip, (u64)round_trip * SRTT_UNIT_NS);
		}
	}
	if (socket->unread_ns || bpf_probe_read_kernel(&header, sizeof(header), skb->data))
		return 0;
	header_bytes = (header.doff_reserved >> 4) * 4;
	size = skb->len;
	if (size <= header_bytes)
		return 0; /* an acknowledgement, no data */
	first = bpf_ntohl(header.seq);
	next = BPF_CORE_READ(tcp, rcv_nxt);
	if ((s32)(first - next) > 0 || (s32)(first + (size - header_bytes) - next) <= 0)
		return 0; /* behind a hole, where nobody can read it yet, or a second time */
	socket->unread_position = next;
	socket->unread_ns = now;
	return 0;
}

/* The application has taken bytes from the receive queue, or looked at them and left them there. */
SEC("tp_btf/tcp_rcv_space_adjust")
int BPF_PROG(bytes_read, struct sock *sk)
{
	struct watched_socket *socket;
	struct tcp_stats *counters;
	u64 then, delay;

	if (!maybe_watched(sk))
		return 0;
	socket = known_socket(sk);
	if (!socket || !socket->unread_ns)
		return 0;
	if ((s32)(BPF_CORE_READ((const struct tcp_sock *)sk, copied_seq) - socket->unread_position) <= 0)
		return 0;
	then = socket->unread_ns;
	socket->unread_ns = 0;
	if (!passed(then, bpf_ktime_get_ns(), &delay))
		return 0;
	counters = stats_of(&stats, socket->service);
	if (counters)
		observe_atomic(&counters->receive_queue, delay);
	return 0;
}

/* ---- bytes that go ---- */

/* A call that sends has its result. For every kind of socket. */
SEC("tp_btf/sock_send_length")
int BPF_PROG(sent, struct sock *sk, int result, int flags)
{
	struct watched_socket *socket;
	struct tcp_stats *counters;
	struct tcp_event event;
	u64 who, then;
	bool full;

	if (!maybe_watched(sk) || sk->sk_protocol != IPPROTO_TCP)
		return 0;
	full = no_room(sk, result);
	socket = full ? watched_socket_of(sk) : known_socket(sk);
	if (!socket)
		return 0;
	if (result > 0 && socket->stall_ns) {
		then = socket->stall_ns;
		socket->stall_ns = 0;
		who = bpf_get_current_pid_tgid();
		event = event_of(sk, socket->service, TCP_SEND_STALL);
		event.at_ns = bpf_ktime_get_ns();
		event.tgid = who >> 32;
		event.tid = (u32)who;
		if (passed(then, event.at_ns, &event.duration_ns)) {
			counters = stats_of(&stats, event.service);
			if (counters)
				observe_atomic(&counters->send_stall, event.duration_ns);
			send_event(ctx, &event);
		}
	}
	if (full && !socket->stall_ns)
		socket->stall_ns = bpf_ktime_get_ns();
	return 0;
}

SEC("tp_btf/tcp_retransmit_skb")
int BPF_PROG(retransmitted, const struct sock *sk, const struct sk_buff *skb)
{
	struct tcp_stats *counters;
	struct tcp_event event;
	u32 *service;

	/* Newer kernels tell those that did not go out, too, with the error as a third argument. */
	if (bpf_core_field_exists(struct trace_event_raw_tcp_retransmit_skb, err) && (int)ctx[2])
		return 0;
	service = service_of_any(sk);
	counters = service ? stats_of(&stats, *service) : NULL;
	if (!counters)
		return 0;
	__sync_fetch_and_add(&counters->retransmits, 1);
	event = event_of(sk, *service, TCP_RETRANSMIT);
	send_event(ctx, &event);
	return 0;
}

/* ---- resets ---- */

SEC("tp_btf/tcp_receive_reset")
int BPF_PROG(reset_received, struct sock *sk)
{
	u32 *service = service_of_any(sk);
	struct tcp_stats *counters = service ? stats_of(&stats, *service) : NULL;
	struct tcp_event event;

	if (!counters)
		return 0;
	__sync_fetch_and_add(&counters->resets_received, 1);
	event = event_of(sk, *service, TCP_RESET_RECEIVED);
	send_event(ctx, &event);
	return 0;
}

/* Who sent the packet `skb`, as the peer of `event`; the ports are in `tcp`. */
static __always_inline void read_sender(struct tcp_event *event, const struct sk_buff *skb,
					const struct tcp_header *tcp)
{
	const u8 *ip = BPF_CORE_READ(skb, head) + BPF_CORE_READ(skb, network_header);
	u8 version = 0;

	bpf_probe_read_kernel(&version, sizeof(version), ip);
	event->local_port = bpf_ntohs(tcp->dest);
	event->peer_port = bpf_ntohs(tcp->source);
	__builtin_memset(event->peer, 0, sizeof(event->peer));
	if (version >> 4 == 6) {
		event->family = AF_INET6;
		bpf_probe_read_kernel(event->peer, 16, ip + 8);
	} else {
		event->family = AF_INET;
		bpf_probe_read_kernel(event->peer, 4, ip + 12);
	}
}

/*
 * `sk` may be NULL, or in TIME_WAIT, and may have put back its port; `skb` is the packet that is refused, and NULL when the
 * reset answers none. Both go through memory, for the verifier of Linux 6.2 to 6.12 takes them for never NULL and drops
 * the tests.
 */
SEC("tp_btf/tcp_send_reset")
int BPF_PROG(reset_sent)
{
	const struct sk_buff *skb = NULL;
	const struct sock *sk = NULL;
	struct tcp_event event = {};
	struct tcp_stats *counters;
	struct tcp_header header;
	const struct net *net;
	u32 *service = NULL;
	u64 who;

	bpf_probe_read_kernel(&sk, sizeof(sk), &ctx[0]);
	bpf_probe_read_kernel(&skb, sizeof(skb), &ctx[1]);
	if (skb) {
		if (bpf_probe_read_kernel(&header, sizeof(header),
					  BPF_CORE_READ(skb, head) + BPF_CORE_READ(skb, transport_header)))
			return 0;
		net = sk ? BPF_CORE_READ(sk, __sk_common.skc_net.net) : BPF_CORE_READ(skb, dev, nd_net.net);
		service = service_of_port(net, bpf_ntohs(header.dest));
	} else if (sk) {
		net = BPF_CORE_READ(sk, __sk_common.skc_net.net);
		service = service_of_port(net, bpf_ntohs(BPF_CORE_READ((const struct inet_sock *)sk, inet_sport)));
	}
	if (!service && sk)
		service = service_of_any(sk);
	counters = service ? stats_of(&stats, *service) : NULL;
	if (!counters)
		return 0;
	__sync_fetch_and_add(&counters->resets_sent, 1);
	if (skb) {
		event.service = *service;
		event.kind = TCP_RESET_SENT;
		read_sender(&event, skb, &header);
	} else {
		event = event_of(sk, *service, TCP_RESET_SENT);
		/* a task closes the socket before it resets; a timer, or who kills another's socket, resets first */
		if (BPF_CORE_READ(sk, __sk_common.skc_state) == TCP_CLOSE) {
			who = bpf_get_current_pid_tgid();
			event.tgid = who >> 32;
			event.tid = (u32)who;
		}
	}
	send_event(ctx, &event);
	return 0;
}
