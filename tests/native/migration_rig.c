// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "migration_rig.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "be.h"
#include "bitmap.h"
#include "uffd.h"
#include "uffd_abi.h"

enum { TYPE_EOF = 0, TYPE_PART = 2, TYPE_END = 3, TYPE_COMMAND = 8 };
enum { CMD_PING = 2, CMD_PACKAGED = 6, PONG_PACKAGE = 3 };

static const uint64_t sizes[RIG_MEMORIES][RIG_BLOCKS] = {
	[RIG_ANON] = { 3u << 20, 257 * PAGE },
	[RIG_MEMFD] = { 3u << 20, 257 * PAGE },
	[RIG_HUGETLB] = { 2 * RIG_HUGE, RIG_HUGE },
};

/* -- memory and its contents ------------------------------------------------------------------------- */

static _Thread_local sigjmp_buf *on_sigbus;

static void sigbus(int number)
{
	if (!on_sigbus) {
		signal(number, SIG_DFL);
		return;
	}
	siglongjmp(*on_sigbus, 1);
}

void rig_catch_sigbus(void)
{
	struct sigaction action = { .sa_handler = sigbus, .sa_flags = SA_NODEFER };

	CHECK(sigaction(SIGBUS, &action, NULL) == 0);
}

void *rig_alloc(size_t n)
{
	void *p = calloc(1, n ? n : 1);

	CHECK(p);
	return p;
}

uint64_t *rig_bits(uint64_t pages)
{
	return rig_alloc(BITMAP_WORDS(pages) * sizeof(uint64_t));
}

static uint64_t word_of(uint32_t block, uint64_t page, uint32_t version, uint32_t i)
{
	uint64_t x = ((uint64_t)block << 56) ^ (page << 24) ^ version;

	x = (x ^ (x >> 31)) * 0x7fb5d329728ea185u;
	return x + i * 0x9e3779b97f4a7c15u;
}

void rig_fill(const struct rig *r, uint8_t *to, uint32_t block, uint64_t page, uint32_t version)
{
	(void)r;
	for (uint32_t i = 0; i < PAGE / 8; i++)
		((uint64_t *)to)[i] = version ? word_of(block, page, version, i) : 0;
}

static bool is_filled(const uint8_t *at, uint32_t block, uint64_t page, uint32_t version)
{
	for (uint32_t i = 0; i < PAGE / 8; i++)
		if (((const volatile uint64_t *)at)[i] != (version ? word_of(block, page, version, i) : 0))
			return false;
	return true;
}

int rig_touch(const struct rig *r, uint32_t block, uint64_t page)
{
	const struct rig_block *b = &r->blocks[block];
	sigjmp_buf here;
	volatile int ret = -1;

	on_sigbus = &here;
	/* With the mask: the thread sanitizer's own handler runs with everything blocked. */
	if (!sigsetjmp(here, 1))
		ret = is_filled(b->dst + page * PAGE, block, page, b->version[page]);
	on_sigbus = NULL;
	return ret;
}

void rig_check_all(const struct rig *r)
{
	for (uint32_t i = 0; i < RIG_BLOCKS; i++)
		for (uint64_t page = 0; page < r->blocks[i].pages; page++)
			CHECK(rig_touch(r, i, page) == 1);
}

void rig_check_received(const struct rig *r)
{
	for (uint32_t i = 0; i < RIG_BLOCKS; i++)
		for (uint64_t page = 0; page < r->blocks[i].pages; page++)
			if (bitmap_test_acquire(r->blocks[i].received, page))
				CHECK(rig_touch(r, i, page) == 1);
}

static int memory_fd(enum rig_memory memory)
{
	if (memory == RIG_ANON)
		return -1;
	return memfd_create("rig", MFD_CLOEXEC | (memory == RIG_HUGETLB ? MFD_HUGETLB | MFD_HUGE_2MB : 0));
}

/* Aligned to huge pages, so that the block's pages are the file's. */
static uint8_t *map_memory(int fd, uint64_t bytes)
{
	int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);

	return p == MAP_FAILED ? NULL : p;
}

const char *rig_missing(enum rig_memory memory)
{
	int fd, uffd = rig_uffd();
	void *p;

	if (uffd < 0)
		return "no userfaultfd here; remedy: sysctl vm.unprivileged_userfaultfd=1";
	close(uffd);
	if (memory != RIG_HUGETLB)
		return NULL;
	fd = memory_fd(memory);
	if (fd < 0)
		return "no hugetlbfs in this kernel";
	CHECK(ftruncate(fd, 3 * RIG_HUGE) == 0);
	p = map_memory(fd, 3 * RIG_HUGE);
	close(fd);
	if (!p)
		return "3 free 2 MiB hugepages are missing; remedy: sysctl vm.nr_hugepages=64";
	munmap(p, 3 * RIG_HUGE);
	return NULL;
}

