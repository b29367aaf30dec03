// SPDX-License-Identifier: MIT
/* The floor of one remote fault, all of it and nothing else.
 *
 *   toucher --fault--> fault thread --request--> peer --page--> listen thread --COPY, wake--> toucher
 *
 * The threads are those of a postcopy destination; what they leave out (bitmaps, de-duplication, record
 * parsing, checksums, a queue at the source) is what a runtime adds. */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "toucher.h"
#include "uffd.h"

#define MESSAGES_PER_READ 16

struct request {
	uint64_t offset;
	uint32_t length;
	uint32_t sequence;
};
_Static_assert(sizeof(struct request) == BENCH_REQUEST_BYTES, "a request is 16 bytes");
_Static_assert(sizeof(struct request) == BENCH_REPLY_HEADER, "the reply's header repeats it");

struct destination {
	struct bench_region *region;
	const struct bench_fault_config *config;
	uint8_t *staging; /* one host page: where a reply's page arrives before it is placed */
	int fd;
	int stop_fd;
	atomic_int *failed;
	struct bench_fault_counts counts;
};

static int fail(struct destination *d, int err)
{
	bench_fail(d->failed, err);
	bench_region_give_up(d->region);
	shutdown(d->fd, SHUT_RDWR);
	return err;
}

static int send_request(struct destination *d, const struct uffd_msg *message)
{
	uint64_t host = (uint64_t)(uintptr_t)d->region->host;
	uint64_t page = message->arg.pagefault.address & ~(d->region->page_size - 1);
	struct request request = { page - host, (uint32_t)d->region->page_size, 0 };

	if (message->event != UFFD_EVENT_PAGEFAULT)
		return -EPROTO;
	request.sequence = (uint32_t)d->counts.messages++;
	return bench_write_all(d->fd, &request, sizeof(request));
}

static int fault_loop(struct destination *d)
{
	struct uffd_msg messages[MESSAGES_PER_READ];

	for (;;) {
		int ready = bench_await_fault(d->region->uffd, d->stop_fd, d->config->handler_spins);
		int64_t count;
		int err = 0;

		if (ready <= 0)
			return ready;
		count = uffd_read(d->region->uffd, messages, MESSAGES_PER_READ);
		if (count < 0)
			return (int)count;
		d->counts.reads += count > 0;
		for (int64_t i = 0; i < count && !err; i++)
			err = send_request(d, &messages[i]);
		if (err)
			return err;
	}
}

static int fault_main(void *arg)
{
	struct destination *d = arg;
	int err = fault_loop(d);

	return err ? fail(d, err) : 0;
}

/* Header and page in one call where the kernel has both: a second read is a second wake-up when the
 * peer's two parts arrive apart. */
static int read_reply(int fd, struct request *header, void *page, uint64_t page_bytes, bool spins)
{
	struct iovec parts[2] = { { header, sizeof(*header) }, { page, page_bytes } };
	struct msghdr message = { .msg_iov = parts, .msg_iovlen = 2 };
	uint64_t got;
	ssize_t done;

	do
		done = recvmsg(fd, &message, spins ? MSG_DONTWAIT : 0);
	while (done < 0 && (errno == EINTR || (spins && errno == EAGAIN)));
	if (done < 0)
		return -errno;
	if (done == 0)
		return -ECONNRESET;
	got = (uint64_t)done;
	if (got < sizeof(*header)) {
		int err = bench_read_all(fd, (uint8_t *)header + got, sizeof(*header) - got);

		if (err)
			return err;
		got = sizeof(*header);
	}
	got -= sizeof(*header);
	return bench_read_all(fd, (uint8_t *)page + got, page_bytes - got);
}

static int listen_loop(struct destination *d)
{
	uint64_t total = (uint64_t)d->config->warmup + d->config->touches;
	uint64_t page_bytes = d->region->page_size;

	while (d->counts.placed < total && !atomic_load(d->failed)) {
		struct request header = { 0 };
		int64_t done;
		int err = read_reply(d->fd, &header, d->staging, page_bytes, d->config->handler_spins);

		if (err)
			return err;
		if (header.length != page_bytes || header.offset > d->region->length - page_bytes)
			return -EPROTO;
		done = uffd_copy(d->region->uffd, (uint64_t)(uintptr_t)d->region->host + header.offset,
				 (uint64_t)(uintptr_t)d->staging, page_bytes, 0);
		if (done < 0)
			return (int)done;
		if ((uint64_t)done != page_bytes)
			return -EIO;
		d->counts.placed++;
	}
	return 0;
}

static int listen_main(void *arg)
{
	struct destination *d = arg;
	int err = listen_loop(d);

	return err ? fail(d, err) : 0;
}

/* ---- peer ---- */

struct peer {
	int fd;
	uint32_t page_bytes;
	uint32_t pages;
	int64_t served;
};

static int reply(int fd, struct request *request, uint8_t *page, uint32_t page_bytes)
{
	struct iovec parts[2] = { { request, sizeof(*request) }, { page, page_bytes } };
	ssize_t done = writev(fd, parts, 2);
	uint64_t sent;

	if (done < 0)
		return -errno;
	sent = (uint64_t)done;
	if (sent < sizeof(*request))
		return -EIO; /* never seen: 16 bytes into an empty socket buffer */
	sent -= sizeof(*request);
	return bench_write_all(fd, page + sent, page_bytes - sent);
}

