// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * block: how long the disk I/O of each service takes, charged to the service that asked for it.
 *
 * Measured: for each request that a driver was given, the time from there to its completion: what `biolatency`
 * measures by default, without the wait in the I/O scheduler; the record has both (queued_ns). A flush is shared by
 * everybody who waits for it and the driver sees one of nobody, so its time is from asking to answer, and issued_ns is
 * when it was asked for. Failed I/O counts like any other. `bytes` of a discard are those given up, zeroed or erased;
 * zone commands count as discards.
 *
 * How: who asks is known when a bio is queued. Its block cgroup comes first: throttled bios are submitted by a kernel
 * thread when it is their turn, cgroup v2 writes back with the cgroup that made the page dirty, and swap-out carries
 * the owner of the page. User space names the cgroups that hold nothing but one service (`cgroups`). Else it is the
 * process that queues the bio. That is kept by bio until all its bytes are done; a request asks for its first bio when
 * it is issued, because by its completion the bios are gone, and whose task the completion interrupts means nothing. A
 * bio that was split off finds its parent in bi_private. What is queued or issued for nobody deletes the entry of its
 * address, so an entry whose end was not seen is never used.
 *
 * Not measured: time spent throttled by the block cgroup (queued_ns is 0 where a kernel thread submits; the scheduler
 * probe sees the sleep); bios merged into a request of somebody else, whose request it is; page-cache write-back under
 * cgroup v1, which the kernel charges to the root cgroup; devices that have no requests (brd, zram, pmem, the upper
 * device of dm and md: their lower one is measured, when it is reached in the asking task or its cgroup is known); the
 * inner I/O of a loop device, whose worker carries the cgroup of the outer request: the outer one is charged. Of a
 * request that was completed in part and given to the device again the last round counts.
 *
 * Linux 5.5 and later: 5.11 took the queue out of the arguments of two tracepoints, and both lists are known here.
 */
#include "service_stats.bpf.h"
#include "targets.bpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define ROOT_CGROUP 1 /* the id of every hierarchy's root */
#define MAX_BIOS 256 /* of one request that are followed; an entry past them stays until its address is used again */
#define BIO_CLONED 1 /* the number of the bit in bi_flags */
#define REQ_OP_MASK 0xff
#define REQ_OP_READ 0
#define REQ_OP_WRITE 1
#define REQ_OP_FLUSH 2
#define REQ_OP_ZONE_APPEND 7

struct block_stats {
	struct histogram io[BLOCK_MAX];
	u64 bytes[BLOCK_MAX];
};

/* CPU * service_count + service -> what that CPU saw complete; see service_stats.bpf.h */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct block_stats);
} stats SEC(".maps");

/* cgroup id -> the service that all its processes belong to; user space keeps it */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, u64);
	__type(value, u32);
} cgroups SEC(".maps");

/* struct bio * -> who asked; `bytes` are those not done yet. Deleted when there are none. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u64);
	__type(value, struct block_io);
} bios SEC(".maps");

/* struct request * -> the I/O under way, from issued to completed */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, u64);
	__type(value, struct block_io);
} requests SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 18);
} block_ios_ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(u32));
} block_ios_perf SEC(".maps");

/* BTF holds only the types that a variable or a map has. */
enum block_operation block_operation_type SEC(".rodata.types");

/*
 * The argument lists before Linux 5.11 (a54895fa057c, e8a676d61c07). libbpf finds two types of functions compatible when
 * they take as many arguments. To go when 5.10 is no longer supported.
 */
struct request_queue;
typedef void (*btf_trace_block_bio_queue___old)(void *, struct request_queue *, struct bio *);
typedef void (*btf_trace_block_rq_issue___old)(void *, struct request_queue *, struct request *);

