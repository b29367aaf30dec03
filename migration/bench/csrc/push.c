// SPDX-License-Identifier: MIT
/* The push path alone: read RAM, write records, read records, place pages. The socket's and COPY's
 * bulk figures are each measured with the other side idle; this is what is left when both happen. */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "uffd.h"

#define RECORD_BYTES (BENCH_RECORD_HEADER + BENCH_TARGET_PAGE)
#define RECEIVE_BYTES (32u * RECORD_BYTES)

struct push_side {
	struct bench_region *region; /* receiver only */
	uint8_t *buffer;	     /* sender: RAM of length bytes; receiver: RECEIVE_BYTES */
	uint64_t length;
	uint32_t passes;
	uint64_t *passes_ns;
	int fd;
};

static int write_records(int fd, struct iovec *parts, int count)
{
	while (count) {
		ssize_t done = writev(fd, parts, count);

		if (done < 0 && errno == EINTR)
			continue;
		if (done < 0)
			return -errno;
		for (; count && (size_t)done >= parts->iov_len; parts++, count--)
			done -= (ssize_t)parts->iov_len;
		if (count) {
			parts->iov_base = (uint8_t *)parts->iov_base + done;
			parts->iov_len -= (size_t)done;
		}
	}
	return 0;
}

static int send_pass(struct push_side *side)
{
	uint64_t headers[BENCH_PUSH_BATCH];
	struct iovec parts[2 * BENCH_PUSH_BATCH];
	uint64_t at = 0;

	while (at < side->length) {
		int count = 0, err;

		for (; count < (int)BENCH_PUSH_BATCH && at < side->length; count++, at += BENCH_TARGET_PAGE) {
			headers[count] = at;
			parts[2 * count] = (struct iovec){ &headers[count], BENCH_RECORD_HEADER };
			parts[2 * count + 1] = (struct iovec){ side->buffer + at, BENCH_TARGET_PAGE };
		}
		err = write_records(side->fd, parts, 2 * count);
		if (err)
			return err;
	}
	return 0;
}

static int sender_main(void *arg)
{
	struct push_side *side = arg;
	uint8_t turn;
	int err = 0;

	for (uint32_t pass = 0; pass <= side->passes && !err; pass++) {
		uint64_t begin = bench_now_ns();

		err = send_pass(side);
		if (!err)
			err = bench_read_all(side->fd, &turn, 1); /* all placed */
		if (pass)
			side->passes_ns[pass - 1] = bench_now_ns() - begin;
		if (!err)
			err = bench_read_all(side->fd, &turn, 1); /* all missing again */
	}
	if (err)
		shutdown(side->fd, SHUT_RDWR);
	return err;
}

/* Place each whole record of the buffer, one COPY a page: headers lie between the pages, as in QEMU's
 * stream, so neighbours in RAM are not neighbours here. */
static int place_records(struct push_side *side, uint64_t *have, uint64_t *placed)
{
	uint64_t host = (uint64_t)(uintptr_t)side->region->host, at = 0;

	for (; *have - at >= RECORD_BYTES; at += RECORD_BYTES) {
		uint64_t offset;
		int64_t done;

		memcpy(&offset, side->buffer + at, sizeof(offset));
		if (offset % BENCH_TARGET_PAGE || offset >= side->length)
			return -EPROTO;
		done = uffd_copy(side->region->uffd, host + offset,
				 (uint64_t)(uintptr_t)(side->buffer + at + BENCH_RECORD_HEADER),
				 BENCH_TARGET_PAGE, 0);
		if (done < 0)
			return (int)done;
		*placed += BENCH_TARGET_PAGE;
	}
	memmove(side->buffer, side->buffer + at, *have - at);
	*have -= at;
	return 0;
}

static int receive_pass(struct push_side *side)
{
	uint64_t have = 0, placed = 0;

	while (placed < side->length) {
		ssize_t got = read(side->fd, side->buffer + have, RECEIVE_BYTES - have);
		int err;

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return got < 0 ? -errno : -ECONNRESET;
		have += (uint64_t)got;
		err = place_records(side, &have, &placed);
		if (err)
			return err;
	}
	return 0;
}

static int receiver_main(void *arg)
{
	struct push_side *side = arg;
	uint8_t turn = 1;
	int err = 0;

	for (uint32_t pass = 0; pass <= side->passes && !err; pass++) {
		err = receive_pass(side);
		if (!err)
			err = bench_write_all(side->fd, &turn, 1);
		if (!err)
			err = bench_region_discard(side->region);
		if (!err)
			err = bench_write_all(side->fd, &turn, 1);
	}
	if (err)
		shutdown(side->fd, SHUT_RDWR);
	return err;
}

static int run(struct push_side *sender, int sender_cpu, struct push_side *receiver, int receiver_cpu)
{
	struct bench_thread sends = { 0 }, receives = { 0 };
	int send_err, receive_err;
	int err = bench_thread_start(&receives, receiver_cpu, receiver_main, receiver);

	if (!err)
		err = bench_thread_start(&sends, sender_cpu, sender_main, sender);
	if (err)
		shutdown(sender->fd, SHUT_RDWR);
	send_err = bench_thread_join(&sends);
	receive_err = bench_thread_join(&receives);
	if (err)
		return err;
	/* A side that loses its peer says ECONNRESET; the other one knows why. */
	return send_err && send_err != -ECONNRESET ? send_err : receive_err ? receive_err : send_err;
}

int bench_push(uint32_t transport, uint32_t backing, uint64_t length, uint32_t passes,
	       int32_t sender_cpu, int32_t receiver_cpu, uint64_t *passes_ns)
{
	struct bench_region region;
	uint8_t *ram = NULL, *buffer = NULL;
	int fds[2], err;

	if (!length || length % BENCH_TARGET_PAGE || !passes || backing == BENCH_HUGETLB)
		return -EINVAL;
	err = bench_region_init(&region, backing, length);
	if (err)
		return err;
	err = bench_region_register(&region, UFFDIO_REGISTER_MODE_MISSING, 0);
	if (!err)
		err = bench_socket_pair(transport, fds);
	if (!err) {
		ram = bench_buffer_alloc(length);
		buffer = bench_buffer_alloc(RECEIVE_BYTES);
		if (ram && buffer) {
			struct push_side sender = { NULL, ram, length, passes, passes_ns, fds[0] };
			struct push_side receiver = { &region, buffer, length, passes, NULL, fds[1] };

			err = run(&sender, sender_cpu, &receiver, receiver_cpu);
		} else {
			err = -ENOMEM;
		}
		free(ram);
		free(buffer);
		close(fds[0]);
		close(fds[1]);
	}
	bench_region_deinit(&region);
	return err;
}
