/* SPDX-License-Identifier: MIT */
/* sources: uffd/csrc/uffd.c uffd/csrc/memory.c uffd/csrc/pending.c uffd/csrc/ranges.c uffd/csrc/place.c uffd/csrc/handler.c uffd/csrc/sleepers.c uffd/csrc/watchdog.c */
/*
 * Drives the native fault loop, the pending table and the watchdog without any interpreter, so that the
 * sanitizers see them. Exit 0 pass, 1 fail, 77 skip (no userfaultfd here).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../uffd/csrc/handler.h"
#include "../../uffd/csrc/memory.h"
#include "../../uffd/csrc/uffd.h"
#include "../../uffd/csrc/watchdog.h"

enum { PAGE = 4096, PAGES = 256, READERS = 4, GIVE_BACKS = 500, SKIP = 77 };

#define CHECK(condition)                                                                 \
	do {                                                                             \
		if (!(condition)) {                                                      \
			fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, __func__, \
				#condition);                                             \
			exit(1);                                                         \
		}                                                                        \
	} while (0)

struct rig {
	int uffd;
	int stop_fd;
	int notify_fd;
	uint8_t *region;
	uint8_t *source;
	struct pending_faults pending;
	struct fault_handler handler;
	pthread_t loop;
	int result;
};

static uint8_t byte_of(uint64_t page)
{
	return (uint8_t)(page % 251 + 1);
}

static uint8_t *map_pages(uint64_t count)
{
	void *p = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
		       0);

	CHECK(p != MAP_FAILED);
	return p;
}

static void rig_open(struct rig *rig, uint64_t features)
{
	uint64_t reported, ioctls;

	rig->uffd = uffd_open_dev(O_CLOEXEC | O_NONBLOCK);
	if (rig->uffd < 0)
		rig->uffd = uffd_open_syscall(O_CLOEXEC | O_NONBLOCK);
	if (rig->uffd < 0) {
		fprintf(stderr, "no userfaultfd (%s); remedy: run as root\n",
			strerror(-rig->uffd));
		exit(SKIP);
	}
	CHECK(uffd_api(rig->uffd, features, &reported, &ioctls) == 0);
	rig->region = map_pages(PAGES);
	rig->source = map_pages(PAGES);
	for (uint64_t i = 0; i < PAGES; i++)
		memset(rig->source + i * PAGE, byte_of(i), PAGE);
	CHECK(uffd_register(rig->uffd, (uintptr_t)rig->region, PAGES * PAGE, 1, &ioctls) == 0);
	rig->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	rig->notify_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	pending_init(&rig->pending);
}

static void *run_loop(void *arg)
{
	struct rig *rig = arg;

	rig->result = fault_handler_run(&rig->handler);
	return NULL;
}

static int refuse_page(void *context, uint64_t offset, void *into, uint64_t len)
{
	(void)context, (void)into, (void)len;
	return offset == 3 * PAGE ? -EIO : 0;
}

static void rig_start(struct rig *rig, uint32_t kind)
{
	struct fault_range range = {
		.start = (uintptr_t)rig->region,
		.len = PAGES * PAGE,
		.page_size = PAGE,
		.unit = PAGE,
		.source = kind == FAULT_SOURCE_COPY ? (uintptr_t)rig->source : 0,
		.source_len = PAGES * PAGE,
		.kind = kind,
	};

	CHECK(fault_handler_init(&rig->handler, rig->uffd, rig->stop_fd, rig->notify_fd, &range, 1,
				 0) == 0);
	rig->handler.pending = &rig->pending;
	rig->handler.fetch = refuse_page;
	CHECK(pthread_create(&rig->loop, NULL, run_loop, rig) == 0);
}

static void rig_stop(struct rig *rig, struct fault_stats *stats)
{
	uint64_t one = 1;

	CHECK(write(rig->stop_fd, &one, sizeof(one)) == sizeof(one));
	CHECK(pthread_join(rig->loop, NULL) == 0);
	fault_handler_stats(&rig->handler, stats);
	fault_handler_deinit(&rig->handler);
	close(rig->uffd);
	close(rig->stop_fd);
	close(rig->notify_fd);
	munmap(rig->region, PAGES * PAGE);
	munmap(rig->source, PAGES * PAGE);
}

static void *read_all(void *arg)
{
	struct rig *rig = arg;

	for (uint64_t i = 0; i < PAGES; i++) {
		uint8_t got = *(volatile uint8_t *)(rig->region + i * PAGE);

		CHECK(got == byte_of(i));
	}
	return NULL;
}

static void *watch_stats(void *arg)
{
	struct rig *rig = arg;
	struct fault_stats stats;

	do {
		fault_handler_stats(&rig->handler, &stats);
	} while (stats.missing + stats.duplicates < PAGES);
	return NULL;
}

/* Several threads on the same pages; statistics are read meanwhile. */
static void test_readers(void)
{
	static struct rig rig;
	pthread_t readers[READERS], watcher;
	struct fault_stats stats;

	rig_open(&rig, 1 << 8);
	rig_start(&rig, FAULT_SOURCE_COPY);
	CHECK(pthread_create(&watcher, NULL, watch_stats, &rig) == 0);
	for (int i = 0; i < READERS; i++)
		CHECK(pthread_create(&readers[i], NULL, read_all, &rig) == 0);
	for (int i = 0; i < READERS; i++)
		pthread_join(readers[i], NULL);
	pthread_join(watcher, NULL);
	rig_stop(&rig, &stats);
	CHECK(rig.result == 0);
	CHECK(stats.placed_bytes == PAGES * PAGE);
	CHECK(rig.pending.count == 0);
}

