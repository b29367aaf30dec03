// SPDX-License-Identifier: MIT
/* Both ends together: made, started, joined, freed. */
#define _GNU_SOURCE
#include "migration_rig.h"

#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "bitmap.h"

static struct chan *new_chan(int fd, bool framed)
{
	int err;
	struct chan *c = chan_new(fd, fd, true, &err);

	CHECK(c && !err);
	if (framed) {
		chan_set_read_framed(c);
		CHECK(chan_set_write_framed(c) == 0);
	}
	return c;
}

static void connect_ends(struct rig *r)
{
	int middle[2];

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, r->fds));
	r->fds[2] = r->fds[3] = r->urgent_fds[0] = r->urgent_fds[1] = -1;
	if (r->o.tamper) {
		CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, middle));
		r->fds[2] = r->fds[1];
		r->fds[3] = middle[0];
		r->fds[1] = middle[1];
	}
	r->src_ch = new_chan(r->fds[0], r->o.framed);
	r->dst_ch = new_chan(r->fds[1], r->o.framed);
	if (!r->o.urgent)
		return;
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, r->urgent_fds));
	r->src_urgent = new_chan(r->urgent_fds[0], r->o.framed);
	r->dst_urgent = new_chan(r->urgent_fds[1], r->o.framed);
}

void rig_init(struct rig *r, const struct rig_options *o)
{
	int err;

	memset(r, 0, sizeof(*r));
	r->o = *o;
	r->uffd = -1;
	connect_ends(r);
	r->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	r->run_fd = eventfd(0, EFD_CLOEXEC);
	pending_init(&r->pending);
	r->src = src_new(r->src_ch, RIG_BLOCKS, &err);
	CHECK(r->src && r->stop_fd >= 0 && r->run_fd >= 0);
	r->dst = dst_new(r->dst_ch, RIG_BLOCKS, o->memory == RIG_HUGETLB ? RIG_HUGE : PAGE, &err);
	CHECK(r->dst);
	for (uint32_t i = 0; i < RIG_BLOCKS; i++) {
		struct rig_block *b = &r->blocks[i];

		rig_block_init(r, i);
		CHECK(!src_set_block(r->src, i, b->id, (uintptr_t)b->src, b->bytes, b->page_size,
				     (uintptr_t)b->dirty));
		if (o->release)
			CHECK(!src_set_release(r->src, i, -1));
		CHECK(!dst_set_block(r->dst, i, b->id, (uintptr_t)b->dst, b->bytes, b->page_size,
				     (uintptr_t)b->received, (uintptr_t)b->requested, b->fd, b->fd >= 0,
				     o->memory == RIG_HUGETLB));
	}
	dst_seal(r->dst);
	src_set_ram_section(r->src, RIG_SECTION);
	dst_set_ram_section(r->dst, RIG_SECTION);
	src_set_hold(r->src, o->hold);
	src_set_rate(r->src, o->rate);
	if (o->urgent) {
		src_set_urgent_channel(r->src, r->src_urgent);
		dst_set_urgent_channel(r->dst, r->dst_urgent);
	}
}

void rig_start_source(struct rig *r)
{
	CHECK(!pthread_create(&r->return_path, NULL, rig_return_path_thread, r));
	CHECK(!pthread_create(&r->migration, NULL, rig_migration_thread, r));
}

static void start_monitor(struct rig *r)
{
	atomic_store(&r->monitor_stop, false);
	CHECK(!pthread_create(&r->monitor, NULL, rig_monitor_thread, r));
	r->has_monitor = true;
}

static void stop_monitor(struct rig *r)
{
	atomic_store(&r->monitor_stop, true);
	if (r->has_monitor)
		pthread_join(r->monitor, NULL);
	r->has_monitor = false;
}

void rig_start(struct rig *r)
{
	if (r->o.tamper) {
		CHECK(!pthread_create(&r->pump, NULL, rig_pump_thread, r));
		r->has_pump = true;
	}
	CHECK(!pthread_create(&r->main, NULL, rig_main_thread, r));
	rig_start_source(r);
	start_monitor(r);
}

void rig_reconnect(struct rig *r)
{
	struct chan *old[2] = { r->src_ch, r->dst_ch };
	int old_fds[2] = { r->fds[0], r->fds[1] };

	stop_monitor(r);
	/* It would find another channel under its feet. */
	rig_stop_fault(r);
	pthread_join(r->pump, NULL);
	r->has_pump = false;
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, r->fds));
	r->src_ch = new_chan(r->fds[0], r->o.framed);
	r->dst_ch = new_chan(r->fds[1], r->o.framed);
	src_set_channel(r->src, r->src_ch);
	dst_set_channel(r->dst, r->dst_ch);
	for (int i = 0; i < 2; i++) {
		chan_free(old[i]);
		close(old_fds[i]);
	}
}

void rig_resume(struct rig *r)
{
	int64_t again;

	for (uint32_t i = 0; i < RIG_BLOCKS; i++)
		bitmap_complement(r->blocks[i].dirty, r->blocks[i].received, r->blocks[i].pages);
	again = dst_request_again(r->dst);
	CHECK(again >= 0);
	rig_start_fault(r);
	CHECK(!pthread_create(&r->return_path, NULL, rig_return_path_thread, r));
	CHECK(!pthread_create(&r->migration, NULL, rig_resume_thread, r));
	CHECK(!pthread_create(&r->listen, NULL, rig_listen_thread, r));
	start_monitor(r);
}

void rig_join_source(struct rig *r)
{
	pthread_join(r->migration, NULL);
	pthread_join(r->return_path, NULL);
}

void rig_join_listen(struct rig *r)
{
	static const uint8_t shut[8] = { 0, 1, 0, 4, 0, 0, 0, 0 };

	pthread_join(r->listen, NULL);
	if (r->o.urgent)
		pthread_join(r->urgent, NULL);
	if (r->listen_ret != DST_EOF)
		return;
	CHECK(dst_missing_pages(r->dst) == 0);
	CHECK(!chan_write(r->dst_ch, shut, sizeof(shut)) && !chan_flush(r->dst_ch));
}

void rig_deinit(struct rig *r)
{
	stop_monitor(r);
	if (r->has_pump)
		pthread_join(r->pump, NULL);
	if (r->uffd >= 0)
		close(r->uffd);
	src_free(r->src);
	dst_free(r->dst);
	chan_free(r->src_ch);
	chan_free(r->dst_ch);
	chan_free(r->src_urgent);
	chan_free(r->dst_urgent);
	for (uint32_t i = 0; i < RIG_BLOCKS; i++)
		rig_block_deinit(&r->blocks[i]);
	for (int i = 0; i < 4; i++)
		if (r->fds[i] >= 0)
			close(r->fds[i]);
	for (int i = 0; i < 2; i++)
		if (r->urgent_fds[i] >= 0)
			close(r->urgent_fds[i]);
	close(r->stop_fd);
	close(r->run_fd);
}
