/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "guard.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>

/* Initial-exec: the handler must not be the first to touch this thread's copy, because that may allocate. */
static __thread struct guard *guard_current __attribute__((tls_model("initial-exec")));

/* Signal dispositions are the process's, so is the memory of what was there before. */
static pthread_mutex_t guard_lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned int guard_users;
static struct sigaction guard_old_bus, guard_old_kick;

int guard_kick_signal(void)
{
	return SIGRTMIN + 5;
}

static void guard_signals(sigset_t *set)
{
	sigemptyset(set);
	sigaddset(set, guard_kick_signal());
	sigaddset(set, SIGBUS);
}

/* The signal we are in is blocked until its handler returns, which this one never does; and a blocked
 * SIGBUS at the next lost page would end the process. */
static void guard_jump(struct guard *guard, enum guard_exit how)
{
	sigset_t set;

	guard->is_window = 0;
	guard_signals(&set);
	pthread_sigmask(SIG_UNBLOCK, &set, NULL);
	siglongjmp(guard->env, how);
}

static void guard_on_kick(int number, siginfo_t *info, void *context)
{
	struct guard *guard = guard_current;

	(void)number, (void)info, (void)context;
	if (guard && guard->is_window && !guard->is_noting)
		guard_jump(guard, GUARD_KICKED);
}

/* Not ours: do what would have been done without us. */
static void guard_pass_on(int number, siginfo_t *info, void *context)
{
	if (guard_old_bus.sa_flags & SA_SIGINFO) {
		guard_old_bus.sa_sigaction(number, info, context);
	} else if (guard_old_bus.sa_handler != SIG_DFL && guard_old_bus.sa_handler != SIG_IGN) {
		guard_old_bus.sa_handler(number);
	} else {
		/* The kernel never ignores a SIGBUS of a faulting instruction, so returning into
		 * it with the default action ends the process there; a sent one needs raising again. */
		struct sigaction standard = { .sa_handler = SIG_DFL };

		sigaction(number, &standard, NULL);
		if (info->si_code <= 0)
			raise(number);
	}
}

static void guard_on_bus(int number, siginfo_t *info, void *context)
{
	struct guard *guard = guard_current;

	if (!guard || !guard->is_window || info->si_code <= 0) {
		guard_pass_on(number, info, context);
		return;
	}
	guard->lost_address = (uintptr_t)info->si_addr;
	guard->is_lost = 1;
	if (!guard->is_noting)
		guard_jump(guard, GUARD_LOST);
}

int guard_install(void)
{
	/* The kick leaves system calls with EINTR: KVM_RUN and futex waits must come back. */
	struct sigaction kick = { .sa_sigaction = guard_on_kick, .sa_flags = SA_SIGINFO };
	struct sigaction bus = { .sa_sigaction = guard_on_bus, .sa_flags = SA_SIGINFO | SA_ONSTACK };
	int err = 0;

	pthread_mutex_lock(&guard_lock);
	if (guard_users++ == 0) {
		if (sigaction(guard_kick_signal(), &kick, &guard_old_kick) ||
		    sigaction(SIGBUS, &bus, &guard_old_bus)) {
			err = -errno;
			guard_users--;
		}
	}
	pthread_mutex_unlock(&guard_lock);
	return err;
}

static void guard_restore(int number, void (*ours)(int, siginfo_t *, void *),
			  const struct sigaction *old)
{
	struct sigaction now;

	if (sigaction(number, NULL, &now) == 0 && (now.sa_flags & SA_SIGINFO) &&
	    now.sa_sigaction == ours)
		sigaction(number, old, NULL);
}

void guard_uninstall(void)
{
	pthread_mutex_lock(&guard_lock);
	if (guard_users && --guard_users == 0) {
		guard_restore(guard_kick_signal(), guard_on_kick, &guard_old_kick);
		guard_restore(SIGBUS, guard_on_bus, &guard_old_bus);
	}
	pthread_mutex_unlock(&guard_lock);
}

void guard_enter(struct guard *guard)
{
	sigset_t set;

	guard->is_window = 0;
	guard->is_noting = 0;
	guard->is_lost = 0;
	guard->lost_address = 0;
	guard->outer = guard_current;
	guard_current = guard;
	guard_signals(&set);
	pthread_sigmask(SIG_UNBLOCK, &set, &guard->old_mask);
}

void guard_leave(struct guard *guard)
{
	pthread_sigmask(SIG_SETMASK, &guard->old_mask, NULL);
	guard_current = guard->outer;
}
