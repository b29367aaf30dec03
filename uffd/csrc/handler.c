// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "handler.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "place.h"
#include "ranges.h"
#include "uffd.h"

enum { BATCH = 64 };

/* A deferred fault is retried after this pause if no message arrived meanwhile. */
static const struct timespec RETRY_PAUSE = { .tv_nsec = 100 * 1000 };

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

int fault_handler_init(struct fault_handler *h, int uffd, int stop_fd, int notify_fd,
		       const struct fault_range *ranges, uint32_t count, uint32_t flags)
{
	uint64_t page = 4096;
	int rc;

	memset(h, 0, sizeof(*h));
	sem_init(&h->begun, 0, 0);
	h->uffd = uffd;
	h->stop_fd = stop_fd;
	h->notify_fd = notify_fd;
	h->flags = flags;
	rc = ranges_init(h, ranges, count);
	if (rc < 0)
		goto fail;
	for (uint32_t i = 0; i < count; i++) {
		if (h->staging_len < ranges[i].unit)
			h->staging_len = ranges[i].unit;
		if (page < ranges[i].page_size)
			page = ranges[i].page_size;
	}
	rc = -ENOMEM;
	h->queue = calloc(FAULT_QUEUE_MAX, sizeof(*h->queue));
	h->events = calloc(FAULT_EVENTS_MAX, sizeof(*h->events));
	h->staging = aligned_alloc(4096, h->staging_len ? h->staging_len : 4096);
	h->zeros = calloc(1, page);
	if (!h->queue || !h->events || !h->staging || !h->zeros)
		goto fail;
	return 0;
fail:
	fault_handler_deinit(h);
	return rc;
}

void fault_handler_deinit(struct fault_handler *h)
{
	ranges_deinit(h);
	free(h->queue);
	free(h->events);
	free(h->staging);
	free(h->zeros);
	memset(h, 0, sizeof(*h));
}

