/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "gate.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "guard.h"

/* until == NULL: for ever. WAIT_BITSET takes an absolute CLOCK_MONOTONIC time. */
static void gate_futex_wait(uint32_t *word, uint32_t value, const struct timespec *until)
{
	syscall(SYS_futex, word, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, value, until, NULL,
		FUTEX_BITSET_MATCH_ANY);
}

static void gate_futex_wake(uint32_t *word)
{
	syscall(SYS_futex, word, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, INT_MAX, NULL, NULL, 0);
}

uint64_t gate_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void gate_init(struct gate *gate)
{
	gate->want = GATE_PARK;
	gate->is = GATE_IS_PARKED;
}

void gate_go(struct gate *gate)
{
	__atomic_store_n(&gate->want, GATE_RUN, __ATOMIC_SEQ_CST);
	gate_futex_wake(&gate->want);
}

/*
 * Sequential consistency pairs with gate_wait: either the thread sees the new want, or we see it running.
 * A kick is never lost: outside its window the thread looks at `want` before it opens the next one, and
 * inside one the handler jumps out.
 */
void gate_ask_halt(struct gate *gate, uint8_t *immediate_exit)
{
	__atomic_store_n(&gate->want, GATE_PARK, __ATOMIC_SEQ_CST);
	if (immediate_exit)
		__atomic_store_n(immediate_exit, 1, __ATOMIC_SEQ_CST);
	gate_futex_wake(&gate->want);
	if (__atomic_load_n(&gate->is, __ATOMIC_SEQ_CST) == GATE_IS_RUNNING) {
		/* A full queue of real-time signals is the only refusal, and drains by itself. */
		while (pthread_kill(gate->thread, guard_kick_signal()) == EAGAIN)
			sched_yield();
	}
}

void gate_halt(struct gate *gate, uint8_t *immediate_exit)
{
	gate_ask_halt(gate, immediate_exit);
	while (__atomic_load_n(&gate->is, __ATOMIC_SEQ_CST) == GATE_IS_RUNNING)
		gate_futex_wait(&gate->is, GATE_IS_RUNNING, NULL);
	if (immediate_exit)
		__atomic_store_n(immediate_exit, 0, __ATOMIC_SEQ_CST);
}

void gate_quit(struct gate *gate)
{
	__atomic_store_n(&gate->want, GATE_QUIT, __ATOMIC_SEQ_CST);
	gate_futex_wake(&gate->want);
}

void gate_enter(struct gate *gate)
{
	gate->thread = pthread_self();
}

enum gate_want gate_wait(struct gate *gate)
{
	for (;;) {
		uint32_t want;

		__atomic_store_n(&gate->is, GATE_IS_PARKED, __ATOMIC_SEQ_CST);
		gate_futex_wake(&gate->is);
		while ((want = __atomic_load_n(&gate->want, __ATOMIC_SEQ_CST)) == GATE_PARK)
			gate_futex_wait(&gate->want, GATE_PARK, NULL);
		if (want == GATE_QUIT)
			return want;
		__atomic_store_n(&gate->is, GATE_IS_RUNNING, __ATOMIC_SEQ_CST);
		if (__atomic_load_n(&gate->want, __ATOMIC_SEQ_CST) == GATE_RUN)
			return GATE_RUN;
	}
}

void gate_park_self(struct gate *gate)
{
	uint32_t run = GATE_RUN;

	__atomic_compare_exchange_n(&gate->want, &run, GATE_PARK, false, __ATOMIC_SEQ_CST,
				    __ATOMIC_SEQ_CST);
}

bool gate_sleep_until(struct gate *gate, uint64_t monotonic_ns)
{
	struct timespec until = {
		.tv_sec = (time_t)(monotonic_ns / 1000000000u),
		.tv_nsec = (long)(monotonic_ns % 1000000000u),
	};

	while (gate_is_open(gate) && gate_now_ns() < monotonic_ns)
		gate_futex_wait(&gate->want, GATE_RUN, &until);
	return gate_is_open(gate);
}
