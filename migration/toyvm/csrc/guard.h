/* SPDX-License-Identifier: MIT */
/*
 * A way out of a memory access that cannot be finished: a thread asleep in a userfault leaves it when it
 * is kicked, and an access to a poisoned page comes back as an answer instead of killing the process.
 *
 * A thread enters its guard, marks the one access that may sleep as a window, and touches. In the
 * window a kick (a real-time signal sent to that thread) or a SIGBUS jumps to the guard's environment.
 * Outside a window a kick does nothing, and a SIGBUS goes to whoever handled it before us.
 */
#ifndef TOYVM_GUARD_H
#define TOYVM_GUARD_H

#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>

enum guard_exit { GUARD_ENTERED, GUARD_KICKED, GUARD_LOST };

struct guard {
	sigjmp_buf env;
	/* Set around the access. Read by handlers running on this very thread. */
	volatile sig_atomic_t is_window;
	/* A SIGBUS is noted and returned from instead of jumped out of: the access was the kernel's, for us
	 * (KVM_RUN), and comes back by itself. */
	volatile sig_atomic_t is_noting;
	volatile sig_atomic_t is_lost;
	volatile uintptr_t lost_address;
	sigset_t old_mask;
	struct guard *outer;
};

/* Install the process's handlers; counted. uninstall puts back what was there, unless somebody else
 * has put theirs over ours since. Signal dispositions belong to the process, hence the one static in guard.c. */
int guard_install(void);
void guard_uninstall(void);
int guard_kick_signal(void);

/*
 * Use, in this order, in the function that stays on the stack until guard_leave:
 *	guard_enter(&guard);
 *	switch (sigsetjmp(guard.env, 0)) { case GUARD_ENTERED: work(); ... }
 *	guard_leave(&guard);
 */
void guard_enter(struct guard *guard);
void guard_leave(struct guard *guard);

/* The compiler must not move the access out of the window; the CPU's order does not matter to a handler
 * on the same thread. */
static inline void guard_open(struct guard *guard)
{
	guard->is_window = 1;
	__asm__ volatile("" ::: "memory");
}

static inline void guard_close(struct guard *guard)
{
	__asm__ volatile("" ::: "memory");
	guard->is_window = 0;
}

/* The two touches: one instruction each, so that they happened or did not. The write changes nothing, but
 * faults as a write. */
static inline void guard_touch_read(const void *p)
{
	uint64_t value;

	__asm__ volatile("movq %1, %0" : "=r"(value) : "m"(*(const volatile uint64_t *)p));
}

static inline void guard_touch_write(void *p)
{
	__asm__ volatile("lock addq $0, %0" : "+m"(*(volatile uint64_t *)p) : : "cc");
}

#endif
