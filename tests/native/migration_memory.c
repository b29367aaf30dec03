// SPDX-License-Identifier: MIT
/* The destination's memory, what belongs into it, and its userfaultfd. */
#define _GNU_SOURCE
#include "migration_rig.h"

#include <fcntl.h>
#include <linux/memfd.h>
#include <linux/userfaultfd.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bitmap.h"
#include "uffd.h"
#include "uffd_abi.h"

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

void rig_block_init(struct rig *r, uint32_t index)
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

void rig_block_deinit(struct rig_block *b)
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

void rig_discard(const struct rig_block *b, uint64_t first, uint64_t count)
{
	uint64_t start = first * PAGE, length = count * PAGE;

	if (b->fd < 0)
		CHECK(!madvise(b->dst + start, length, MADV_DONTNEED));
	else
		CHECK(!fallocate(b->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)start, (off_t)length));
	bitmap_clear_atomic(b->received, first, count);
}