static int serve(struct peer *peer, uint8_t *ram)
{
	struct request request;

	for (;;) {
		uint64_t page;
		int err = bench_read_all(peer->fd, &request, sizeof(request));

		if (err)
			return err == -ECONNRESET ? 0 : err;
		page = request.offset / peer->page_bytes;
		if (request.length != peer->page_bytes || page >= peer->pages)
			return -EPROTO;
		err = reply(peer->fd, &request, ram + page * peer->page_bytes, peer->page_bytes);
		if (err)
			return err;
		peer->served++;
	}
}

static int peer_main(void *arg)
{
	struct peer *peer = arg;
	uint8_t *ram = bench_buffer_alloc((uint64_t)peer->pages * peer->page_bytes);
	int err = -ENOMEM;

	if (ram) {
		for (uint64_t i = 0; i < peer->pages; i++) {
			uint64_t stamp = BENCH_STAMP + i;

			memcpy(ram + i * peer->page_bytes, &stamp, sizeof(stamp));
		}
		err = serve(peer, ram);
	}
	if (err)
		shutdown(peer->fd, SHUT_RDWR);
	free(ram);
	return err;
}

int64_t bench_remote_serve(int32_t fd, uint32_t page_bytes, uint32_t pages, int32_t cpu)
{
	struct peer peer = { fd, page_bytes, pages, 0 };
	struct bench_thread thread = { 0 };
	int err;

	if (!page_bytes || !pages)
		return -EINVAL;
	err = bench_thread_start(&thread, cpu, peer_main, &peer);
	if (!err)
		err = bench_thread_join(&thread);
	return err ? err : peer.served;
}

/* ---- the whole path ---- */

static int run_destination(struct destination *d, struct bench_toucher *toucher)
{
	const struct bench_fault_config *config = d->config;
	struct bench_thread faults = { 0 }, listens = { 0 }, touches = { 0 };
	int err, touch_err, fault_err, listen_err;

	err = bench_thread_start(&faults, config->handler_cpu, fault_main, d);
	if (!err)
		err = bench_thread_start(&listens, config->listen_cpu, listen_main, d);
	if (!err)
		err = bench_thread_start(&touches, config->toucher_cpu, bench_touch, toucher);
	if (err) {
		uint64_t stop = 1;

		fail(d, err);
		bench_write_all(d->stop_fd, &stop, sizeof(stop));
	}
	touch_err = bench_thread_join(&touches);
	listen_err = bench_thread_join(&listens);
	fault_err = bench_thread_join(&faults);
	if (err)
		return err;
	err = atomic_load(d->failed); /* the first cause, not what it led to */
	if (err)
		return err;
	return fault_err ? fault_err : listen_err ? listen_err : touch_err;
}

static int measure(const struct bench_fault_config *config, struct bench_region *region,
		   uint8_t *staging, int fd, uint64_t *samples_ns, struct bench_fault_counts *counts)
{
	atomic_int failed = 0;
	int stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	struct destination d = { region, config, staging, fd, stop_fd, &failed, { 0 } };
	struct bench_toucher toucher = { .region = region, .config = config, .samples_ns = samples_ns,
					 .stamped_by_page = true, .stop_fd = stop_fd, .failed = &failed };
	int err;

	if (stop_fd < 0)
		return -errno;
	err = run_destination(&d, &toucher);
	close(stop_fd);
	*counts = d.counts;
	counts->touches = toucher.touches;
	counts->wrong = toucher.wrong;
	return err;
}

static int with_own_peer(const struct bench_fault_config *config, struct bench_region *region,
			 uint8_t *staging, uint64_t *samples_ns, struct bench_fault_counts *counts)
{
	struct peer peer = { .page_bytes = (uint32_t)region->page_size, .pages = config->region_pages };
	struct bench_thread thread = { 0 };
	int fds[2], peer_err;
	int err = bench_socket_pair(config->transport, fds);

	if (err)
		return err;
	peer.fd = fds[1];
	err = bench_thread_start(&thread, config->peer_cpu, peer_main, &peer);
	if (!err)
		err = measure(config, region, staging, fds[0], samples_ns, counts);
	shutdown(fds[0], SHUT_RDWR);
	peer_err = bench_thread_join(&thread);
	close(fds[0]);
	close(fds[1]);
	return err ? err : peer_err;
}

int64_t bench_remote_fault(const struct bench_fault_config *config, int32_t peer_fd,
			   uint64_t *samples_ns, struct bench_fault_counts *counts)
{
	struct bench_region region;
	uint8_t *staging;
	int err;

	if (!config->region_pages || !config->touches)
		return -EINVAL;
	err = bench_region_init(&region, config->backing,
				(uint64_t)config->region_pages *
					(config->backing == BENCH_HUGETLB ? BENCH_HUGE_PAGE : BENCH_TARGET_PAGE));
	if (err)
		return err;
	staging = bench_buffer_alloc(region.page_size);
	err = staging ? bench_region_register(&region, UFFDIO_REGISTER_MODE_MISSING, 0) : -ENOMEM;
	if (!err && peer_fd >= 0)
		err = measure(config, &region, staging, peer_fd, samples_ns, counts);
	else if (!err)
		err = with_own_peer(config, &region, staging, samples_ns, counts);
	free(staging);
	bench_region_deinit(&region);
	return err ? err : (int64_t)config->touches;
}
