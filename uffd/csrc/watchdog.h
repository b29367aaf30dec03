/* SPDX-License-Identifier: MIT */
/*
 * Finds the one hang nothing else in the process can report: a thread that touched a missing page while
 * it held the interpreter lock. It sleeps in the kernel, no Python runs, so a page source that needs
 * Python never answers.
 *
 * A heartbeat that needs the interpreter lock is counted by a small Python thread. When it stands still
 * for stale_ms while a thread of this process sleeps in a userfault, the loop writes a report with
 * write(2): thread, name, address, kernel function, stack if readable, and, by raising
 * traceback_signal on itself, whatever is hooked there (faulthandler's dump needs no lock). Then, with
 * WATCHDOG_END, it ends the process with exit_status. It never places or wakes a page.
 *
 * The loop must not need the interpreter: run it on a thread that released the lock.
 */
#ifndef UFFD_WATCHDOG_H
#define UFFD_WATCHDOG_H

#include <pthread.h>
#include <stdint.h>

#include "pending.h"

#define WATCHDOG_TABLES 16u
#define WATCHDOG_REPORT 0u	/* the page may still come: its source lives and needs no Python */
#define WATCHDOG_END 1u		/* nobody will bring it */

struct watchdog_watch {
	const struct pending_faults *table;	/* may be NULL */
	int uffd;	/* -1, or one of this process's memory: who waits on it is asked of the kernel, and
			 * unread messages are read for their address before the process is ended */
};

struct watchdog {
	int stop_fd;
	int report_fd;
	int traceback_signal;	/* 0: none */
	int exit_status;
	uint32_t stale_ms;
	uint32_t action;	/* atomic: may be changed while the loop runs */
	uint64_t heartbeat;	/* atomic */
	uint64_t reports;	/* atomic */
	pthread_mutex_t lock;	/* watches; held while a report is written */
	struct watchdog_watch watches[WATCHDOG_TABLES];
};

int watchdog_init(struct watchdog *w, int stop_fd, int report_fd, uint32_t stale_ms,
		  int traceback_signal, int exit_status);
void watchdog_deinit(struct watchdog *w);

/* Index of the watch, or -ENOSPC. The table must live until watchdog_unwatch(). */
int watchdog_watch(struct watchdog *w, const struct pending_faults *table, int uffd);
void watchdog_unwatch(struct watchdog *w, int index);

void watchdog_beat(struct watchdog *w);
void watchdog_set_action(struct watchdog *w, uint32_t action);
uint64_t watchdog_reports(const struct watchdog *w);

/* 0 when stop_fd became readable, or -errno. */
int watchdog_run(struct watchdog *w);

#endif
