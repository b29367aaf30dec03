// SPDX-License-Identifier: MIT
/* sources: migration/bench/csrc/common.c migration/bench/csrc/wake.c migration/bench/csrc/fault.c
	migration/bench/csrc/sockets.c migration/bench/csrc/place.c migration/bench/csrc/remote.c
	migration/bench/csrc/push.c uffd/csrc/uffd.c uffd/csrc/pagemap.c */
/*
 * The bench's measurements under the sanitizers: few samples, every path, and the ways out when
 * something is wrong. No time is judged here, only that what is counted adds up.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "bench.h"
#include "uffd.h"

#define TOUCHES 64u
#define PAGES 24u /* fewer than touches: the region is discarded and touched again */
#define LENGTH (64u * BENCH_TARGET_PAGE)
#define SKIP 77

static int failures;

#define CHECK(condition)                                                                  \
	do {                                                                              \
		if (!(condition)) {                                                       \
			printf("%s:%d: %s\n", __FILE__, __LINE__, #condition);            \
			failures++;                                                       \
		}                                                                         \
	} while (0)

static struct bench_fault_config config_of(uint32_t backing, uint32_t transport, uint32_t spins)
{
	return (struct bench_fault_config){
		.backing = backing,
		.region_pages = PAGES,
		.warmup = 3,
		.touches = TOUCHES,
		.toucher_cpu = -1,
		.handler_cpu = -1,
		.listen_cpu = -1,
		.peer_cpu = -1,
		.handler_spins = spins,
		.transport = transport,
	};
}

static void check_counts(const struct bench_fault_counts *counts, const uint64_t *samples)
{
	CHECK(counts->touches == TOUCHES + 3);
	CHECK(counts->messages == counts->touches);
	CHECK(counts->placed == counts->touches);
	CHECK(counts->wrong == 0);
	for (unsigned int i = 0; i < TOUCHES; i++)
		CHECK(samples[i] > 0);
}

static void local_faults(void)
{
	for (uint32_t backing = BENCH_ANON; backing <= BENCH_SHMEM; backing++) {
		for (uint32_t spins = 0; spins < 2; spins++) {
			struct bench_fault_config config = config_of(backing, 0, spins);
			struct bench_fault_counts counts = { 0 };
			uint64_t samples[TOUCHES];

			CHECK(bench_fault_rtt(&config, samples, &counts) == TOUCHES);
			check_counts(&counts, samples);
		}
	}
}

static void remote_faults(void)
{
	for (uint32_t transport = BENCH_UNIX; transport <= BENCH_TCP; transport++) {
		struct bench_fault_config config = config_of(BENCH_ANON, transport, transport);
		struct bench_fault_counts counts = { 0 };
		uint64_t samples[TOUCHES];

		CHECK(bench_remote_fault(&config, -1, samples, &counts) == TOUCHES);
		check_counts(&counts, samples);
	}
}

static int serve_main(void *arg)
{
	int64_t served = bench_remote_serve(*(int *)arg, BENCH_TARGET_PAGE, PAGES, -1);

	return (int)served;
}

static void remote_fault_by_a_served_socket(void)
{
	struct bench_fault_config config = config_of(BENCH_ANON, BENCH_UNIX, 0);
	struct bench_thread server = { 0 };
	uint64_t samples[TOUCHES];
	int fds[2];

	CHECK(bench_socket_pair(BENCH_UNIX, fds) == 0);
	CHECK(bench_thread_start(&server, -1, serve_main, &fds[1]) == 0);
	for (int i = 0; i < 2; i++) { /* the connection outlives a measurement */
		struct bench_fault_counts counts = { 0 };

		CHECK(bench_remote_fault(&config, fds[0], samples, &counts) == TOUCHES);
		check_counts(&counts, samples);
	}
	shutdown(fds[0], SHUT_RDWR);
	CHECK(bench_thread_join(&server) == 2 * (TOUCHES + 3));
	close(fds[0]);
	close(fds[1]);
}

/* A peer that is gone, or serves other pages: an error, and no thread left asleep on a fault. */
static void remote_fault_without_a_peer(void)
{
	struct bench_fault_config config = config_of(BENCH_ANON, BENCH_UNIX, 0);
	struct bench_fault_counts counts = { 0 };
	struct bench_thread server = { 0 };
	uint64_t samples[TOUCHES];
	int fds[2];

	CHECK(bench_socket_pair(BENCH_UNIX, fds) == 0);
	close(fds[1]);
	CHECK(bench_remote_fault(&config, fds[0], samples, &counts) < 0);
	close(fds[0]);

	CHECK(bench_socket_pair(BENCH_TCP, fds) == 0);
	CHECK(bench_thread_start(&server, -1, serve_main, &fds[1]) == 0);
	config.region_pages = 2 * PAGES; /* more than the peer has */
	CHECK(bench_remote_fault(&config, fds[0], samples, &counts) < 0);
	CHECK(bench_thread_join(&server) == -EPROTO);
	close(fds[0]);
	close(fds[1]);
}

static void sockets(void)
{
	uint64_t samples[TOUCHES], passes[2];

	for (uint32_t transport = BENCH_UNIX; transport <= BENCH_TCP; transport++) {
		CHECK(bench_socket_rtt(transport, 16, 4112, -1, -1, 2, TOUCHES, samples) == TOUCHES);
		CHECK(bench_socket_bulk(transport, 4096, 1 << 20, 2, -1, -1, passes) == 0);
		CHECK(passes[0] > 0 && passes[1] > 0);
		CHECK(bench_push(transport, BENCH_ANON, LENGTH, 2, -1, -1, passes) == 0);
		CHECK(passes[0] > 0 && passes[1] > 0);
	}
	CHECK(bench_socket_pair(7, (int[2]){ 0 }) == -EINVAL);
}

static void placing(void)
{
	uint64_t passes[2];

	for (uint32_t backing = BENCH_ANON; backing <= BENCH_SHMEM; backing++) {
		struct bench_scan_times times;

		for (uint32_t op = BENCH_COPY; op <= BENCH_MEMCPY; op++)
			CHECK(bench_place(backing, op, 3 * BENCH_TARGET_PAGE, LENGTH, 2, -1, passes) == 0);
		CHECK(bench_pagemap_scan(backing, LENGTH, -1, &times) == 0);
		CHECK(times.clean_pages == 0);
		CHECK(times.dirty_pages == LENGTH / BENCH_TARGET_PAGE);
	}
	CHECK(bench_place(BENCH_ANON, BENCH_COPY, 100, LENGTH, 2, -1, passes) == -EINVAL);
}

static void wakes(void)
{
	uint64_t samples[TOUCHES];

	CHECK(bench_wake_rtt(-1, -1, 1, TOUCHES, 0, samples) == TOUCHES);
	CHECK(bench_wake_rtt(-1, -1, 1, TOUCHES, 1, samples) == 1); /* a budget of 1 ns: one sample */
	CHECK(bench_wake_rtt(-1, 1023, 1, TOUCHES, 0, samples) == -EINVAL); /* no such processor */
	CHECK(bench_clock_cost_ps(1000) > 0);
}

int main(void)
{
	int fd = uffd_open_syscall(1 /* USER_MODE_ONLY */);

	if (fd < 0) {
		printf("userfaultfd: %s; remedy: sysctl vm.unprivileged_userfaultfd=1\n", strerror(-fd));
		return SKIP;
	}
	close(fd);
	wakes();
	local_faults();
	remote_faults();
	remote_fault_by_a_served_socket();
	remote_fault_without_a_peer();
	sockets();
	placing();
	return failures ? 1 : 0;
}
