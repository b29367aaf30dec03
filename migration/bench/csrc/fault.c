// SPDX-License-Identifier: MIT
/* The local fault round trip: touch, message, UFFDIO_COPY, wake. No network in it. */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "toucher.h"
#include "uffd.h"

#define MESSAGES_PER_READ 16

void bench_fail(atomic_int *failed, int err)
{
	int none = 0;

	atomic_compare_exchange_strong(failed, &none, err);
}

int bench_touch(void *arg)
{
	struct bench_toucher *t = arg;
	const struct bench_fault_config *config = t->config;
	uint64_t total = (uint64_t)config->warmup + config->touches, turn = 1;
	int err = 0;

	while (t->touches < total && !err && !atomic_load(t->failed)) {
		uint64_t page = t->touches % config->region_pages;
		const volatile uint64_t *word;
		uint64_t begin, end, seen;

		if (page == 0 && t->touches)
			err = bench_region_discard(t->region);
		if (err)
			break;
		word = (const volatile uint64_t *)(t->region->host + page * t->region->page_size);
		begin = bench_now_ns();
		seen = *word;
		end = bench_now_ns();
		if (seen != BENCH_STAMP + (t->stamped_by_page ? page : 0))
			t->wrong++;
		if (t->touches++ >= config->warmup)
			t->samples_ns[t->recorded++] = end - begin;
	}
	bench_write_all(t->stop_fd, &turn, sizeof(turn));
	return err;
}

int bench_await_fault(int uffd, int stop_fd, bool spins)
{
	struct pollfd fds[2] = { { .fd = uffd, .events = POLLIN }, { .fd = stop_fd, .events = POLLIN } };
	int ready;

	do
		ready = poll(fds, 2, spins ? 0 : -1);
	while (ready == 0 || (ready < 0 && errno == EINTR));
	if (ready < 0)
		return -errno;
	if (fds[0].revents & ~POLLIN)
		return -EIO;
	if (fds[0].revents & POLLIN)
		return 1;
	return 0;
}

struct handler {
	struct bench_region *region;
	const struct bench_fault_config *config;
	const void *source; /* one host page, stamped */
	int stop_fd;
	atomic_int *failed;
	struct bench_fault_counts counts;
};

static int place(struct handler *h, const struct uffd_msg *message)
{
	uint64_t mask = ~(h->region->page_size - 1);
	int64_t done;

	if (message->event != UFFD_EVENT_PAGEFAULT)
		return -EPROTO;
	h->counts.messages++;
	done = uffd_copy(h->region->uffd, message->arg.pagefault.address & mask,
			 (uint64_t)(uintptr_t)h->source, h->region->page_size, 0);
	if (done < 0)
		return (int)done;
	if ((uint64_t)done != h->region->page_size)
		return -EIO;
	h->counts.placed++;
	return 0;
}

static int handle_faults(struct handler *h)
{
	struct uffd_msg messages[MESSAGES_PER_READ];

	for (;;) {
		int ready = bench_await_fault(h->region->uffd, h->stop_fd, h->config->handler_spins);
		int64_t count;
		int err = 0;

		if (ready <= 0)
			return ready;
		count = uffd_read(h->region->uffd, messages, MESSAGES_PER_READ);
		if (count < 0)
			return (int)count;
		h->counts.reads += count > 0;
		for (int64_t i = 0; i < count && !err; i++)
			err = place(h, &messages[i]);
		if (err)
			return err;
	}
}

static int handler_main(void *arg)
{
	struct handler *h = arg;
	int err = handle_faults(h);

	if (err) {
		bench_fail(h->failed, err);
		bench_region_give_up(h->region);
	}
	return err;
}

static int measure(const struct bench_fault_config *config, struct bench_region *region,
		   void *source, uint64_t *samples_ns, struct bench_fault_counts *counts)
{
	atomic_int failed = 0;
	int stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	struct handler handler = { region, config, source, stop_fd, &failed, { 0 } };
	struct bench_toucher toucher = { .region = region, .config = config, .samples_ns = samples_ns,
					 .stop_fd = stop_fd, .failed = &failed };
	struct bench_thread handling = { 0 }, touching = { 0 };
	uint64_t stop = 1;
	int err, touch_err, handler_err;

	if (stop_fd < 0)
		return -errno;
	err = bench_thread_start(&handling, config->handler_cpu, handler_main, &handler);
	if (!err) {
		err = bench_thread_start(&touching, config->toucher_cpu, bench_touch, &toucher);
		if (err)
			bench_write_all(stop_fd, &stop, sizeof(stop));
	}
	touch_err = bench_thread_join(&touching);
	handler_err = bench_thread_join(&handling);
	close(stop_fd);
	*counts = handler.counts;
	counts->touches = toucher.touches;
	counts->wrong = toucher.wrong;
	if (!err)
		err = handler_err ? handler_err : touch_err;
	return err;
}

int64_t bench_fault_rtt(const struct bench_fault_config *config, uint64_t *samples_ns,
			struct bench_fault_counts *counts)
{
	struct bench_region region;
	uint64_t *source;
	int err;

	if (!config->region_pages || !config->touches)
		return -EINVAL;
	err = bench_region_init(&region, config->backing,
				(uint64_t)config->region_pages *
					(config->backing == BENCH_HUGETLB ? BENCH_HUGE_PAGE : BENCH_TARGET_PAGE));
	if (err)
		return err;
	source = bench_buffer_alloc(region.page_size);
	err = source ? bench_region_register(&region, UFFDIO_REGISTER_MODE_MISSING, 0) : -ENOMEM;
	if (!err) {
		source[0] = BENCH_STAMP;
		err = measure(config, &region, source, samples_ns, counts);
	}
	free(source);
	bench_region_deinit(&region);
	return err ? err : (int64_t)config->touches;
}