static void block_init(struct rig *r, uint32_t index)
{
	struct rig_block *b = &r->blocks[index];

	b->id = index ? "vga" : "pc.ram";
	b->bytes = sizes[r->o.memory][index];
	b->pages = b->bytes / PAGE;
	b->page_size = r->o.memory == RIG_HUGETLB ? RIG_HUGE : PAGE;
	b->fd = memory_fd(r->o.memory);
	if (b->fd >= 0)
		CHECK(ftruncate(b->fd, (off_t)b->bytes) == 0);
	b->src = map_memory(-1, b->bytes);
	b->dst = map_memory(b->fd, b->bytes);
	CHECK(b->src && b->dst);
	CHECK(r->o.memory != RIG_ANON || !madvise(b->dst, b->bytes, MADV_NOHUGEPAGE));
	b->dirty = rig_bits(b->pages);
	b->received = rig_bits(b->pages);
	b->requested = rig_bits(b->pages);
	b->version = rig_alloc(b->pages * sizeof(*b->version));
	for (uint64_t page = 0; page < b->pages; page++) {
		/* Zero pages in stretches: single ones, and whole huge pages of them. */
		bool is_zero = page % 7 == 3 || page / 512 == 1;

		b->version[page] = !is_zero;
		if (!is_zero)
			rig_fill(r, b->src + page * PAGE, index, page, 1);
	}
	bitmap_set(b->dirty, 0, b->pages);
}

static void block_deinit(struct rig_block *b)
{
	munmap(b->src, b->bytes);
	munmap(b->dst, b->bytes);
	if (b->fd >= 0)
		close(b->fd);
	free(b->dirty);
	free(b->received);
	free(b->requested);
	free(b->version);
}

/* -- the userfaultfd ----------------------------------------------------------------------------------- */

int rig_uffd(void)
{
	uint64_t wanted = UFFD_FEATURE_THREAD_ID | UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MINOR_HUGETLBFS;
	uint64_t features, ioctls;
	int flags = O_CLOEXEC | O_NONBLOCK, fd = uffd_open_syscall(flags);

	if (fd < 0)
		fd = uffd_open_dev(flags);
	if (fd < 0)
		fd = uffd_open_syscall(flags | 1 /* user mode only */);
	if (fd < 0)
		return fd;
	if (uffd_api(fd, wanted, &features, &ioctls) < 0) {
		close(fd);
		return -EOPNOTSUPP;
	}
	return fd;
}

void rig_register(struct rig *r)
{
	uint64_t mode = UFFDIO_REGISTER_MODE_MISSING, ioctls;

	if (r->o.memory != RIG_ANON)
		mode |= UFFDIO_REGISTER_MODE_MINOR;
	r->uffd = rig_uffd();
	CHECK(r->uffd >= 0);
	for (uint32_t i = 0; i < RIG_BLOCKS; i++)
		CHECK(!uffd_register(r->uffd, (uintptr_t)r->blocks[i].dst, r->blocks[i].bytes, mode, &ioctls));
}

static void discard(const struct rig_block *b, uint64_t first, uint64_t count)
{
	uint64_t start = first * PAGE, length = count * PAGE;

	if (b->fd < 0)
		CHECK(!madvise(b->dst + start, length, MADV_DONTNEED));
	else
		CHECK(!fallocate(b->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)start, (off_t)length));
	bitmap_clear_atomic(b->received, first, count);
}

/* -- threads of the source ----------------------------------------------------------------------------- */

/* What the guest wrote since its page was sent. */
static void redirty(struct rig *r)
{
	for (uint32_t i = 0; i < RIG_BLOCKS; i++) {
		struct rig_block *b = &r->blocks[i];
		uint64_t unit = b->page_size / PAGE;

		for (uint64_t page = 5; page < b->pages; page += 11) {
			rig_fill(r, b->src + page * PAGE, i, page, 2);
			b->version[page] = 2;
			/* Whole host pages, as they travel from now on. */
			bitmap_set_atomic(b->dirty, page & ~(unit - 1), unit);
		}
		for (uint64_t page = 0; page < b->pages; page += unit)
			if (bitmap_next_set(b->dirty, page + unit, page) < page + unit)
				bitmap_set_atomic(b->dirty, page, unit);
	}
}

