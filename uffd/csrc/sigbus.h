/* SPDX-License-Identifier: MIT */
/*
 * Accesses that survive SIGBUS and SIGSEGV: for poisoned pages, the SIGBUS feature and guard regions.
 *
 * A signal handler finds its state only through the thread it runs on, so this file keeps one
 * thread-local pointer and, between install and uninstall, the process's two signal actions: the only
 * state of its kind here. A signal that hits outside a guarded access goes to the action that was there
 * before.
 */
#ifndef UFFD_SIGBUS_H
#define UFFD_SIGBUS_H

#include <stdint.h>

struct sigbus_report {
	int32_t signal;		/* 0: none came */
	int32_t code;		/* si_code: BUS_ADRERR 2, BUS_MCEERR_AR 4, SEGV_MAPERR 1 */
	uint64_t address;	/* si_addr */
	uint32_t hits;
	int32_t error;		/* of the COPY in the handler, 0 or -errno */
};

/* How the SIGBUS feature is meant to be used: place the page inside the handler and try again. */
struct sigbus_fix {
	int32_t uffd;		/* -1: do not, give up the access */
	int32_t reserved;
	uint64_t page_size;
	uint64_t source;	/* address of one host page of bytes */
};

/* Process-wide; nested installs are counted. 0 or -errno. */
int sigbus_install(void);
void sigbus_uninstall(void);

/* The byte read (0-255), or -EFAULT with *report saying which signal came. */
int sigbus_load_u8(uint64_t address, const struct sigbus_fix *fix, struct sigbus_report *report);
/* 0 or -EFAULT. */
int sigbus_store_u8(uint64_t address, uint8_t value, const struct sigbus_fix *fix,
		    struct sigbus_report *report);

#endif
