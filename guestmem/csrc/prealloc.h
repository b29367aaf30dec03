/* SPDX-License-Identifier: MIT */
/* Making pages exist before anybody needs them, by several threads at once. */
#ifndef GUESTMEM_PREALLOC_H
#define GUESTMEM_PREALLOC_H

#include <stdatomic.h>
#include <stdint.h>

/* One stretch of memory, shared by the threads that work on it. The caller owns it. */
struct prealloc_job {
	uint64_t start, length;
	uint64_t page_size;		/* host page: bytes populated by one touch */
	_Atomic uint64_t next;		/* offset of the first part nobody has taken */
	_Atomic uint64_t done;		/* bytes that exist now; may be read at any time */
	_Atomic int64_t error;		/* -errno of the first failure; the others stop then */
};

struct prealloc_job *prealloc_new(uint64_t start, uint64_t length, uint64_t page_size);
void prealloc_free(struct prealloc_job *job);
/* A thread's work: parts of the job until there are none. 0 or the job's -errno. */
int64_t prealloc_work(struct prealloc_job *job);
void prealloc_stop(struct prealloc_job *job);	/* any thread: -ECANCELED */
uint64_t prealloc_done(const struct prealloc_job *job);

#endif
