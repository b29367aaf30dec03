// SPDX-License-Identifier: MIT
/* How fast pages can be made to appear in bulk, and what finding the written ones costs. */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pagemap.h"
#include "uffd.h"

#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1u << 15)
#endif
#define WP_UNPOPULATED (1u << 13)
#define SCAN_WRITTEN 2u
#define SCAN_WP_MATCHING 1u
#define SCAN_CHECK_WPASYNC 2u
#define SCAN_REGIONS 512u
/* Placed pages come from a window this large, so that the source is neither one hot cache line set
 * nor cold memory: about what a receive buffer is. */
#define SOURCE_WINDOW (2u << 20)

struct placing {
	uint32_t backing;
	uint32_t op;
	uint64_t batch;
	uint64_t length;
	uint32_t passes;
	uint64_t *passes_ns;
};

static int64_t place_batch(const struct bench_region *region, uint32_t op, uint64_t at, uint64_t len,
			   const uint8_t *source)
{
	uint64_t dst = (uint64_t)(uintptr_t)region->host + at;

	switch (op) {
	case BENCH_COPY:
		return uffd_copy(region->uffd, dst, (uint64_t)(uintptr_t)source, len, 0);
	case BENCH_ZEROPAGE:
		return uffd_zeropage(region->uffd, dst, len, 0);
	default:
		memcpy(region->host + at, source, len);
		return (int64_t)len;
	}
}

static int place_pass(const struct bench_region *region, const struct placing *p,
		      const uint8_t *source, uint64_t window, uint64_t *ns_out)
{
	uint64_t begin = bench_now_ns(), at = 0;

	while (at < region->length) {
		uint64_t len = region->length - at < p->batch ? region->length - at : p->batch;
		int64_t done = place_batch(region, p->op, at, len, source + at % window);

		if (done < 0)
			return (int)done;
		at += (uint64_t)done;
	}
	*ns_out = bench_now_ns() - begin;
	return 0;
}

static int place_passes(struct bench_region *region, const struct placing *p)
{
	uint64_t window = p->batch > SOURCE_WINDOW ? p->batch : SOURCE_WINDOW / p->batch * p->batch;
	uint8_t *source = bench_buffer_alloc(window);
	uint64_t warmup;
	int err = source ? 0 : -ENOMEM;

	for (uint32_t pass = 0; pass <= p->passes && !err; pass++) {
		err = place_pass(region, p, source, window, pass ? &p->passes_ns[pass - 1] : &warmup);
		if (!err && p->op != BENCH_MEMCPY)
			err = bench_region_discard(region);
	}
	free(source);
	return err;
}

static int placing_main(void *arg)
{
	struct placing *p = arg;
	struct bench_region region;
	int err = bench_region_init(&region, p->backing, p->length);

	if (err)
		return err;
	if (p->op != BENCH_MEMCPY)
		err = bench_region_register(&region, UFFDIO_REGISTER_MODE_MISSING, 0);
	if (!err)
		err = place_passes(&region, p);
	bench_region_deinit(&region);
	return err;
}

static int run_on(int cpu, int (*body)(void *), void *arg)
{
	struct bench_thread thread = { 0 };
	int err = bench_thread_start(&thread, cpu, body, arg);

	return err ? err : bench_thread_join(&thread);
}

int bench_place(uint32_t backing, uint32_t op, uint64_t batch, uint64_t length, uint32_t passes,
		int32_t cpu, uint64_t *passes_ns)
{
	struct placing p = { backing, op, batch, length, passes, passes_ns };

	if (!batch || batch % BENCH_TARGET_PAGE || !passes || op > BENCH_MEMCPY)
		return -EINVAL;
	return run_on(cpu, placing_main, &p);
}

/* ---- PAGEMAP_SCAN ---- */

struct scanning {
	uint32_t backing;
	uint64_t length;
	struct bench_scan_times *out;
};

/* One whole scan of the region; pages_out counts base pages in the reported regions. */
static int scan_all(int pagemap, const struct bench_region *region, uint64_t flags,
		    struct pagemap_region *found, uint64_t *pages_out, uint64_t *ns_out)
{
	uint64_t begin = bench_now_ns();
	struct pagemap_scan_args args = {
		.flags = flags,
		.start = (uint64_t)(uintptr_t)region->host,
		.end = (uint64_t)(uintptr_t)region->host + region->length,
		.category_mask = SCAN_WRITTEN,
		.return_mask = SCAN_WRITTEN,
	};

	*pages_out = 0;
	while (args.start < args.end) {
		uint64_t walk_end = args.start;
		int64_t count = pagemap_scan(pagemap, &args, found, SCAN_REGIONS, &walk_end);

		if (count < 0)
			return (int)count;
		for (int64_t i = 0; i < count; i++)
			*pages_out += (found[i].end - found[i].start) / BENCH_TARGET_PAGE;
		if (walk_end <= args.start)
			return -EIO;
		args.start = walk_end;
	}
	*ns_out = bench_now_ns() - begin;
	return 0;
}

static uint64_t write_each_page(const struct bench_region *region, uint8_t value)
{
	uint64_t begin = bench_now_ns();

	for (uint64_t at = 0; at < region->length; at += BENCH_TARGET_PAGE)
		*(volatile uint8_t *)(region->host + at) = value;
	return bench_now_ns() - begin;
}

static int scan_region(const struct bench_region *region, int pagemap,
		       struct pagemap_region *found, struct bench_scan_times *out)
{
	const uint64_t protect = SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC;
	uint64_t pages, ns;
	int err;

	err = scan_all(pagemap, region, protect, found, &pages, &ns); /* protects everything: set-up */
	if (!err)
		err = scan_all(pagemap, region, protect, found, &out->clean_pages, &out->clean_ns);
	if (err)
		return err;
	out->write_ns = write_each_page(region, 2);
	err = scan_all(pagemap, region, 0, found, &pages, &out->dirty_get_ns);
	if (!err)
		err = scan_all(pagemap, region, protect, found, &out->dirty_pages, &out->dirty_protect_ns);
	return err;
}

static int scanning_main(void *arg)
{
	struct scanning *s = arg;
	struct pagemap_region *found = bench_buffer_alloc(SCAN_REGIONS * sizeof(*found));
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	struct bench_region region;
	int err = pagemap < 0 ? -errno : found ? 0 : -ENOMEM;

	if (!err)
		err = bench_region_init(&region, s->backing, s->length);
	if (!err) {
		write_each_page(&region, 1);
		err = bench_region_register(&region, UFFDIO_REGISTER_MODE_WP,
					    UFFD_FEATURE_WP_ASYNC | WP_UNPOPULATED);
		if (!err)
			err = scan_region(&region, pagemap, found, s->out);
		bench_region_deinit(&region);
	}
	if (pagemap >= 0)
		close(pagemap);
	free(found);
	return err;
}

int bench_pagemap_scan(uint32_t backing, uint64_t length, int32_t cpu, struct bench_scan_times *out)
{
	struct scanning s = { backing, length, out };

	memset(out, 0, sizeof(*out));
	return run_on(cpu, scanning_main, &s);
}
