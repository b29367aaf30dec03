// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "host.h"

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#ifndef MLOCK_ONFAULT
#define MLOCK_ONFAULT 1u
#endif

int host_die_with_parent(int parent)
{
	if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0))
		return -errno;
	/* It may have ended before the line above. */
	return getppid() == parent ? 0 : -ESRCH;
}

int host_keep_proc(void)
{
	return prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) ? -errno : 0;
}

int host_can_lock(uint64_t len)
{
	void *at = mmap(NULL, len, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	int err = 0;

	if (at == MAP_FAILED)
		return -errno;
	if (mlock2(at, len, MLOCK_ONFAULT))
		err = -errno;
	munmap(at, len);
	return err;
}