static void *give_back(void *arg)
{
	struct rig *rig = arg;

	for (uint64_t i = 0; i < GIVE_BACKS; i++)
		CHECK(mem_madvise((uintptr_t)rig->region + i * 7 % PAGES * PAGE, PAGE,
				  MADV_DONTNEED) == 0);
	return NULL;
}

static void *take_events(void *arg)
{
	struct rig *rig = arg;
	struct pollfd fd = { .fd = rig->notify_fd, .events = POLLIN };
	struct uffd_msg msgs[16];
	uint64_t counter;
	uint32_t seen = 0, n;

	while (seen < GIVE_BACKS) {
		CHECK(poll(&fd, 1, 20000) == 1);
		if (read(rig->notify_fd, &counter, sizeof(counter)) < 0)
			CHECK(errno == EAGAIN);
		while ((n = fault_handler_take_events(&rig->handler, msgs, 16)) > 0)
			seen += n;
	}
	return NULL;
}

/* Placing meets EAGAIN all the time, pages come back as zeros, another thread reads the event ring. */
static void test_give_back(void)
{
	static struct rig rig;
	pthread_t remover, taker;
	struct fault_stats stats;

	rig_open(&rig, 1 << 3);
	rig_start(&rig, FAULT_SOURCE_COPY);
	CHECK(pthread_create(&taker, NULL, take_events, &rig) == 0);
	CHECK(pthread_create(&remover, NULL, give_back, &rig) == 0);
	for (int round = 0; round < 20; round++) {
		for (uint64_t i = 0; i < PAGES; i++) {
			uint8_t got = *(volatile uint8_t *)(rig.region + i * PAGE);

			CHECK(got == byte_of(i) || got == 0);
		}
	}
	pthread_join(remover, NULL);
	pthread_join(taker, NULL);
	for (uint64_t i = 0; i < PAGES; i++)
		CHECK(*(volatile uint8_t *)(rig.region + i * PAGE) == 0);
	rig_stop(&rig, &stats);
	CHECK(rig.result == 0);
	CHECK(stats.removes == GIVE_BACKS);
}

static void *touch_page_3(void *arg)
{
	struct rig *rig = arg;

	return (void *)(uintptr_t)*(volatile uint8_t *)(rig->region + 3 * PAGE);
}