static __always_inline u32 *service_of_cgroup(struct bio *bio)
{
	struct task_struct *task;
	u64 id;

	if (!bpf_core_field_exists(bio->bi_blkg) || !bio->bi_blkg)
		return NULL;
	id = bio->bi_blkg->blkcg->css.cgroup->kn->id;
	if (id <= ROOT_CGROUP)
		return NULL;
	task = (struct task_struct *)bpf_get_current_task();
	if (BPF_CORE_READ(task, flags) & PF_LOCAL_THROTTLE)
		return NULL; /* a loop device's worker */
	return bpf_map_lookup_elem(&cgroups, &id);
}

/* Says who asked for `bio`, which the running task queues. False: nobody that is watched. */
static __always_inline bool find_asker(struct bio *bio, struct block_io *io)
{
	u32 *by_task = service_of_task(), *by_cgroup = service_of_cgroup(bio);
	u64 who = bpf_get_current_pid_tgid();

	if (by_cgroup)
		io->service = *by_cgroup;
	else if (by_task)
		io->service = *by_task;
	else
		return false;
	if (by_task && *by_task == io->service) {
		io->tgid = who >> 32;
		io->tid = (u32)who;
		io->queued_ns = bpf_ktime_get_ns();
	}
	return true;
}

static __always_inline struct gendisk *disk_of(struct bio *bio)
{
	if (bpf_core_field_exists(bio->bi_disk))
		return BPF_CORE_READ(bio, bi_disk);
	return BPF_CORE_READ(bio, bi_bdev, bd_disk);
}

static __always_inline void set_device(struct block_io *io, struct bio *bio)
{
	struct gendisk *disk = disk_of(bio);

	io->device = (u32)BPF_CORE_READ(disk, major) << 20 | BPF_CORE_READ(disk, first_minor);
}

static __always_inline u8 operation_of(u32 flags)
{
	switch (flags & REQ_OP_MASK) {
	case REQ_OP_READ:
		return BLOCK_READ;
	case REQ_OP_WRITE:
	case REQ_OP_ZONE_APPEND:
		return BLOCK_WRITE;
	case REQ_OP_FLUSH:
		return BLOCK_FLUSH;
	default:
		return BLOCK_DISCARD;
	}
}

/* Counts the I/O, which is done, and sends its record. */
static __always_inline void finish(void *ctx, struct block_io *io)
{
	u32 operation = io->operation;
	struct block_stats *mine = stats_of(&stats, io->service);

	io->done_ns = bpf_ktime_get_ns();
	if (io->done_ns < io->issued_ns) {
		count(CNT_CLOCK_BACKWARDS);
		return;
	}
	if (mine && operation < BLOCK_MAX) {
		/* completions come in interrupts, and in tasks too */
		observe_atomic(&mine->io[operation], io->done_ns - io->issued_ns);
		__sync_fetch_and_add(&mine->bytes[operation], io->bytes);
	}
	send_record(ctx, &block_ios_ring, &block_ios_perf, io, sizeof(*io), CNT_SEEN_BLOCK_IOS,
		    CNT_LOST_BLOCK_IOS_RING_FULL);
}

static __always_inline int remember_asker(struct bio *bio)
{
	bool flush = operation_of(bio->bi_opf) <= BLOCK_FLUSH && !bio->bi_iter.bi_size;
	u64 key = (u64)bio;
	struct block_io io = {};

	/* dm makes clones of a flush for the devices below it: the one above is counted */
	if ((flush && (bio->bi_flags & (1 << BIO_CLONED))) || !find_asker(bio, &io)) {
		bpf_map_delete_elem(&bios, &key);
		return 0;
	}
	io.bytes = bio->bi_iter.bi_size;
	if (flush) {
		io.operation = BLOCK_FLUSH;
		io.issued_ns = bpf_ktime_get_ns();
		set_device(&io, bio);
	}
	if (bpf_map_update_elem(&bios, &key, &io, BPF_ANY))
		count(CNT_BLOCK_IOS_FULL);
	return 0;
}

