/* SPDX-License-Identifier: MIT */
/* What the bench measures of the machine itself: the costs no runtime can go below.
 *
 * Every function makes its own threads, memory and sockets, measures, takes everything down again and
 * returns; nothing is kept between calls and nothing is global. Results are ">= 0 or -errno", samples go
 * to arrays of the caller. Times are CLOCK_MONOTONIC nanoseconds. A cpu of -1 means "wherever the
 * scheduler puts it". */
#ifndef POSTCOPY_BENCH_H
#define POSTCOPY_BENCH_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

enum bench_backing { BENCH_ANON = 0, BENCH_SHMEM = 1, BENCH_HUGETLB = 2 };
enum bench_place_op { BENCH_COPY = 0, BENCH_ZEROPAGE = 1, BENCH_MEMCPY = 2 };
enum bench_transport { BENCH_UNIX = 0, BENCH_TCP = 1 };

#define BENCH_TARGET_PAGE 4096u
#define BENCH_HUGE_PAGE (2u << 20)
#define BENCH_REQUEST_BYTES 16u	   /* one page request: u64 offset, u32 length, u32 sequence */
#define BENCH_REPLY_HEADER 16u	   /* before the page: the request, given back */
#define BENCH_RECORD_HEADER 8u	   /* before each page of the push stream: u64 offset */
#define BENCH_PUSH_BATCH 16u	   /* pages per write of the push stream */

/* ---- common.c: clock, threads, memory, userfaultfd ---- */

struct bench_thread {
	pthread_t id;
	int (*body)(void *arg);
	void *arg;
	int result;
	bool started;
};

struct bench_region {
	uint8_t *host;
	uint64_t length;
	uint64_t page_size; /* of the host page: what one COPY places */
	int memfd;	    /* -1: anonymous */
	int uffd;	    /* -1: not registered */
};

uint64_t bench_now_ns(void);
int bench_thread_start(struct bench_thread *thread, int cpu, int (*body)(void *), void *arg);
int bench_thread_join(struct bench_thread *thread); /* what body returned; 0 if never started */
int bench_region_init(struct bench_region *region, uint32_t backing, uint64_t length);
void bench_region_deinit(struct bench_region *region);
int bench_region_register(struct bench_region *region, uint64_t mode, uint64_t features);
int bench_region_discard(struct bench_region *region); /* every page missing again */
void bench_region_give_up(struct bench_region *region); /* lets a sleeper go on, with zeros */
void *bench_buffer_alloc(uint64_t length);		/* page-aligned, every page touched; free() it */
int bench_write_all(int fd, const void *data, uint64_t length);
int bench_read_all(int fd, void *data, uint64_t length); /* -ECONNRESET at a premature end */

/* ---- wake.c ---- */

/* Mean cost of reading the clock that times everything here, in picoseconds. */
uint64_t bench_clock_cost_ps(uint32_t rounds);

/* Two threads hand a turn to and fro through eventfds. One sample is one round trip: two wake-ups.
 * The first `warmup` are not recorded; ends after `rounds` more or, once there is one sample, when
 * `budget_ns` (if not 0) have passed. Returns the number of samples. */
int64_t bench_wake_rtt(int32_t cpu_a, int32_t cpu_b, uint32_t warmup, uint32_t rounds,
		       uint64_t budget_ns, uint64_t *samples_ns);

/* ---- fault.c ---- */

struct bench_fault_config {
	uint32_t backing;
	uint32_t region_pages; /* host pages; all are touched, discarded, touched again */
	uint32_t warmup;
	uint32_t touches; /* recorded ones */
	int32_t toucher_cpu;
	int32_t handler_cpu;
	uint32_t handler_spins; /* 1: the handler polls without sleeping */
	uint32_t transport;	/* remote only */
	int32_t listen_cpu;	/* remote only: who places the reply */
	int32_t peer_cpu;	/* remote only, if the peer is a thread of ours */
};

struct bench_fault_counts {
	uint64_t touches;  /* all, warm-up too */
	uint64_t messages; /* missing-fault messages read from the userfaultfd */
	uint64_t reads;	   /* read(2) calls that returned at least one */
	uint64_t placed;   /* host pages placed */
	uint64_t wrong;	   /* touches that did not see the bytes placed for them */
};

/* One thread touches missing pages, another resolves them by UFFDIO_COPY. Samples: the touch as the
 * toucher felt it. Returns the number of samples. */
int64_t bench_fault_rtt(const struct bench_fault_config *config, uint64_t *samples_ns,
			struct bench_fault_counts *counts);

/* ---- sockets.c ---- */

int bench_socket_pair(uint32_t transport, int *fds_out); /* two connected stream sockets, CLOEXEC */

int64_t bench_socket_rtt(uint32_t transport, uint32_t request_bytes, uint32_t reply_bytes,
			 int32_t client_cpu, int32_t server_cpu, uint32_t warmup, uint32_t rounds,
			 uint64_t *samples_ns);

/* One way, until the receiver has read the last byte. passes_ns gets one duration per pass of
 * pass_bytes each; the first, unrecorded pass warms up. */
int bench_socket_bulk(uint32_t transport, uint32_t write_bytes, uint64_t pass_bytes, uint32_t passes,
		      int32_t sender_cpu, int32_t receiver_cpu, uint64_t *passes_ns);

/* ---- place.c ---- */

/* Fill a region of length bytes, batch bytes per call; one duration per pass, the first not recorded. */
int bench_place(uint32_t backing, uint32_t op, uint64_t batch, uint64_t length, uint32_t passes,
		int32_t cpu, uint64_t *passes_ns);

struct bench_scan_times {
	uint64_t clean_ns;	   /* nothing written since protection: get and protect */
	uint64_t dirty_get_ns;	   /* every page written: get only */
	uint64_t dirty_protect_ns; /* every page written: get and protect again */
	uint64_t write_ns;	   /* first write to each page under WP_ASYNC */
	uint64_t dirty_pages;	   /* pages the scan reported written: must be all of them */
	uint64_t clean_pages;	   /* and none */
};

int bench_pagemap_scan(uint32_t backing, uint64_t length, int32_t cpu, struct bench_scan_times *out);

/* ---- remote.c ---- */

/* The floor of a remote fault as one path: touch, fault message, 16-byte request over a socket, a peer
 * that answers with header and page, UFFDIO_COPY by a second local thread, wake. peer_fd >= 0: the peer
 * is behind this socket (bench_remote_serve in another process) and stays connected; -1: a thread of
 * ours over config->transport. Returns the number of samples. */
int64_t bench_remote_fault(const struct bench_fault_config *config, int32_t peer_fd,
			   uint64_t *samples_ns, struct bench_fault_counts *counts);

/* Answer requests on fd until its end; returns how many. The page is read from `pages` pages of memory
 * that are all present, as the source's RAM is. */
int64_t bench_remote_serve(int32_t fd, uint32_t page_bytes, uint32_t pages, int32_t cpu);

/* ---- push.c ---- */

/* The push path alone: one thread writes header+page records, another reads and places each page.
 * One duration per pass over a region of length bytes, the first not recorded. */
int bench_push(uint32_t transport, uint32_t backing, uint64_t length, uint32_t passes,
	       int32_t sender_cpu, int32_t receiver_cpu, uint64_t *passes_ns);

#endif
