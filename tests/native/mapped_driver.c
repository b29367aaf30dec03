// SPDX-License-Identifier: MIT
/* sources: migration/native/csrc/mapped.c guestmem/csrc/bitmap.c guestmem/csrc/zero.c */
/*
 * Page areas of mapped-ram files: what is zero is a hole, what is not comes back, borders of runs and of
 * the part asked for, a file that ends too early, one that takes no more.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bitmap.h"
#include "mapped.h"

#define PAGE 4096u
#define PAGES 1000u
#define AREA (1u << 20)

#define CHECK(cond)                                                                     \
	do {                                                                            \
		if (!(cond)) {                                                          \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #cond);      \
			exit(1);                                                        \
		}                                                                       \
	} while (0)

static uint8_t *ram(void)
{
	uint8_t *p = mmap(NULL, (PAGES + 1) * PAGE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(p != MAP_FAILED && !mprotect(p + PAGES * PAGE, PAGE, PROT_NONE));
	return p;
}

/* Long runs, lone pages, lone holes. */
static int is_data(unsigned page)
{
	return page < 600 || page % 3 == 1 || page == PAGES - 1;
}

static void fill(uint8_t *p)
{
	for (unsigned page = 0; page < PAGES; page++)
		if (is_data(page))
			p[page * PAGE + page % PAGE] = (uint8_t)(page % 255 + 1);
}

static int64_t write_all(int fd, const uint8_t *p, uint64_t *present)
{
	int64_t first = mapped_write(fd, (uintptr_t)p, AREA, 0, 333, present), rest;

	if (first < 0)
		return first;
	rest = mapped_write(fd, (uintptr_t)p, AREA, 333, PAGES - 333, present);
	return rest < 0 ? rest : first + rest;
}

static void test_round_trip(int fd)
{
	uint64_t present[BITMAP_WORDS(PAGES)] = { 0 };
	uint8_t *from = ram(), *into = ram();
	int64_t count = 0;
	struct stat st;

	fill(from);
	for (unsigned page = 0; page < PAGES; page++)
		count += is_data(page);
	CHECK(write_all(fd, from, present) == count);
	for (unsigned page = 0; page < PAGES; page++)
		CHECK(bitmap_test(present, page) == is_data(page));
	CHECK(!fstat(fd, &st) && st.st_size == AREA + PAGES * PAGE);
	CHECK(st.st_blocks * 512 <= (count + 1) * PAGE);

	/* A part: nothing outside of it is touched. */
	CHECK(mapped_read(fd, (uintptr_t)into, AREA, 100, 500, present) == 500);
	CHECK(into[99 * PAGE + 99] == 0 && into[601 * PAGE + 601] == 0);
	CHECK(mapped_read(fd, (uintptr_t)into, AREA, 0, PAGES, present) == count);
	CHECK(!memcmp(from, into, PAGES * PAGE));
	CHECK(mapped_read(fd, (uintptr_t)into, AREA, 601, 0, present) == 0);

	/* A page that became zero loses its bit; its bytes stay where they are. */
	memset(from, 0, PAGE);
	CHECK(mapped_write(fd, (uintptr_t)from, AREA, 0, 2, present) == 1);
	CHECK(!bitmap_test(present, 0) && bitmap_test(present, 1));

	/* A file that ends before. */
	CHECK(!ftruncate(fd, AREA + 300 * PAGE + 7));
	CHECK(mapped_read(fd, (uintptr_t)into, AREA, 0, PAGES, present) == -ENODATA);
	CHECK(mapped_read(fd, (uintptr_t)into, AREA, 0, 300, present) == 299);
	munmap(from, (PAGES + 1) * PAGE);
	munmap(into, (PAGES + 1) * PAGE);
}

static void test_errors(void)
{
	uint64_t present[BITMAP_WORDS(PAGES)] = { 0 };
	uint8_t *p = ram();
	int full = open("/dev/full", O_WRONLY);

	fill(p);
	CHECK(full >= 0 && write_all(full, p, present) == -ENOSPC);
	CHECK(!bitmap_test(present, 0));
	CHECK(mapped_write(-1, (uintptr_t)p, AREA, 0, 1, present) == -EBADF);
	bitmap_set(present, 0, 1);
	CHECK(mapped_read(-1, (uintptr_t)p, AREA, 0, 1, present) == -EBADF);
	CHECK(mapped_read(full, (uintptr_t)p, AREA, 0, 1, present) == -EBADF);
	close(full);
	munmap(p, (PAGES + 1) * PAGE);
}

int main(void)
{
	int fd = memfd_create("mapped", MFD_CLOEXEC);

	CHECK(fd >= 0);
	test_round_trip(fd);
	test_errors();
	close(fd);
	return 0;
}
