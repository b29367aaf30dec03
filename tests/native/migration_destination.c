// SPDX-License-Identifier: MIT
/* The destination's threads, the guest's, and those of a looker-on and of a bad line. */
#define _GNU_SOURCE
#include "migration_rig.h"

#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "be.h"
#include "bitmap.h"

enum { TYPE_PART = 2, TYPE_COMMAND = 8 };
enum { CMD_PACKAGED = 6, PONG_PACKAGE = 3 };

void *rig_listen_thread(void *rig)
{
	struct rig *r = rig;

	r->listen_ret = dst_listen_loop(r->dst);
	return NULL;
}

static void *urgent_thread(void *rig)
{
	struct rig *r = rig;

	r->urgent_ret = dst_urgent_loop(r->dst);
	return NULL;
}

static void *fault_thread(void *rig)
{
	struct rig *r = rig;

	r->fault_ret = dst_fault_loop(r->dst);
	return NULL;
}

static void *toucher_thread(void *toucher)
{
	const struct rig_toucher *t = toucher;
	struct rig *r = t->rig;
	uint32_t me = t->index;
	uint64_t rng = me * 7919 + 1;

	for (uint32_t n = 0; n < r->o.touches && !atomic_load(&r->cancelled); n++) {
		uint32_t index = n % 5 == 4;
		struct rig_block *b = &r->blocks[index];
		uint64_t page;
		int ret;

		rng = rng * 6364136223846793005u + 1442695040888963407u;
		page = (rng >> 33) % b->pages;
		/* Every eighth page is read by all, the others belong to one. */
		if (page % 8)
			page -= page % 8 - 1 - me;
		if (page >= b->pages)
			continue;
		ret = rig_touch(r, index, page);
		CHECK(ret);
		atomic_fetch_add(&r->touched, 1);
		if (ret < 0) {
			atomic_fetch_add(&r->lost, 1);
			return NULL;	/* the vCPU is parked */
		}
		if (page % 8)
			rig_fill(r, b->dst + page * PAGE, index, page, ++b->version[page]);
	}
	return NULL;
}

void rig_start_touchers(struct rig *r)
{
	for (uint32_t i = 0; i < RIG_TOUCHERS; i++) {
		r->touchers[i].rig = r;
		r->touchers[i].index = i;
		CHECK(!pthread_create(&r->touchers[i].thread, NULL, toucher_thread, &r->touchers[i]));
	}
}

void rig_join_touchers(struct rig *r)
{
	for (uint32_t i = 0; i < RIG_TOUCHERS; i++)
		pthread_join(r->touchers[i].thread, NULL);
}

void rig_start_fault(struct rig *r)
{
	uint64_t drained;

	(void)!read(r->stop_fd, &drained, sizeof(drained));
	CHECK(!pthread_create(&r->fault, NULL, fault_thread, r));
}

void rig_stop_fault(struct rig *r)
{
	uint64_t one = 1;

	CHECK(write(r->stop_fd, &one, sizeof(one)) == sizeof(one));
	pthread_join(r->fault, NULL);
	CHECK(r->fault_ret == 0);
}

static int load_package(struct rig *r, uint32_t length)
{
	uint8_t *blob = rig_alloc(length);
	size_t at = 0;
	int ret = chan_read(r->dst_ch, blob, length);

	for (uint32_t i = 0; i < RIG_BLOCKS && !ret; i++) {
		struct rig_block *b = &r->blocks[i];
		uint64_t *dirty = rig_bits(b->pages), first = 0, end;

		memcpy(dirty, blob + at, BITMAP_WORDS(b->pages) * 8);
		at += BITMAP_WORDS(b->pages) * 8;
		while ((first = bitmap_next_set(dirty, b->pages, first)) < b->pages) {
			end = bitmap_next_clear(dirty, b->pages, first);
			rig_discard(b, first, end - first);
			first = end;
		}
		free(dirty);
	}
	free(blob);
	return ret;
}

static void listen_now(struct rig *r)
{
	rig_register(r);
	dst_start_postcopy(r->dst, r->uffd, r->stop_fd, r->o.run_alone ? r->run_fd : -1, gettid(),
			   (uintptr_t)&r->pending, 0);
	rig_start_fault(r);
	CHECK(!pthread_create(&r->listen, NULL, rig_listen_thread, r));
	if (r->o.urgent)
		CHECK(!pthread_create(&r->urgent, NULL, urgent_thread, r));
	r->listening = true;
}

