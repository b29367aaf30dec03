// SPDX-License-Identifier: MIT
#include "wpsync.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>

#include "access.h"
#include "bitmap.h"
#include "uffd.h"
#include "uffd_abi.h"

#define MESSAGES 32
#define PROTECT 1u
/* Target pages protected again under one hold of the lock: writers wait for it. */
#define TAKE_PAGES UINT64_C(4096)
/* Linux 5.14; older ones get each page read. */
#define POPULATE_READ 22

int wpsync_init(struct wpsync *w, int uffd, int stop_fd, struct wpsync_range *ranges, uint32_t count,
		uint32_t page_bits)
{
	memset(w, 0, sizeof(*w));
	w->uffd = uffd;
	w->stop_fd = stop_fd;
	w->ranges = ranges;
	w->count = count;
	w->page_bits = page_bits;
	if (sem_init(&w->begun, 0, 0))
		return -errno;
	return -pthread_mutex_init(&w->lock, NULL);
}

void wpsync_deinit(struct wpsync *w)
{
	pthread_mutex_destroy(&w->lock);
	sem_destroy(&w->begun);
}

static struct wpsync_range *find_range(struct wpsync *w, uint64_t address)
{
	for (uint32_t i = 0; i < w->count; i++)
		if (address - w->ranges[i].start < w->ranges[i].length)
			return &w->ranges[i];
	return NULL;
}

/* Set the bits of [offset, offset + length), of which the last huge page may lie beyond the bitmap. */
static void set_bits(const struct wpsync *w, struct wpsync_range *r, uint64_t offset, uint64_t length)
{
	uint64_t first = offset >> w->page_bits, last = (offset + length) >> w->page_bits;

	if (last > r->nbits)
		last = r->nbits;
	if (first < last)
		bitmap_set(r->written, first, last - first);
}

/* EAGAIN: the layout is changing under us, and what was asked has not been done. */
static int change(struct wpsync *w, uint64_t start, uint64_t length, uint64_t mode)
{
	int rc;

	do
		rc = uffd_writeprotect(w->uffd, start, length, mode);
	while (rc == -EAGAIN);
	return rc;
}

static void serve(struct wpsync *w, const struct uffd_msg *msg)
{
	uint64_t address = msg->arg.pagefault.address, page, unit = UINT64_C(1) << w->page_bits;
	struct wpsync_range *r;
	int rc = -ENOENT;

	if (msg->event != UFFD_EVENT_PAGEFAULT)
		return;
	r = find_range(w, address);
	if (r)
		unit = r->page_size;
	page = address & ~(unit - 1);
	__atomic_store_n(&w->waiting, 1, __ATOMIC_RELEASE);
	pthread_mutex_lock(&w->lock);
	__atomic_store_n(&w->waiting, 0, __ATOMIC_RELEASE);
	if (r) {
		set_bits(w, r, page - r->start, unit);
		rc = change(w, page, unit, 0);
	}
	w->faults++;
	pthread_mutex_unlock(&w->lock);
	/* Unmapped, or mapped anew, meanwhile: whoever sleeps here finds out by himself. */
	if (rc < 0)
		uffd_wake(w->uffd, page, unit);
}

static void let_all_go(struct wpsync *w)
{
	for (uint32_t i = 0; i < w->count; i++) {
		/* Parts that are gone do not matter. Unregistering wakes no writer: that is the next step. */
		uffd_unregister(w->uffd, w->ranges[i].start, w->ranges[i].length);
		uffd_wake(w->uffd, w->ranges[i].start, w->ranges[i].length);
	}
}

static int loop(struct wpsync *w)
{
	struct pollfd fds[2] = { { w->uffd, POLLIN, 0 }, { w->stop_fd, POLLIN, 0 } };
	struct uffd_msg messages[MESSAGES];

	for (;;) {
		int64_t n;

		if (poll(fds, 2, -1) < 0 && errno != EINTR)
			return -errno;
		if (fds[1].revents)
			return 0;
		n = uffd_read(w->uffd, messages, MESSAGES);
		if (n < 0)
			return (int)n;
		for (int64_t i = 0; i < n; i++)
			serve(w, &messages[i]);
	}
}

int wpsync_run(struct wpsync *w)
{
	int rc;

	sem_post(&w->begun);
	rc = loop(w);
	__atomic_store_n(&w->failed, rc, __ATOMIC_RELEASE);
	let_all_go(w);
	return rc;
}

void wpsync_await_run(struct wpsync *w)
{
	while (sem_wait(&w->begun) && errno == EINTR)
		;
}

/* Private memory on a kernel that protects no holes: make them zero pages, which it does protect. */
static int fill_holes(const struct wpsync *w, const struct wpsync_range *r, uint64_t start,
		      uint64_t length)
{
	uint64_t page = UINT64_C(1) << w->page_bits;
	uint8_t byte;

	if (!r->populate)
		return 0;
	if (madvise((void *)(uintptr_t)start, length, POPULATE_READ) == 0)
		return 0;
	if (errno != EINVAL)
		return -errno;
	for (uint64_t at = start; at < start + length; at += page)
		if (access_read(at, &byte, 1) < 0)
			return -EFAULT;
	return 0;
}

int wpsync_protect(struct wpsync *w, uint32_t index)
{
	const struct wpsync_range *r = &w->ranges[index];
	int rc = fill_holes(w, r, r->start, r->length);

	return rc < 0 ? rc : change(w, r->start, r->length, PROTECT);
}

static int protect_again(struct wpsync *w, const struct wpsync_range *r, uint64_t first, uint64_t count)
{
	uint64_t start = (first << w->page_bits) & ~(r->page_size - 1);
	uint64_t end = (((first + count) << w->page_bits) + r->page_size - 1) & ~(r->page_size - 1);
	int rc = fill_holes(w, r, r->start + start, end - start);

	return rc < 0 ? rc : change(w, r->start + start, end - start, PROTECT);
}

int64_t wpsync_take(struct wpsync *w, uint32_t first, uint32_t count, uint64_t *noted, uint64_t *into)
{
	struct wpsync_range *r = &w->ranges[first];
	uint64_t at = 0, fresh = 0;
	int rc = 0;

	pthread_mutex_lock(&w->lock);
	bitmap_take(r->written, noted, r->nbits);
	while (rc == 0) {
		uint64_t start, pages = bitmap_next_run(r->written, r->nbits, at, &start);

		if (!pages)
			break;
		if (pages > TAKE_PAGES)
			pages = TAKE_PAGES;
		for (uint32_t i = 0; i < count && rc == 0; i++)
			rc = protect_again(w, &w->ranges[first + i], start, pages);
		if (rc < 0)
			break;
		bitmap_clear(r->written, start, pages);
		fresh += bitmap_set_count(into, start, pages);
		at = start + pages;
		/*
		 * Writers wait for the handler, which may wait for this lock: let it have its turn. A
		 * mutex given up and taken at once would stay with who has it.
		 */
		pthread_mutex_unlock(&w->lock);
		while (__atomic_load_n(&w->waiting, __ATOMIC_ACQUIRE))
			sched_yield();
		pthread_mutex_lock(&w->lock);
	}
	pthread_mutex_unlock(&w->lock);
	if (rc == 0)
		rc = __atomic_load_n(&w->failed, __ATOMIC_ACQUIRE);
	return rc < 0 ? rc : (int64_t)fresh;
}

uint64_t wpsync_faults(struct wpsync *w)
{
	uint64_t faults;

	pthread_mutex_lock(&w->lock);
	faults = w->faults;
	pthread_mutex_unlock(&w->lock);
	return faults;
}
