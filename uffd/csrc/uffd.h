/* SPDX-License-Identifier: MIT */
/*
 * Thin wrappers over the userfaultfd kernel interface.
 *
 * One call is one system call. A result is >= 0 (a count where one makes sense) or -errno; nothing
 * is retried and no page is looked at. No globals, no allocation: safe from any thread.
 *
 * The operations that report progress (copy, zeropage, continue, poison, move) return the bytes done.
 * A short count is an answer, not an error: the kernel stops where something is in the way, and the
 * next call from there says what it is. "Nothing done" is always -errno, so a count is never 0.
 */
#ifndef UFFD_UFFD_H
#define UFFD_UFFD_H

#include <stdint.h>

struct uffd_msg;

/* Both take O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY. */
int uffd_open_syscall(int flags);
int uffd_open_dev(int flags);

/* The handshake. features_out is what the kernel supports, not what was enabled. */
int uffd_api(int fd, uint64_t features, uint64_t *features_out, uint64_t *ioctls_out);

int uffd_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls_out);
int uffd_unregister(int fd, uint64_t start, uint64_t len);

int64_t uffd_copy(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode);
int64_t uffd_zeropage(int fd, uint64_t start, uint64_t len, uint64_t mode);
int64_t uffd_continue(int fd, uint64_t start, uint64_t len, uint64_t mode);
int64_t uffd_poison(int fd, uint64_t start, uint64_t len, uint64_t mode);
int64_t uffd_move(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode);

/* All or error; nothing was done on -EAGAIN (an event waits to be read). */
int uffd_writeprotect(int fd, uint64_t start, uint64_t len, uint64_t mode);
int uffd_rwprotect(int fd, uint64_t start, uint64_t len, uint64_t mode);
int uffd_set_mode(int fd, uint64_t enable, uint64_t disable);

int uffd_wake(int fd, uint64_t start, uint64_t len);

/* Count of messages, 0 = none waiting, or -errno (-EINTR only on a blocking fd). */
int64_t uffd_read(int fd, struct uffd_msg *msgs, uint32_t max_msgs);

#endif