/* Device load, acknowledgement, RUN. */
static int start_guest(struct rig *r)
{
	if (r->o.touch_in_device_load)
		for (uint64_t page = 0; page < r->blocks[1].pages; page += 13)
			CHECK(rig_touch(r, 1, page));
	CHECK(dst_pong(r->dst, PONG_PACKAGE) >= 0 || r->o.tamper);
	if (r->o.run_alone) {
		struct pollfd p = { .fd = r->run_fd, .events = POLLIN };

		/* A tampered stream may never bring RUN: the test ends that wait by the same descriptor. */
		while (poll(&p, 1, -1) < 0)
			;
	}
	dst_set_running(r->dst);
	rig_start_touchers(r);
	atomic_store(&r->go, true);
	return 0;
}

static int read_stream(struct rig *r)
{
	uint8_t head[8];
	int ret;

	for (;;) {
		ret = chan_read(r->dst_ch, head, 5);
		if (ret < 0)
			return ret;
		if (head[0] == TYPE_PART) {
			CHECK(get_be32(head + 1) == RIG_SECTION);
			ret = dst_load_ram(r->dst);
			if (ret >= 0)
				ret = chan_read(r->dst_ch, head, 5);
			if (ret < 0)
				return ret;
			CHECK(head[0] == 0x7e);
			continue;
		}
		CHECK(head[0] == TYPE_COMMAND && get_be16(head + 1) == CMD_PACKAGED);
		ret = chan_read(r->dst_ch, head, 4);
		if (ret >= 0)
			ret = load_package(r, get_be32(head));
		if (ret < 0)
			return ret;
		listen_now(r);
		return start_guest(r);
	}
}

void *rig_main_thread(void *rig)
{
	struct rig *r = rig;

	r->main_ret = read_stream(r);
	return NULL;
}

/* Somebody who looks at the figures all the time, as a monitor may. */
void *rig_monitor_thread(void *rig)
{
	struct rig *r = rig;
	struct src_stats from;
	struct dst_stats to;
	uint64_t last = 0, bytes = 0;

	while (!atomic_load(&r->monitor_stop)) {
		src_get_stats(r->src, &from);
		dst_get_stats(r->dst, &to);
		CHECK(to.pages_normal + to.pages_zero >= last);
		last = to.pages_normal + to.pages_zero;
		CHECK(chan_bytes_received(r->dst_ch) >= bytes);
		bytes = chan_bytes_received(r->dst_ch);
		(void)chan_bytes_sent(r->src_ch);
		(void)src_dirty_pages(r->src);
		(void)dst_missing_pages(r->dst);
		sched_yield();
	}
	return NULL;
}

void *rig_pump_thread(void *rig)
{
	struct rig *r = rig;
	static const size_t room = 64 << 10;
	uint8_t *buf = rig_alloc(room);
	struct pollfd p[2] = { { .fd = r->fds[2], .events = POLLIN }, { .fd = r->fds[3], .events = POLLIN } };
	uint64_t done = 0;
	bool open = true;

	while (open && poll(p, 2, -1) > 0) {
		for (int i = 0; i < 2 && open; i++) {
			ssize_t n = p[i].revents ? read(p[i].fd, buf, room) : -1;

			if (!p[i].revents)
				continue;
			if (i == 0 && n > 0 && done <= r->o.tamper->at && r->o.tamper->at < done + (uint64_t)n) {
				if (r->o.tamper->cut)
					n = (ssize_t)(r->o.tamper->at - done);
				else
					buf[r->o.tamper->at - done] ^= r->o.tamper->mask;
				open = !r->o.tamper->cut;
			}
			done += i == 0 && n > 0 ? (uint64_t)n : 0;
			for (ssize_t at = 0, put; at < n; at += put) {
				put = send(p[1 - i].fd, buf + at, (size_t)(n - at), MSG_NOSIGNAL);
				if (put <= 0)
					break;
			}
			open &= n > 0;
		}
	}
	shutdown(r->fds[2], SHUT_RDWR);
	shutdown(r->fds[3], SHUT_RDWR);
	free(buf);
	return NULL;
}
