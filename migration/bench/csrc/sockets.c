// SPDX-License-Identifier: MIT
/* What a stream socket on this machine can do: latency of a round trip, bytes per second one way. */
#define _GNU_SOURCE
#include "bench.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define READ_BYTES_MIN 65536u

static int tcp_pair(int *fds_out)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int client = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int server = -1, one = 1, err = 0;

	if (listener < 0 || client < 0 ||
	    bind(listener, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(listener, 1) < 0 ||
	    getsockname(listener, (struct sockaddr *)&address, &length) < 0 ||
	    connect(client, (struct sockaddr *)&address, sizeof(address)) < 0)
		err = -errno;
	if (!err) {
		server = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		if (server < 0)
			err = -errno;
	}
	if (listener >= 0)
		close(listener);
	if (err) {
		if (client >= 0)
			close(client);
		return err;
	}
	/* A request must leave at once, not wait for the acknowledgement of the one before. */
	setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	setsockopt(server, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	fds_out[0] = client;
	fds_out[1] = server;
	return 0;
}

int bench_socket_pair(uint32_t transport, int *fds_out)
{
	if (transport == BENCH_TCP)
		return tcp_pair(fds_out);
	if (transport != BENCH_UNIX)
		return -EINVAL;
	return socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds_out) < 0 ? -errno : 0;
}

/* ---- round trip ---- */

struct echo_side {
	int fd;
	uint32_t request_bytes;
	uint32_t reply_bytes;
	uint32_t warmup;
	uint32_t rounds;
	uint8_t *buffer;
	uint64_t *samples_ns;
};

static int echo_server(void *arg)
{
	struct echo_side *side = arg;
	int err = 0;

	for (uint32_t i = 0; i < side->warmup + side->rounds && !err; i++) {
		err = bench_read_all(side->fd, side->buffer, side->request_bytes);
		if (!err)
			err = bench_write_all(side->fd, side->buffer, side->reply_bytes);
	}
	if (err)
		shutdown(side->fd, SHUT_RDWR);
	return err;
}

static int echo_client(void *arg)
{
	struct echo_side *side = arg;
	int err = 0;

	for (uint32_t i = 0; i < side->warmup + side->rounds && !err; i++) {
		uint64_t begin = bench_now_ns();

		err = bench_write_all(side->fd, side->buffer, side->request_bytes);
		if (!err)
			err = bench_read_all(side->fd, side->buffer, side->reply_bytes);
		if (i >= side->warmup)
			side->samples_ns[i - side->warmup] = bench_now_ns() - begin;
	}
	if (err)
		shutdown(side->fd, SHUT_RDWR);
	return err;
}

/* Run two bodies to their ends; a thread that cannot start must not leave the other one waiting. */
static int run_pair(const int *fds, int cpu_a, int (*a)(void *), void *arg_a, int cpu_b,
		    int (*b)(void *), void *arg_b)
{
	struct bench_thread first = { 0 }, second = { 0 };
	int err = bench_thread_start(&first, cpu_a, a, arg_a);
	int err_a, err_b;

	if (!err)
		err = bench_thread_start(&second, cpu_b, b, arg_b);
	if (err)
		shutdown(fds[0], SHUT_RDWR);
	err_a = bench_thread_join(&first);
	err_b = bench_thread_join(&second);
	if (err)
		return err;
	return err_a ? err_a : err_b;
}

int64_t bench_socket_rtt(uint32_t transport, uint32_t request_bytes, uint32_t reply_bytes,
			 int32_t client_cpu, int32_t server_cpu, uint32_t warmup, uint32_t rounds,
			 uint64_t *samples_ns)
{
	uint32_t longest = request_bytes > reply_bytes ? request_bytes : reply_bytes;
	uint8_t *buffers;
	int fds[2];
	int err;

	if (!request_bytes || !reply_bytes)
		return -EINVAL;
	err = bench_socket_pair(transport, fds);
	if (err)
		return err;
	buffers = bench_buffer_alloc(2u * (uint64_t)longest);
	if (buffers) {
		struct echo_side client = { fds[0], request_bytes, reply_bytes, warmup, rounds, buffers,
					    samples_ns };
		struct echo_side server = { fds[1], request_bytes, reply_bytes, warmup, rounds,
					    buffers + longest, NULL };

		err = run_pair(fds, server_cpu, echo_server, &server, client_cpu, echo_client, &client);
	} else {
		err = -ENOMEM;
	}
	free(buffers);
	close(fds[0]);
	close(fds[1]);
	return err ? err : (int64_t)rounds;
}

/* ---- one way ---- */

struct bulk_side {
	int fd;
	uint32_t chunk;
	uint64_t pass_bytes;
	uint32_t passes; /* recorded ones; one more goes before */
	uint8_t *buffer;
	uint64_t *passes_ns;
};

/* The sender starts a pass only when the receiver has finished the one before (one byte back), so
 * that a pass lasts from its first write to its last byte read. */
static int bulk_send(void *arg)
{
	struct bulk_side *side = arg;
	uint8_t done;
	int err = 0;

	for (uint32_t pass = 0; pass <= side->passes && !err; pass++) {
		uint64_t begin = bench_now_ns(), left = side->pass_bytes;

		while (left && !err) {
			uint64_t part = left < side->chunk ? left : side->chunk;

			err = bench_write_all(side->fd, side->buffer, part);
			left -= part;
		}
		if (!err)
			err = bench_read_all(side->fd, &done, 1);
		if (pass)
			side->passes_ns[pass - 1] = bench_now_ns() - begin;
	}
	if (err)
		shutdown(side->fd, SHUT_RDWR);
	return err;
}

static int bulk_receive(void *arg)
{
	struct bulk_side *side = arg;
	uint8_t done = 1;
	int err = 0;

	for (uint32_t pass = 0; pass <= side->passes && !err; pass++) {
		uint64_t left = side->pass_bytes;

		while (left && !err) {
			ssize_t got = read(side->fd, side->buffer, left < side->chunk ? left : side->chunk);

			if (got < 0 && errno == EINTR)
				continue;
			if (got <= 0)
				err = got < 0 ? -errno : -ECONNRESET;
			else
				left -= (uint64_t)got;
		}
		if (!err)
			err = bench_write_all(side->fd, &done, 1);
	}
	if (err)
		shutdown(side->fd, SHUT_RDWR);
	return err;
}

int bench_socket_bulk(uint32_t transport, uint32_t write_bytes, uint64_t pass_bytes, uint32_t passes,
		      int32_t sender_cpu, int32_t receiver_cpu, uint64_t *passes_ns)
{
	uint32_t read_bytes = write_bytes > READ_BYTES_MIN ? write_bytes : READ_BYTES_MIN;
	uint8_t *out, *in;
	int fds[2];
	int err;

	if (!write_bytes || !pass_bytes || !passes)
		return -EINVAL;
	err = bench_socket_pair(transport, fds);
	if (err)
		return err;
	out = bench_buffer_alloc(write_bytes);
	in = bench_buffer_alloc(read_bytes);
	if (out && in) {
		struct bulk_side sender = { fds[0], write_bytes, pass_bytes, passes, out, passes_ns };
		struct bulk_side receiver = { fds[1], read_bytes, pass_bytes, passes, in, NULL };

		err = run_pair(fds, receiver_cpu, bulk_receive, &receiver, sender_cpu, bulk_send, &sender);
	} else {
		err = -ENOMEM;
	}
	free(out);
	free(in);
	close(fds[0]);
	close(fds[1]);
	return err;
}
