#define _GNU_SOURCE
#include "dst.h"

#include "be.h"
#include "bitmap.h"
#include "uffd.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

static int rx_init(struct dst_rx *rx, struct dst *d, struct chan *ch, uint64_t max_page_size)
{
	uint64_t words = (max_page_size >> RAM_PAGE_BITS) / 64;

	rx->d = d;
	rx->ch = ch;
	rx->last_block = rx->hp_block = DST_NO_BLOCK;
	rx->run_data = aligned_alloc(RAM_PAGE_BYTES, DST_RUN_BYTES);
	if (max_page_size > RAM_PAGE_BYTES) {
		rx->hp_data = aligned_alloc(RAM_PAGE_BYTES, max_page_size);
		rx->hp_have = calloc(words ? words : 1, sizeof(uint64_t));
	}
	return rx->run_data && (max_page_size <= RAM_PAGE_BYTES || (rx->hp_data && rx->hp_have)) ? 0 : -ENOMEM;
}

static void rx_deinit(struct dst_rx *rx)
{
	free(rx->hp_have);
	free(rx->hp_data);
	free(rx->run_data);
}

static void rx_restart(struct dst_rx *rx, struct chan *ch)
{
	rx->ch = ch;
	rx->last_block = DST_NO_BLOCK;
	rx->hp_block = DST_NO_BLOCK;	/* a half received host page comes again, whole */
	rx->run_length = 0;
	rx->ended_cleanly = false;
	memset(&rx->error, 0, sizeof(rx->error));
}

struct dst *dst_new(struct chan *ch, uint32_t block_count, uint64_t max_page_size, int *err)
{
	struct dst *d = calloc(1, sizeof(*d));

	*err = -ENOMEM;
	if (!d)
		return NULL;
	d->ch = ch;
	d->uffd = -1;
	d->run_fd = -1;
	atomic_store(&d->arrival_fd, -1);
	atomic_store(&d->stop_fd, -1);
	blocktime_init(&d->blocktime);
	sem_init(&d->loops_begun, 0, 0);
	d->last_requested_block = DST_NO_BLOCK;
	d->block_count = block_count;
	d->blocks = calloc(block_count ? block_count : 1, sizeof(*d->blocks));
	d->by_address = calloc(block_count ? block_count : 1, sizeof(*d->by_address));
	d->hp_capacity = max_page_size;
	if (max_page_size > RAM_PAGE_BYTES)
		d->zero_page = calloc(1, max_page_size);	/* untouched: the shared zero page */
	if (rx_init(&d->main, d, ch, max_page_size) < 0 || rx_init(&d->urgent, d, NULL, max_page_size) < 0 ||
	    !d->blocks || !d->by_address || (max_page_size > RAM_PAGE_BYTES && !d->zero_page)) {
		dst_free(d);
		return NULL;
	}
	/* COPY to a huge page from a source that is not mapped in takes a second huge page meanwhile. */
	for (uint64_t at = 0; d->zero_page && at < max_page_size; at += RAM_PAGE_BYTES)
		(void)*(volatile uint8_t *)(d->zero_page + at);
	*err = 0;
	return d;
}

void dst_free(struct dst *d)
{
	if (!d)
		return;
	sem_destroy(&d->loops_begun);
	blocktime_deinit(&d->blocktime);
	dst_multifd_free(d);
	rx_deinit(&d->urgent);
	rx_deinit(&d->main);
	free(d->zero_page);
	free(d->by_address);
	free(d->blocks);
	free(d);
}

int dst_await_loops(struct dst *d, uint32_t count, uint32_t timeout_s)
{
	struct timespec until;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += timeout_s;
	while (count) {
		if (!sem_timedwait(&d->loops_begun, &until))
			count--;
		else if (errno != EINTR)
			return -errno;
	}
	return 0;
}

int dst_set_block(struct dst *d, uint32_t index, const char *idstr, uint64_t host, uint64_t used_length,
		  uint64_t page_size, uint64_t received, uint64_t requested, int fd, int is_shared,
		  int is_hugetlb)
{
	struct dst_block *b;
	size_t id_len = strlen(idstr);

	if (index >= d->block_count || !id_len || id_len > 255)
		return -EINVAL;
	if (page_size < RAM_PAGE_BYTES || page_size & (page_size - 1) ||
	    (page_size > RAM_PAGE_BYTES && page_size > d->hp_capacity))
		return -EINVAL;
	if (!used_length || used_length % page_size || host % page_size || (!host && fd < 0))
		return -EINVAL;
	b = &d->blocks[index];
	memcpy(b->idstr, idstr, id_len + 1);
	b->id_len = (uint8_t)id_len;
	b->host = (uint8_t *)(uintptr_t)host;
	b->used_length = used_length;
	b->page_size = page_size;
	b->received = (uint64_t *)(uintptr_t)received;
	b->requested = (uint64_t *)(uintptr_t)requested;
	b->fd = fd;
	b->is_shared = !!is_shared;
	b->is_hugetlb = !!is_hugetlb;
	d->by_address[index] = index;
	return 0;
}