/* A page that cannot be had ends the loop; its sleeper sleeps on until somebody else brings it. */
static void test_refused_page(void)
{
	static struct rig rig;
	struct fault_stats stats;
	struct pending_entry oldest;
	pthread_t sleeper;
	void *value;

	rig_open(&rig, 1 << 8);
	rig_start(&rig, FAULT_SOURCE_FETCH);
	CHECK(pthread_create(&sleeper, NULL, touch_page_3, &rig) == 0);
	CHECK(pthread_join(rig.loop, NULL) == 0);
	CHECK(rig.result == -EIO);
	CHECK(rig.handler.failed_address == (uintptr_t)rig.region + 3 * PAGE);
	CHECK(pending_oldest(&rig.pending, &oldest) && oldest.address == rig.handler.failed_address);
	CHECK(uffd_copy(rig.uffd, oldest.address, (uintptr_t)rig.source, PAGE, 0) == PAGE);
	CHECK(pthread_join(sleeper, &value) == 0);
	CHECK((uintptr_t)value == byte_of(0));
	CHECK(pthread_create(&rig.loop, NULL, run_loop, &rig) == 0);
	rig_stop(&rig, &stats);
}

static void *add_and_remove(void *arg)
{
	struct pending_faults *table = arg;
	uint32_t tid = (uint32_t)syscall(SYS_gettid);

	for (uint64_t i = 1; i <= 20000; i++) {
		CHECK(pending_add(table, (uint64_t)tid << 20 | (i % 64) << 12, tid) == 0);
		if (i % 3 == 0)
			pending_remove_range(table, (uint64_t)tid << 20, 64 * PAGE);
	}
	pending_remove_range(table, (uint64_t)tid << 20, 64 * PAGE);
	return NULL;
}

static void test_pending(void)
{
	static struct pending_faults table;
	struct pending_entry list[PENDING_SLOTS];
	pthread_t threads[READERS];

	pending_init(&table);
	for (int i = 0; i < READERS; i++)
		CHECK(pthread_create(&threads[i], NULL, add_and_remove, &table) == 0);
	for (int i = 0; i < 2000; i++) {
		uint32_t n = pending_list(&table, list, PENDING_SLOTS);

		CHECK(n <= READERS);
		for (uint32_t j = 0; j < n; j++)
			CHECK(list[j].address >> 20 == list[j].tid);
	}
	for (int i = 0; i < READERS; i++)
		pthread_join(threads[i], NULL);
	CHECK(table.count == 0 && table.dropped == 0);
}

static void *run_watchdog(void *arg)
{
	return (void *)(intptr_t)watchdog_run(arg);
}

/* Runs in a child: nobody beats, a thread sleeps; first reports only, then the mode is switched. */
static void hang(int report_fd)
{
	static struct rig rig;
	static struct watchdog dog;
	pthread_t sleeper, watcher;

	rig_open(&rig, 1 << 8);
	CHECK(watchdog_init(&dog, rig.stop_fd, report_fd, 50, 0, 70) == 0);
	CHECK(watchdog_watch(&dog, &rig.pending, rig.uffd) == 0);
	CHECK(pthread_create(&sleeper, NULL, touch_page_3, &rig) == 0);
	CHECK(pthread_create(&watcher, NULL, run_watchdog, &dog) == 0);
	while (watchdog_reports(&dog) == 0)
		sched_yield();
	watchdog_set_action(&dog, WATCHDOG_END);
	pthread_join(watcher, NULL);
	exit(1);	/* not reached */
}

static void test_watchdog(void)
{
	static char text[16384];
	size_t have = 0;
	ssize_t n;
	int fds[2], status;
	pid_t child;

	CHECK(pipe(fds) == 0);
	child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		close(fds[0]);
		hang(fds[1]);
	}
	close(fds[1]);
	while ((n = read(fds[0], text + have, sizeof(text) - 1 - have)) > 0)
		have += (size_t)n;
	close(fds[0]);
	CHECK(waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 70);
	CHECK(strstr(text, "still waiting") && strstr(text, "ending the process with status 70"));
	CHECK(strstr(text, "fault nobody had read"));
}

int main(void)
{
	test_watchdog();	/* first: it forks, which wants a process without threads */
	test_pending();
	test_readers();
	test_give_back();
	test_refused_page();
	puts("ok");
	return 0;
}
