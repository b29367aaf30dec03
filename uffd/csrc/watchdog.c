// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "watchdog.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "sleepers.h"

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

int watchdog_init(struct watchdog *w, int stop_fd, int report_fd, uint32_t stale_ms,
		  int traceback_signal, int exit_status)
{
	memset(w, 0, sizeof(*w));
	if (stale_ms == 0)
		return -EINVAL;
	w->stop_fd = stop_fd;
	w->report_fd = report_fd;
	w->stale_ms = stale_ms;
	w->traceback_signal = traceback_signal;
	w->exit_status = exit_status;
	for (uint32_t i = 0; i < WATCHDOG_TABLES; i++)
		w->watches[i].uffd = -1;
	return -pthread_mutex_init(&w->lock, NULL);
}

void watchdog_deinit(struct watchdog *w)
{
	pthread_mutex_destroy(&w->lock);
}

int watchdog_watch(struct watchdog *w, const struct pending_faults *table, int uffd)
{
	int index = -ENOSPC;

	pthread_mutex_lock(&w->lock);
	for (uint32_t i = 0; i < WATCHDOG_TABLES; i++) {
		if (w->watches[i].table || w->watches[i].uffd >= 0)
			continue;
		w->watches[i] = (struct watchdog_watch){ .table = table, .uffd = uffd };
		index = (int)i;
		break;
	}
	pthread_mutex_unlock(&w->lock);
	return index;
}

void watchdog_unwatch(struct watchdog *w, int index)
{
	pthread_mutex_lock(&w->lock);
	w->watches[index] = (struct watchdog_watch){ .uffd = -1 };
	pthread_mutex_unlock(&w->lock);
}

void watchdog_beat(struct watchdog *w)
{
	__atomic_fetch_add(&w->heartbeat, 1, __ATOMIC_RELAXED);
}

void watchdog_set_action(struct watchdog *w, uint32_t action)
{
	__atomic_store_n(&w->action, action, __ATOMIC_RELAXED);
}

uint64_t watchdog_reports(const struct watchdog *w)
{
	return __atomic_load_n(&w->reports, __ATOMIC_RELAXED);
}

/*
 * The signal is raised on this thread, so its handler runs here and now. Sent to the sleeper it would
 * only make it fault again.
 */
static void write_tracebacks(const struct watchdog *w)
{
	if (w->traceback_signal > 0)
		pthread_kill(pthread_self(), w->traceback_signal);
}

static void report(struct watchdog *w, uint64_t stale_ns, bool end)
{
	struct sleepers_report out = { .fd = w->report_fd, .now_ns = now_ns() };

	__atomic_fetch_add(&w->reports, 1, __ATOMIC_RELAXED);
	sleepers_print(&out,
		       "\nuserfaultfd watchdog: no Python has run for %llu ms and a thread sleeps on a "
		       "missing page.\n"
		       "A thread probably touched registered memory while holding the interpreter lock;\n"
		       "use the accessors that release it, or a page source that needs no Python.\n",
		       (unsigned long long)(stale_ns / 1000000));
	sleepers_write(&out, w->watches, WATCHDOG_TABLES, end);
	sleepers_print(&out, "Python threads:\n");
	write_tracebacks(w);
	if (end)
		sleepers_print(&out, "ending the process with status %d: the page will not come\n",
			       w->exit_status);
	else
		sleepers_print(&out, "still waiting: the page may yet come\n");
}

/* One look after the heartbeat was found stale. True when a report was written. */
static bool look(struct watchdog *w, uint64_t stale_ns, bool reported)
{
	bool end = __atomic_load_n(&w->action, __ATOMIC_RELAXED) == WATCHDOG_END;
	bool asleep;

	if (reported && !end)
		return true;
	pthread_mutex_lock(&w->lock);
	asleep = sleepers_exist(w->watches, WATCHDOG_TABLES);
	if (asleep)
		report(w, stale_ns, end);
	pthread_mutex_unlock(&w->lock);
	if (asleep && end)
		_exit(w->exit_status);
	return asleep;
}

int watchdog_run(struct watchdog *w)
{
	struct pollfd stop = { .fd = w->stop_fd, .events = POLLIN };
	int interval_ms = w->stale_ms / 4 > 0 ? (int)(w->stale_ms / 4) : 1;
	uint64_t seen = __atomic_load_n(&w->heartbeat, __ATOMIC_RELAXED);
	uint64_t since_ns = now_ns();
	bool reported = false;

	for (;;) {
		int n = poll(&stop, 1, interval_ms);
		uint64_t beat = __atomic_load_n(&w->heartbeat, __ATOMIC_RELAXED);
		uint64_t now = now_ns();

		if (n > 0)
			return 0;
		if (n < 0 && errno != EINTR)
			return -errno;
		if (beat != seen) {
			seen = beat;
			since_ns = now;
			reported = false;
		} else if (now - since_ns >= w->stale_ms * 1000000ull) {
			reported = look(w, now - since_ns, reported);
		}
	}
}