static int compare_hosts(const void *a, const void *b, void *blocks)
{
	const struct dst_block *all = blocks;
	uintptr_t x = (uintptr_t)all[*(const uint32_t *)a].host;
	uintptr_t y = (uintptr_t)all[*(const uint32_t *)b].host;

	return (x > y) - (x < y);
}

void dst_seal(struct dst *d)
{
	qsort_r(d->by_address, d->block_count, sizeof(*d->by_address), compare_hosts, d->blocks);
}

void dst_set_ram_section(struct dst *d, uint32_t section_id)
{
	d->ram_section_id = section_id;
}

void dst_set_channel(struct dst *d, struct chan *ch)
{
	d->ch = ch;
	d->last_requested_block = DST_NO_BLOCK;
	rx_restart(&d->main, ch);
}

void dst_set_urgent_channel(struct dst *d, struct chan *ch)
{
	rx_restart(&d->urgent, ch);
}

void dst_start_postcopy(struct dst *d, int uffd, int stop_fd, int run_fd, int32_t main_tid,
			uint64_t pending, uint64_t watchdog)
{
	d->pending = (struct pending_faults *)(uintptr_t)pending;
	d->watchdog = (struct watchdog *)(uintptr_t)watchdog;
	d->uffd = uffd;
	d->run_fd = run_fd;
	d->main_tid = main_tid;
	d->main.last_block = DST_NO_BLOCK;
	atomic_store(&d->expect_run, run_fd >= 0);
	atomic_store(&d->stop_fd, stop_fd);
}

void dst_set_running(struct dst *d)
{
	atomic_store(&d->running, true);
}

static void add_stats(struct dst_stats *to, const struct dst_stats *from)
{
	/* A struct of counters and nothing else. */
	uint64_t *sum = (uint64_t *)to;
	const uint64_t *part = (const uint64_t *)from;

	for (size_t i = 0; i < sizeof(*to) / sizeof(uint64_t); i++)
		sum[i] += __atomic_load_n(&part[i], __ATOMIC_RELAXED);
}

void dst_get_stats(const struct dst *d, struct dst_stats *out)
{
	memset(out, 0, sizeof(*out));
	add_stats(out, &d->stats);
	add_stats(out, &d->main.stats);
	add_stats(out, &d->urgent.stats);
	dst_multifd_add_stats(d, add_stats, out);
}

