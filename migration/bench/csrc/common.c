// SPDX-License-Identifier: MIT
/* Clock, threads, memory and the userfaultfd of the bench: what every measurement needs. */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "uffd.h"

#ifndef MFD_CLOEXEC
#define MFD_CLOEXEC 1u
#endif
#ifndef MFD_HUGETLB
#define MFD_HUGETLB 4u
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#define BENCH_MFD_HUGE_2MB (21u << 26)

uint64_t bench_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void *thread_main(void *arg)
{
	struct bench_thread *thread = arg;

	thread->result = thread->body(thread->arg);
	return NULL;
}

/* Pinned before it runs its first instruction, so that no sample is taken on the wrong processor.
 * Signals stay with the interpreter's main thread. */
int bench_thread_start(struct bench_thread *thread, int cpu, int (*body)(void *), void *arg)
{
	pthread_attr_t attr;
	sigset_t all, old;
	cpu_set_t set;
	int err;

	thread->body = body;
	thread->arg = arg;
	thread->result = 0;
	thread->started = false;
	err = pthread_attr_init(&attr);
	if (err)
		return -err;
	if (cpu >= 0) {
		if (cpu >= CPU_SETSIZE) {
			pthread_attr_destroy(&attr);
			return -EINVAL;
		}
		CPU_ZERO(&set);
		CPU_SET(cpu, &set);
		pthread_attr_setaffinity_np(&attr, sizeof(set), &set);
	}
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	err = pthread_create(&thread->id, &attr, thread_main, thread);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	pthread_attr_destroy(&attr);
	thread->started = err == 0;
	return -err;
}

int bench_thread_join(struct bench_thread *thread)
{
	if (!thread->started)
		return 0;
	pthread_join(thread->id, NULL);
	thread->started = false;
	return thread->result;
}

static int open_memfd(uint32_t backing, uint64_t length)
{
	unsigned int flags = MFD_CLOEXEC;
	int fd, err;

	if (backing == BENCH_HUGETLB)
		flags |= MFD_HUGETLB | BENCH_MFD_HUGE_2MB;
	fd = (int)syscall(SYS_memfd_create, "postcopy-bench", flags);
	if (fd < 0)
		return -errno;
	if (ftruncate(fd, (off_t)length) < 0) {
		err = -errno;
		close(fd);
		return err;
	}
	return fd;
}

/* A private anonymous mapping, or a shared one of a memfd. Never THP: COPY installs 4 KiB pages
 * whatever the advice, and a huge page appearing by a plain touch would hide the missing ones. */
int bench_region_init(struct bench_region *region, uint32_t backing, uint64_t length)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
	int err;

	region->host = NULL;
	region->memfd = -1;
	region->uffd = -1;
	region->page_size = backing == BENCH_HUGETLB ? BENCH_HUGE_PAGE : BENCH_TARGET_PAGE;
	region->length = (length + region->page_size - 1) / region->page_size * region->page_size;
	if (region->length == 0 || backing > BENCH_HUGETLB)
		return -EINVAL;
	if (backing != BENCH_ANON) {
		region->memfd = open_memfd(backing, region->length);
		if (region->memfd < 0)
			return region->memfd;
		/* hugetlb: without MAP_NORESERVE the pool is reserved here, and an empty one is
		 * ENOMEM now, not EEXIST from COPY in the middle of a measurement. */
		flags = MAP_SHARED;
	}
	region->host = mmap(NULL, region->length, PROT_READ | PROT_WRITE, flags, region->memfd, 0);
	if (region->host == MAP_FAILED) {
		err = -errno;
		region->host = NULL;
		bench_region_deinit(region);
		return err;
	}
	madvise(region->host, region->length, MADV_NOHUGEPAGE);
	madvise(region->host, region->length, MADV_DONTFORK);
	madvise(region->host, region->length, MADV_DONTDUMP);
	return 0;
}

void bench_region_deinit(struct bench_region *region)
{
	if (region->uffd >= 0)
		close(region->uffd);
	if (region->host)
		munmap(region->host, region->length);
	if (region->memfd >= 0)
		close(region->memfd);
	region->uffd = -1;
	region->host = NULL;
	region->memfd = -1;
}

/* Only user-mode touches happen here, so the unprivileged form is as good as the full one. */
static int open_uffd(void)
{
	int fd = uffd_open_syscall(O_CLOEXEC | O_NONBLOCK);

	if (fd < 0)
		fd = uffd_open_dev(O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		fd = uffd_open_syscall(O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	return fd;
}

int bench_region_register(struct bench_region *region, uint64_t mode, uint64_t features)
{
	uint64_t supported, ioctls;
	int fd = open_uffd();
	int err;

	if (fd < 0)
		return fd;
	err = uffd_api(fd, features, &supported, &ioctls);
	if (!err)
		err = uffd_register(fd, (uint64_t)(uintptr_t)region->host, region->length, mode, &ioctls);
	if (err) {
		close(fd);
		return err;
	}
	region->uffd = fd;
	return 0;
}

int bench_region_discard(struct bench_region *region)
{
	int advice = region->memfd >= 0 ? MADV_REMOVE : MADV_DONTNEED;

	return madvise(region->host, region->length, advice) < 0 ? -errno : 0;
}

/* Only ever after an error of our own: the measurement is void, and its toucher must not sleep on. */
void bench_region_give_up(struct bench_region *region)
{
	uffd_unregister(region->uffd, (uint64_t)(uintptr_t)region->host, region->length);
}

void *bench_buffer_alloc(uint64_t length)
{
	void *buffer = NULL;

	if (posix_memalign(&buffer, BENCH_TARGET_PAGE, length))
		return NULL;
	memset(buffer, 0xa5, length);
	return buffer;
}

int bench_write_all(int fd, const void *data, uint64_t length)
{
	const uint8_t *at = data;

	while (length) {
		ssize_t done = write(fd, at, length);

		if (done < 0 && errno == EINTR)
			continue;
		if (done < 0)
			return -errno;
		at += done;
		length -= (uint64_t)done;
	}
	return 0;
}

int bench_read_all(int fd, void *data, uint64_t length)
{
	uint8_t *at = data;

	while (length) {
		ssize_t done = read(fd, at, length);

		if (done < 0 && errno == EINTR)
			continue;
		if (done < 0)
			return -errno;
		if (done == 0)
			return -ECONNRESET;
		at += done;
		length -= (uint64_t)done;
	}
	return 0;
}
