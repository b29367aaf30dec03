/* SPDX-License-Identifier: MIT */
/*
 * Which threads of this process sleep in a userfault, told from /proc/self/task and the pending tables.
 * Uses no allocator, no stdio and no lock: a sleeping thread may hold any of them.
 */
#ifndef UFFD_SLEEPERS_H
#define UFFD_SLEEPERS_H

#include <stdbool.h>
#include <stdint.h>

#include "watchdog.h"

struct sleepers_report {
	int fd;
	uint64_t now_ns;
};

/*
 * A thread of a pending table that really still sleeps, one the kernel shows in a userfault, or a watched
 * userfaultfd with waiters.
 */
bool sleepers_exist(const struct watchdog_watch *watches, uint32_t count);

/* take_messages: also read the watched userfaultfds' unread messages; only before ending the process. */
void sleepers_write(struct sleepers_report *out, const struct watchdog_watch *watches, uint32_t count,
		    bool take_messages);

__attribute__((format(printf, 2, 3))) void sleepers_print(const struct sleepers_report *out,
							    const char *format, ...);

#endif
