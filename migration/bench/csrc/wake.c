// SPDX-License-Identifier: MIT
/* What it costs to wake a sleeping thread: the unit all latencies of this project are made of. */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct wake_side {
	int mine;  /* signalled when it is this side's turn */
	int other;
	uint32_t warmup;
	uint32_t rounds;
	uint64_t budget_ns;
	uint64_t *samples_ns;
	int64_t recorded;
};

#define TURN 1u
#define STOP 2u

uint64_t bench_clock_cost_ps(uint32_t rounds)
{
	uint64_t begin = bench_now_ns(), end = begin;

	if (!rounds)
		return 0;
	for (uint32_t i = 0; i < rounds; i++)
		end = bench_now_ns();
	return (end - begin) * 1000u / rounds;
}

static int pass_turn(int fd, uint64_t turn)
{
	return bench_write_all(fd, &turn, sizeof(turn));
}

static int follow(void *arg)
{
	struct wake_side *side = arg;
	uint64_t turn = 0;
	int err;

	for (;;) {
		err = bench_read_all(side->mine, &turn, sizeof(turn));
		if (err || turn != TURN)
			return err;
		err = pass_turn(side->other, TURN);
		if (err)
			return err;
	}
}

static int lead(void *arg)
{
	struct wake_side *side = arg;
	uint64_t start = bench_now_ns(), turn;
	int err = 0;

	for (uint32_t i = 0; i < side->warmup + side->rounds && !err; i++) {
		uint64_t begin = bench_now_ns(), end;

		err = pass_turn(side->other, TURN);
		if (!err)
			err = bench_read_all(side->mine, &turn, sizeof(turn));
		end = bench_now_ns();
		if (i < side->warmup)
			continue;
		side->samples_ns[side->recorded++] = end - begin;
		if (side->budget_ns && end - start > side->budget_ns)
			break;
	}
	pass_turn(side->other, STOP);
	return err;
}

int64_t bench_wake_rtt(int32_t cpu_a, int32_t cpu_b, uint32_t warmup, uint32_t rounds,
		       uint64_t budget_ns, uint64_t *samples_ns)
{
	int a = eventfd(0, EFD_CLOEXEC), b = eventfd(0, EFD_CLOEXEC);
	struct wake_side leader = { a, b, warmup, rounds, budget_ns, samples_ns, 0 };
	struct wake_side follower = { b, a, 0, 0, 0, NULL, 0 };
	struct bench_thread lead_thread = { 0 }, follow_thread = { 0 };
	int err = a < 0 || b < 0 ? -errno : 0, lead_err, follow_err;

	if (!err)
		err = bench_thread_start(&follow_thread, cpu_b, follow, &follower);
	if (!err) {
		err = bench_thread_start(&lead_thread, cpu_a, lead, &leader);
		if (err)
			pass_turn(b, STOP);
	}
	lead_err = bench_thread_join(&lead_thread);
	follow_err = bench_thread_join(&follow_thread);
	if (a >= 0)
		close(a);
	if (b >= 0)
		close(b);
	if (!err)
		err = lead_err ? lead_err : follow_err;
	return err ? err : leader.recorded;
}