static int send_package(struct rig *r)
{
	static const uint8_t ping[9] = { TYPE_COMMAND, 0, CMD_PING, 0, 4, 0, 0, 0, 4 };
	size_t n = 0, blob = 0;
	uint8_t *out;
	int ret;

	for (uint32_t i = 0; i < RIG_BLOCKS; i++)
		blob += BITMAP_WORDS(r->blocks[i].pages) * 8;
	out = rig_alloc(9 + blob + sizeof(ping));
	out[n++] = TYPE_COMMAND;
	put_be16(out + n, CMD_PACKAGED);
	put_be16(out + n + 2, 4);
	put_be32(out + n + 4, (uint32_t)blob);
	n += 8;
	for (uint32_t i = 0; i < RIG_BLOCKS; i++) {
		memcpy(out + n, r->blocks[i].dirty, BITMAP_WORDS(r->blocks[i].pages) * 8);
		n += BITMAP_WORDS(r->blocks[i].pages) * 8;
	}
	memcpy(out + n, ping, sizeof(ping));
	ret = src_send_package(r->src, out, n + sizeof(ping), r->o.run_alone);
	free(out);
	return ret;
}

/* Postcopy from wherever it stands, and the end of the stream. */
static int send_rest(struct rig *r)
{
	static const uint8_t eof = TYPE_EOF;
	int64_t ret;

	while ((ret = src_postcopy_loop(r->src)) == SRC_RUN_SENT)
		;
	if (ret >= 0)
		ret = src_end_urgent(r->src, true);
	if (r->o.urgent)
		shutdown(r->urgent_fds[0], SHUT_WR);	/* its end, as the runtime makes it */
	if (ret >= 0)
		ret = src_send_part(r->src, TYPE_END, 0);
	if (ret >= 0)
		ret = chan_write(r->src_ch, &eof, 1);
	return ret < 0 ? (int)ret : chan_flush(r->src_ch);
}

static int send_all(struct rig *r)
{
	int64_t ret = 0;

	if (r->o.precopy_bytes) {
		for (uint64_t sent = 0; sent < r->o.precopy_bytes && ret >= 0; sent += 64 << 10)
			ret = src_send_part(r->src, TYPE_PART, 64 << 10);
		if (ret < 0)
			return (int)ret;
	}
	if (r->o.no_package) {
		ret = src_send_package(r->src, "", 0, false);
		return ret < 0 ? (int)ret : send_rest(r);
	}
	if (!r->o.keep_clean)
		redirty(r);
	ret = send_package(r);
	return ret < 0 ? (int)ret : send_rest(r);
}

static void *resume_thread(void *rig)
{
	struct rig *r = rig;

	r->migration_ret = send_rest(r);
	return NULL;
}

static void *migration_thread(void *rig)
{
	struct rig *r = rig;

	r->migration_ret = send_all(r);
	return NULL;
}

static void *return_path_thread(void *rig)
{
	struct rig *r = rig;

	r->return_path_ret = src_rp_loop(r->src);
	if (r->return_path_ret < 0)
		src_stop(r->src);	/* as the runtime does */
	return NULL;
}

/* -- threads of the destination ------------------------------------------------------------------------ */

static void *listen_thread(void *rig)
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
			discard(b, first, end - first);
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
	CHECK(!pthread_create(&r->listen, NULL, listen_thread, r));
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

static void *main_thread(void *rig)
{
	struct rig *r = rig;

	r->main_ret = read_stream(r);
	return NULL;
}

/* Somebody who looks at the figures all the time, as a monitor may. */
static void *monitor_thread(void *rig)
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

static void *pump_thread(void *rig)
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

/* -- the whole ----------------------------------------------------------------------------------------- */

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

		block_init(r, i);
		CHECK(!src_set_block(r->src, i, b->id, (uintptr_t)b->src, b->bytes, b->page_size,
				     (uintptr_t)b->dirty));
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
	CHECK(!pthread_create(&r->return_path, NULL, return_path_thread, r));
	CHECK(!pthread_create(&r->migration, NULL, migration_thread, r));
}

static void start_monitor(struct rig *r)
{
	atomic_store(&r->monitor_stop, false);
	CHECK(!pthread_create(&r->monitor, NULL, monitor_thread, r));
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
		CHECK(!pthread_create(&r->pump, NULL, pump_thread, r));
		r->has_pump = true;
	}
	CHECK(!pthread_create(&r->main, NULL, main_thread, r));
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
	CHECK(!pthread_create(&r->return_path, NULL, return_path_thread, r));
	CHECK(!pthread_create(&r->migration, NULL, resume_thread, r));
	CHECK(!pthread_create(&r->listen, NULL, listen_thread, r));
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
		block_deinit(&r->blocks[i]);
	for (int i = 0; i < 4; i++)
		if (r->fds[i] >= 0)
			close(r->fds[i]);
	for (int i = 0; i < 2; i++)
		if (r->urgent_fds[i] >= 0)
			close(r->urgent_fds[i]);
	close(r->stop_fd);
	close(r->run_fd);
}
