// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "sigbus.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>

#include "uffd.h"

struct guarded {
	sigjmp_buf out;
	struct sigbus_fix fix;
	struct sigbus_report *report;
};

static __thread struct guarded *volatile current;
static pthread_mutex_t install_lock = PTHREAD_MUTEX_INITIALIZER;
static uint32_t installed;
static struct sigaction before_bus, before_segv;

/* Not ours: put the previous action back and let the access raise the signal again. */
static void decline(int signal)
{
	sigaction(signal, signal == SIGBUS ? &before_bus : &before_segv, NULL);
}

/* ioctl(2) is safe here; nothing else but plain stores and siglongjmp() is used. */
static void on_signal(int signal, siginfo_t *info, void *context)
{
	struct guarded *g = current;
	int64_t placed;
	uint64_t page;

	(void)context;
	if (!g) {
		decline(signal);
		return;
	}
	g->report->signal = signal;
	g->report->code = info->si_code;
	g->report->address = (uintptr_t)info->si_addr;
	g->report->hits++;
	if (g->fix.uffd < 0 || signal != SIGBUS)
		siglongjmp(g->out, 1);
	page = g->report->address & ~(g->fix.page_size - 1);
	placed = uffd_copy(g->fix.uffd, page, g->fix.source, g->fix.page_size, 0);
	if (placed < 0 && placed != -EEXIST) {
		g->report->error = (int32_t)placed;
		siglongjmp(g->out, 1);
	}
}

int sigbus_install(void)
{
	struct sigaction action = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_NODEFER };
	int rc = 0;

	pthread_mutex_lock(&install_lock);
	if (installed == 0 && (sigaction(SIGBUS, &action, &before_bus) < 0 ||
			       sigaction(SIGSEGV, &action, &before_segv) < 0))
		rc = -errno;
	else
		installed++;
	pthread_mutex_unlock(&install_lock);
	return rc;
}

void sigbus_uninstall(void)
{
	pthread_mutex_lock(&install_lock);
	if (installed > 0 && --installed == 0) {
		sigaction(SIGBUS, &before_bus, NULL);
		sigaction(SIGSEGV, &before_segv, NULL);
	}
	pthread_mutex_unlock(&install_lock);
}

static int guarded_access(uint64_t address, int value, const struct sigbus_fix *fix,
			  struct sigbus_report *report)
{
	struct guarded g = { .report = report };
	volatile uint8_t *at = (volatile uint8_t *)(uintptr_t)address;
	int result = 0;

	g.fix = *fix;
	memset(report, 0, sizeof(*report));
	if (sigsetjmp(g.out, 1) != 0) {
		current = NULL;
		return -EFAULT;
	}
	current = &g;
	if (value < 0)
		result = *at;
	else
		*at = (uint8_t)value;
	current = NULL;
	return result;
}

int sigbus_load_u8(uint64_t address, const struct sigbus_fix *fix, struct sigbus_report *report)
{
	return guarded_access(address, -1, fix, report);
}

int sigbus_store_u8(uint64_t address, uint8_t value, const struct sigbus_fix *fix,
		    struct sigbus_report *report)
{
	return guarded_access(address, value, fix, report);
}