void fault_handler_stats(const struct fault_handler *h, struct fault_stats *out)
{
	const uint64_t *from = (const uint64_t *)&h->stats;
	uint64_t *to = (uint64_t *)out;

	for (size_t i = 0; i < sizeof(*out) / sizeof(*to); i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}

static bool push_event(struct fault_handler *h, const struct uffd_msg *msg)
{
	uint32_t head = h->events_head;
	uint64_t one = 1;

	if (head - __atomic_load_n(&h->events_tail, __ATOMIC_ACQUIRE) == FAULT_EVENTS_MAX) {
		place_count(&h->stats.events_dropped, 1);
		return false;
	}
	h->events[head % FAULT_EVENTS_MAX] = *msg;
	__atomic_store_n(&h->events_head, head + 1, __ATOMIC_RELEASE);
	if (h->notify_fd >= 0 && write(h->notify_fd, &one, sizeof(one)) < 0)
		return true;	/* the counter is saturated, so the reader is awake anyway */
	return true;
}

uint32_t fault_handler_take_events(struct fault_handler *h, struct uffd_msg *out, uint32_t max)
{
	uint32_t tail = h->events_tail;
	uint32_t head = __atomic_load_n(&h->events_head, __ATOMIC_ACQUIRE);
	uint32_t n = 0;

	while (n < max && tail != head)
		out[n++] = h->events[tail++ % FAULT_EVENTS_MAX];
	__atomic_store_n(&h->events_tail, tail, __ATOMIC_RELEASE);
	return n;
}

static void enqueue(struct fault_handler *h, const struct uffd_msg *msg)
{
	uint64_t address = msg->arg.pagefault.address;

	if (h->queued == FAULT_QUEUE_MAX) {
		/* No room to remember it: the kernel remembers for us. */
		place_wake(h, address & ~4095ull, 4096);
		return;
	}
	h->queue[h->queued++] = (struct fault_item){
		.address = address,
		.flags = (uint32_t)msg->arg.pagefault.flags,
		.tid = msg->arg.pagefault.feat.ptid,
		.since_ns = now_ns(),
	};
	if (h->pending)
		pending_add(h->pending, address, msg->arg.pagefault.feat.ptid);
}

static int apply_event(struct fault_handler *h, const struct uffd_msg *msg)
{
	int rc = 0;

	switch (msg->event) {
	case UFFD_EVENT_REMOVE:
		place_count(&h->stats.removes, 1);
		ranges_mark_removed(h, msg->arg.remove.start, msg->arg.remove.end);
		break;
	case UFFD_EVENT_UNMAP:
		place_count(&h->stats.unmaps, 1);
		rc = ranges_drop(h, msg->arg.remove.start, msg->arg.remove.end);
		break;
	case UFFD_EVENT_REMAP:
		place_count(&h->stats.remaps, 1);
		rc = ranges_move(h, msg->arg.remap.from, msg->arg.remap.to, msg->arg.remap.len);
		break;
	case UFFD_EVENT_FORK:
		place_count(&h->stats.forks, 1);
		break;
	}
	push_event(h, msg);
	return rc;
}

/* Read until the kernel has nothing more, so that events overtaken by faults are seen in time. */
static int drain(struct fault_handler *h)
{
	struct uffd_msg msgs[BATCH];
	int64_t got;
	int rc;

	do {
		got = uffd_read(h->uffd, msgs, BATCH);
		for (int64_t i = 0; i < got; i++) {
			if (msgs[i].event == UFFD_EVENT_PAGEFAULT) {
				enqueue(h, &msgs[i]);
				continue;
			}
			rc = apply_event(h, &msgs[i]);
			if (rc < 0)
				return rc;
		}
	} while (got == BATCH && h->queued < FAULT_QUEUE_MAX);
	return got < 0 ? (int)got : 0;
}

static void pass_on(struct fault_handler *h, const struct fault_item *f)
{
	struct uffd_msg msg = { .event = UFFD_EVENT_PAGEFAULT };

	msg.arg.pagefault.flags = f->flags;
	msg.arg.pagefault.address = f->address;
	msg.arg.pagefault.feat.ptid = f->tid;
	if (push_event(h, &msg))
		place_count(&h->stats.passed_on, 1);
	else
		place_wake(h, f->address & ~4095ull, 4096);
}

static void note_latency(struct fault_handler *h, uint64_t since_ns)
{
	uint64_t ns = now_ns() - since_ns;
	uint32_t bucket = 63u - (uint32_t)__builtin_clzll(ns | 1);

	place_count(&h->stats.serve_ns_total, ns);
	if (ns > h->stats.serve_ns_max)
		__atomic_store_n(&h->stats.serve_ns_max, ns, __ATOMIC_RELAXED);
	if (bucket >= FAULT_LATENCY_BUCKETS)
		bucket = FAULT_LATENCY_BUCKETS - 1;
	place_count(&h->stats.latency[bucket], 1);
}

/* 0 settled, -EAGAIN try again after reading events, other -errno: the page cannot be had. */
static int serve(struct fault_handler *h, const struct fault_item *f, uint64_t *start_out,
		 uint64_t *len_out)
{
	struct fault_range *r = ranges_find(h, f->address);
	bool minor = f->flags & UFFD_ABI_FAULT_MINOR;
	uint64_t unit, offset, len, run;
	int rc;

	*len_out = 0;
	if (!r || f->flags & (UFFD_ABI_FAULT_WP | UFFD_ABI_FAULT_RWP)) {
		pass_on(h, f);
		return 0;
	}
	/* A file's page is mapped one by one: the neighbours may not be in the file. */
	unit = minor || r->kind == FAULT_SOURCE_PAGE_CACHE ? r->page_size : r->unit;
	offset = (f->address - r->start) / unit * unit;
	len = unit < r->len - offset ? unit : r->len - offset;
	*start_out = r->start + offset;
	*len_out = len;
	if (r->kind == FAULT_SOURCE_FETCH && !minor &&
	    !(ranges_removed_run(r, r->start + offset, len, &run) && run >= len)) {
		rc = h->fetch ? h->fetch(h->context, r->source + offset, h->staging, len) : -ENOSYS;
		if (rc < 0)
			return rc == -EAGAIN ? -EIO : rc;
	}
	rc = place_chunk(h, r, r->start + offset, len, minor);
	if (rc == -ENOENT) {
		place_count(&h->stats.vanished, 1);
		place_wake(h, r->start + offset, len);
		rc = 0;
	}
	return rc;
}

static bool within(uint64_t address, uint64_t start, uint64_t len)
{
	return address - start < len;
}

/* Faults read in the same round on the chunk just placed: its placement has woken them. */
static void settle_duplicates(struct fault_handler *h, uint32_t from, uint64_t start, uint64_t len)
{
	const uint32_t unlike = UFFD_ABI_FAULT_WP | UFFD_ABI_FAULT_RWP;

	for (uint32_t i = from; i < h->queued; i++) {
		struct fault_item *f = &h->queue[i];

		if (f->done || f->flags & unlike || !within(f->address, start, len))
			continue;
		f->done = true;
		place_count(&h->stats.duplicates, 1);
		note_latency(h, f->since_ns);
	}
}

static int serve_queue(struct fault_handler *h)
{
	uint32_t kept = 0;
	int rc = 0;

	for (uint32_t i = 0; i < h->queued; i++) {
		struct fault_item f = h->queue[i];
		uint64_t start = 0, len = 0;

		if (f.done)
			continue;
		if (rc == 0)
			rc = serve(h, &f, &start, &len);
		if (rc < 0) {
			/* -EAGAIN holds for the whole context, so the rest waits as well. */
			if (rc != -EAGAIN && h->failed_address == 0)
				h->failed_address = f.address;
			h->queue[kept++] = f;
			continue;
		}
		if (len == 0)
			continue;	/* passed on */
		place_count(f.flags & UFFD_ABI_FAULT_MINOR ? &h->stats.minor : &h->stats.missing, 1);
		note_latency(h, f.since_ns);
		settle_duplicates(h, i + 1, start, len);
	}
	h->queued = kept;
	if (rc == -EAGAIN) {
		place_count(&h->stats.retries, 1);
		return 0;
	}
	return rc;
}

/* 1 go on, 0 stop, -errno. */
static int wait_for_work(struct fault_handler *h)
{
	struct pollfd fds[2] = {
		{ .fd = h->uffd, .events = POLLIN },
		{ .fd = h->stop_fd, .events = POLLIN },
	};
	int n;

	do {
		n = ppoll(fds, 2, h->queued ? &RETRY_PAUSE : NULL, NULL);
	} while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	if (fds[1].revents)
		return 0;
	/* A blocking userfaultfd answers POLLERR, always; so does one before its handshake. */
	return fds[0].revents & (POLLERR | POLLNVAL) ? -EBADF : 1;
}

void fault_handler_await_run(struct fault_handler *h)
{
	while (sem_wait(&h->begun) < 0 && errno == EINTR)
		;
}

int fault_handler_run(struct fault_handler *h)
{
	int rc;

	sem_post(&h->begun);
	h->failed_address = 0;
	for (uint32_t i = 0; i < h->range_count; i++)
		place_wake(h, h->ranges[i].start, h->ranges[i].len);
	do {
		rc = wait_for_work(h);
		if (rc <= 0)
			break;
		rc = drain(h);
		if (rc == 0)
			rc = serve_queue(h);
	} while (rc >= 0);
	/* Another reader, or the next run, hears of what is left. */
	for (uint32_t i = 0; i < h->queued; i++)
		uffd_wake(h->uffd, h->queue[i].address & ~4095ull, 4096);
	h->queued = 0;
	return rc;
}
