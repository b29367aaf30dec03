// SPDX-License-Identifier: MIT
#include "ranges.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static bool is_power_of_two(uint64_t n)
{
	return n != 0 && (n & (n - 1)) == 0;
}

static bool geometry_ok(const struct fault_range *r)
{
	return is_power_of_two(r->page_size) && r->page_size >= 4096 && r->len > 0 &&
	       (r->start | r->len) % r->page_size == 0 && r->start + r->len > r->start &&
	       r->unit >= r->page_size && r->unit % r->page_size == 0 &&
	       r->kind >= FAULT_SOURCE_COPY && r->kind <= FAULT_SOURCE_FETCH;
}

/*
 * Pieces of a split range share one bitmap, told apart by first_bit, so nothing is allocated while the
 * loop runs; removed_maps remembers what to free.
 */
int ranges_init(struct fault_handler *h, const struct fault_range *ranges, uint32_t count)
{
	h->range_max = count * 2 + FAULT_SPARE_RANGES;
	h->ranges = calloc(h->range_max, sizeof(*h->ranges));
	h->removed_maps = calloc(count + 1, sizeof(*h->removed_maps));
	if (!h->ranges || !h->removed_maps)
		return -ENOMEM;
	for (uint32_t i = 0; i < count; i++) {
		struct fault_range *r = &h->ranges[i];

		if (!geometry_ok(&ranges[i]))
			return -EINVAL;
		*r = ranges[i];
		r->first_bit = 0;
		r->removed = calloc(r->len / r->page_size / 64 + 1, sizeof(uint64_t));
		if (!r->removed)
			return -ENOMEM;
		h->removed_maps[i] = r->removed;
		h->removed_map_count = i + 1;
	}
	h->range_count = count;
	return 0;
}

void ranges_deinit(struct fault_handler *h)
{
	for (uint32_t i = 0; i < h->removed_map_count; i++)
		free(h->removed_maps[i]);
	free(h->removed_maps);
	free(h->ranges);
}

struct fault_range *ranges_find(struct fault_handler *h, uint64_t address)
{
	for (uint32_t i = 0; i < h->range_count; i++)
		if (address - h->ranges[i].start < h->ranges[i].len)
			return &h->ranges[i];
	return NULL;
}

void ranges_mark_removed(struct fault_handler *h, uint64_t start, uint64_t end)
{
	for (uint32_t i = 0; i < h->range_count; i++) {
		struct fault_range *r = &h->ranges[i];
		uint64_t from = start > r->start ? start : r->start;
		uint64_t to = end < r->start + r->len ? end : r->start + r->len;

		for (; from < to; from += r->page_size) {
			uint64_t bit = r->first_bit + (from - r->start) / r->page_size;

			r->removed[bit / 64] |= 1ull << (bit % 64);
		}
	}
}

/* Cut the range around address in two, so that address starts one. Nothing to do at an edge. */
static int split_at(struct fault_handler *h, uint64_t address)
{
	struct fault_range *r = ranges_find(h, address);
	struct fault_range *tail;
	uint64_t head_len;

	if (!r || r->start == address)
		return 0;
	if (h->range_count == h->range_max)
		return -ENOSPC;
	head_len = address - r->start;
	tail = &h->ranges[h->range_count++];
	*tail = *r;
	tail->start = address;
	tail->len = r->len - head_len;
	tail->source = r->source + head_len;
	tail->source_len = r->source_len > head_len ? r->source_len - head_len : 0;
	tail->first_bit = r->first_bit + head_len / r->page_size;
	r->len = head_len;
	return 0;
}

int ranges_move(struct fault_handler *h, uint64_t from, uint64_t to, uint64_t len)
{
	int rc = split_at(h, from);

	if (rc == 0)
		rc = split_at(h, from + len);
	if (rc < 0)
		return rc;
	for (uint32_t i = 0; i < h->range_count; i++)
		if (h->ranges[i].start - from < len)
			h->ranges[i].start = to + (h->ranges[i].start - from);
	return 0;
}

int ranges_drop(struct fault_handler *h, uint64_t start, uint64_t end)
{
	int rc = split_at(h, start);

	if (rc == 0)
		rc = split_at(h, end);
	if (rc < 0)
		return rc;
	for (uint32_t i = 0; i < h->range_count;) {
		if (h->ranges[i].start - start < end - start)
			h->ranges[i] = h->ranges[--h->range_count];
		else
			i++;
	}
	return 0;
}

static bool is_removed(const struct fault_range *r, uint64_t address)
{
	uint64_t bit = r->first_bit + (address - r->start) / r->page_size;

	return r->removed[bit / 64] >> (bit % 64) & 1;
}

bool ranges_removed_run(const struct fault_range *r, uint64_t address, uint64_t limit, uint64_t *run)
{
	bool first = is_removed(r, address);
	uint64_t len = r->page_size;

	while (len < limit && is_removed(r, address + len) == first)
		len += r->page_size;
	*run = len;
	return first;
}
