/* SPDX-License-Identifier: MIT */
/*
 * Start and stop of a thread that serves guest work.
 *
 * The thread lives as long as its machine and sleeps at the gate while the guest is stopped, so that
 * letting it run is one futex wake and needs no new thread and no interpreter: at the destination that is
 * downtime. gate_go, gate_halt and gate_quit are called by one thread at a time (the machine's lock).
 */
#ifndef TOYVM_GATE_H
#define TOYVM_GATE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

enum gate_want { GATE_PARK, GATE_RUN, GATE_QUIT };
enum gate_is { GATE_IS_PARKED, GATE_IS_RUNNING };

struct gate {
	uint32_t want;                          /* futex word: what the machine wants */
	uint32_t is;                            /* futex word: what the thread does */
	pthread_t thread;                       /* valid once `is` was GATE_IS_RUNNING */
};

void gate_init(struct gate *gate);

/* The machine's side. halt returns when the thread is parked: it kicks it out of a sleep on a missing
 * page, so it never waits for one. ask_halt is its first half, so that several threads can park at the same
 * time. `immediate_exit` is KVM's flag for the same purpose, or NULL. */
void gate_go(struct gate *gate);
void gate_ask_halt(struct gate *gate, uint8_t *immediate_exit);
void gate_halt(struct gate *gate, uint8_t *immediate_exit);
void gate_quit(struct gate *gate);

/* The thread's side. enter comes first, once. wait parks until something is wanted and answers it. park_self gives up running
 * until the next gate_go. sleep_until returns early, with false, when running is no longer wanted. */
void gate_enter(struct gate *gate);
enum gate_want gate_wait(struct gate *gate);
void gate_park_self(struct gate *gate);
bool gate_sleep_until(struct gate *gate, uint64_t monotonic_ns);

static inline bool gate_is_open(const struct gate *gate)
{
	return __atomic_load_n(&gate->want, __ATOMIC_RELAXED) == GATE_RUN;
}

static inline bool gate_is_running(const struct gate *gate)
{
	return __atomic_load_n(&gate->is, __ATOMIC_ACQUIRE) == GATE_IS_RUNNING;
}

uint64_t gate_now_ns(void);                     /* CLOCK_MONOTONIC */

#endif