int dst_find_address(const struct dst *d, uint64_t address, uint32_t *block, uint64_t *offset)
{
	uint32_t low = 0, high = d->block_count;

	while (low < high) {
		uint32_t mid = low + (high - low) / 2;
		const struct dst_block *b = &d->blocks[d->by_address[mid]];
		uint64_t start = (uintptr_t)b->host;

		if (address < start) {
			high = mid;
		} else if (address - start >= b->used_length) {
			low = mid + 1;
		} else {
			*block = d->by_address[mid];
			*offset = address - start;
			return 0;
		}
	}
	return -ENOENT;
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* What names a page in the table of timed requests: unique, page aligned, never 0. */
uint64_t dst_page_key(const struct dst *d, uint32_t index, uint64_t offset)
{
	const struct dst_block *b = &d->blocks[index];

	return b->host ? (uintptr_t)b->host + offset : ((uint64_t)(index + 1) << 44) + offset;
}

static struct dst_track *track_slot(struct dst *d, uint64_t page)
{
	return &d->track[(page >> RAM_PAGE_BITS) * 0x9e3779b97f4a7c15u >> 52];
}

_Static_assert(DST_TRACK == 1 << 12, "the hash keeps 12 bits");

/*
 * A thread waits for a page: time it. Statistics only: of two pages in one slot the later one is timed for
 * its vCPU alone.
 */
void dst_track_add(struct dst *d, uint64_t page, int32_t tid)
{
	struct dst_track *t = track_slot(d, page);
	uint64_t now = now_ns();
	bool is_vcpu = blocktime_begin(&d->blocktime, tid, page, now);

	if (atomic_load_explicit(&t->page, memory_order_relaxed))
		return;
	atomic_store_explicit(&t->since_ns, now, memory_order_relaxed);
	atomic_store_explicit(&t->by_other, !is_vcpu, memory_order_relaxed);
	atomic_store_explicit(&t->page, page, memory_order_release);
}

void dst_track_done(struct dst_rx *rx, uint64_t page)
{
	struct dst_track *t = track_slot(rx->d, page);
	uint64_t now = now_ns(), ns, us;
	int bucket = 0;

	if (rx->d->pending)
		pending_remove_range(rx->d->pending, page, RAM_PAGE_BYTES);
	blocktime_end(&rx->d->blocktime, page, now);
	if (atomic_load_explicit(&t->page, memory_order_acquire) != page)
		return;
	ns = now - atomic_load_explicit(&t->since_ns, memory_order_relaxed);
	if (atomic_load_explicit(&t->by_other, memory_order_relaxed))
		blocktime_note_other(&rx->d->blocktime, ns);
	atomic_store_explicit(&t->page, 0, memory_order_relaxed);
	dst_count(&rx->stats.latency_ns_sum, ns);
	dst_count(&rx->stats.latency_count, 1);
	for (us = ns / 1000; us > 1 && bucket < 23; us >>= 1)
		bucket++;
	dst_count(&rx->stats.latency_dist[bucket], 1);
}

void dst_track_forget(struct dst *d, uint64_t page)
{
	struct dst_track *t = track_slot(d, page);
	uint64_t expected = page;

	pending_remove_range(d->pending, page, RAM_PAGE_BYTES);
	blocktime_forget(&d->blocktime, page);
	atomic_compare_exchange_strong(&t->page, &expected, 0);
}

void dst_set_vcpus(struct dst *d, const int32_t *tids, uint32_t count)
{
	blocktime_set_vcpus(&d->blocktime, tids, count);
}

void dst_get_blocktime(struct dst *d, uint64_t *all_ns, uint64_t *vcpu_ns, uint64_t *vcpu_faults,
		       uint64_t *other_ns, uint64_t *other_faults)
{
	struct blocktime *b = &d->blocktime;
	uint64_t now = now_ns();

	pthread_mutex_lock(&b->lock);
	*all_ns = b->all_ns + (b->count && b->blocked == b->count ? now - b->all_since_ns : 0);
	for (uint32_t i = 0; i < b->count; i++) {
		const struct blocktime_vcpu *v = &b->vcpus[i];

		vcpu_ns[i] = v->total_ns + (v->page ? now - v->since_ns : 0);
		vcpu_faults[i] = v->faults;
	}
	*other_ns = b->other_ns;
	*other_faults = b->other_faults;
	pthread_mutex_unlock(&b->lock);
}

uint64_t dst_missing_pages(const struct dst *d)
{
	uint64_t missing = 0;

	for (uint32_t i = 0; i < d->block_count; i++) {
		uint64_t pages = d->blocks[i].used_length >> RAM_PAGE_BITS;

		missing += pages - bitmap_count(d->blocks[i].received, 0, pages);
	}
	return missing;
}

int dst_pong(struct dst *d, uint32_t value)
{
	struct chan *ch = atomic_load(&d->ch);
	uint8_t msg[8];
	int ret;

	put_be16(msg, 2);
	put_be16(msg + 2, 4);
	put_be32(msg + 4, value);
	chan_lock(ch);
	ret = chan_put_locked(ch, msg, sizeof(msg));
	if (!ret)
		ret = chan_flush_locked(ch);
	chan_unlock(ch);
	return ret;
}

/* One run of missing pages. A page that came meanwhile answers EEXIST and is stepped over. */
static int64_t poison_run(struct dst *d, uint64_t start, uint64_t length, uint64_t step)
{
	uint64_t done = 0;
	int64_t poisoned = 0;

	while (done < length) {
		int64_t ret = uffd_poison(d->uffd, start + done, length - done, 0);

		if (ret > 0) {
			done += (uint64_t)ret;
			poisoned += ret;
		} else if (ret == -EEXIST) {
			done += step;
		} else if (ret != -EAGAIN) {
			return ret;
		}
	}
	uffd_wake(d->uffd, start, length);
	return poisoned;
}

int64_t dst_poison_missing(struct dst *d)
{
	int64_t pages = 0;

	for (uint32_t i = 0; i < d->block_count; i++) {
		struct dst_block *b = &d->blocks[i];
		uint64_t count = b->used_length >> RAM_PAGE_BITS, unit = b->page_size >> RAM_PAGE_BITS, at = 0;

		while ((at = bitmap_next_clear(b->received, count, at)) < count) {
			/* A host page of which a part came is as good as missing; if it was populated, it stays. */
			uint64_t first = at & ~(unit - 1);
			uint64_t end = (bitmap_next_set(b->received, count, at) + unit - 1) & ~(unit - 1);
			int64_t ret = poison_run(d, (uintptr_t)b->host + (first << RAM_PAGE_BITS),
						 (end - first) << RAM_PAGE_BITS, b->page_size);

			if (ret < 0)
				return ret;
			pages += ret >> RAM_PAGE_BITS;
			at = end;
		}
	}
	return pages;
}