/* Who asked for `bio`, or NULL; `key` is under which it stands: its own address, or that of the bio it was split from. */
static __always_inline struct block_io *asker_of(struct bio *bio, u64 *key)
{
	struct block_io *asker;

	*key = (u64)bio;
	asker = bpf_map_lookup_elem(&bios, key);
	if (asker)
		return asker;
	*key = (u64)bio->bi_private;
	return bpf_map_lookup_elem(&bios, key);
}

/* Forgets who asked for the next `done_bytes` of the request. Its parts may complete on several CPUs at once. */
static __always_inline void forget_askers(struct request *rq, u32 done_bytes)
{
	struct bio *bio = rq->bio;
	struct block_io *asker;
	u32 index, bytes;
	u64 key;

	for (index = 0; index < MAX_BIOS && bio && done_bytes; index++) {
		bytes = bio->bi_iter.bi_size;
		if (bytes > done_bytes)
			bytes = done_bytes;
		done_bytes -= bytes;
		asker = asker_of(bio, &key);
		if (asker && __sync_fetch_and_sub(&asker->bytes, bytes) <= bytes)
			bpf_map_delete_elem(&bios, &key);
		bio = bio->bi_next;
	}
}

static __always_inline int follow_request(struct request *rq)
{
	struct bio *bio = rq->bio;
	u64 key = (u64)rq, bio_key;
	struct block_io *asker = NULL, io;

	if (bio)
		asker = asker_of(bio, &bio_key);
	if (!asker) {
		bpf_map_delete_elem(&requests, &key);
		return 0;
	}
	io = *asker;
	io.operation = operation_of(rq->cmd_flags);
	io.bytes = rq->__data_len;
	set_device(&io, bio);
	io.issued_ns = bpf_ktime_get_ns();
	if (bpf_map_update_elem(&requests, &key, &io, BPF_ANY)) {
		count(CNT_BLOCK_IOS_FULL);
		forget_askers(rq, rq->__data_len); /* its completion will not know it */
	}
	return 0;
}

SEC("tp_btf/block_bio_queue")
int bio_queued(u64 *ctx)
{
	if (bpf_core_type_exists(btf_trace_block_bio_queue___old))
		return remember_asker((struct bio *)ctx[1]);
	return remember_asker((struct bio *)ctx[0]);
}

SEC("tp_btf/block_rq_issue")
int request_issued(u64 *ctx)
{
	if (bpf_core_type_exists(btf_trace_block_rq_issue___old))
		return follow_request((struct request *)ctx[1]);
	return follow_request((struct request *)ctx[0]);
}

/* A flush without data never is a request that a driver gets: its bio ends here, or in bio_completed() above dm and md. */
static __always_inline void finish_flush(void *ctx, u64 bio)
{
	struct block_io *known = bpf_map_lookup_elem(&bios, &bio), io;

	if (!known)
		return;
	io = *known;
	bpf_map_delete_elem(&bios, &bio);
	if (io.operation == BLOCK_FLUSH)
		finish(ctx, &io);
}

SEC("tp_btf/block_rq_complete")
int BPF_PROG(request_completed, struct request *rq, int error, unsigned int done_bytes)
{
	u64 key = (u64)rq;
	struct block_io *known, io;

	if (!rq->__data_len) {
		finish_flush(ctx, (u64)rq->bio);
		return 0;
	}
	known = bpf_map_lookup_elem(&requests, &key);
	if (!known && rq->bio == rq->biotail)
		return 0; /* nobody's; a merged request may hold bios of a service behind a stranger's */
	forget_askers(rq, done_bytes);
	if (!known || done_bytes < rq->__data_len)
		return 0; /* or only a part is done */
	io = *known;
	bpf_map_delete_elem(&requests, &key);
	finish(ctx, &io);
	return 0;
}

SEC("tp_btf/block_bio_complete")
int BPF_PROG(bio_completed, struct request_queue *queue, struct bio *bio)
{
	finish_flush(ctx, (u64)bio);
	return 0;
}
