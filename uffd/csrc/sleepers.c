// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "sleepers.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "memory.h"
#include "uffd.h"
#include "uffd_abi.h"

enum { TEXT_MAX = 4096, TASKS_MAX = 256, MESSAGES_MAX = 16 };

void sleepers_print(const struct sleepers_report *out, const char *format, ...)
{
	char line[TEXT_MAX];
	va_list args;
	int len, at = 0;

	va_start(args, format);
	len = vsnprintf(line, sizeof(line), format, args);
	va_end(args);
	if (len >= (int)sizeof(line))
		len = sizeof(line) - 1;
	while (at < len) {
		ssize_t n = write(out->fd, line + at, (size_t)(len - at));

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return;
		at += (int)n;
	}
}

/* The first bytes of /proc/self/task/TID/NAME, newline cut off; empty when unreadable. */
static bool read_task(uint32_t tid, const char *name, char *text, size_t size)
{
	char path[64];
	ssize_t n = -1;
	int fd;

	snprintf(path, sizeof(path), "/proc/self/task/%u/%s", tid, name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		n = read(fd, text, size - 1);
		close(fd);
	}
	text[n > 0 ? n : 0] = '\0';
	if (n > 0 && text[n - 1] == '\n')
		text[n - 1] = '\0';
	return n > 0;
}

/*
 * The kernel names the function a thread sleeps in when it was built with symbols and lets us look;
 * otherwise it says "0".
 */
static bool kernel_function(uint32_t tid, char *text, size_t size)
{
	return read_task(tid, "wchan", text, size) && strcmp(text, "0") != 0;
}

static bool in_userfault(uint32_t tid)
{
	char function[128];

	return kernel_function(tid, function, sizeof(function)) && strstr(function, "userfault");
}

static bool is_asleep(uint32_t tid)
{
	char stat[256], function[128];
	const char *after_name;

	if (kernel_function(tid, function, sizeof(function)))
		return strstr(function, "userfault") != NULL;
	if (!read_task(tid, "stat", stat, sizeof(stat)))
		return false;
	after_name = strrchr(stat, ')');
	return after_name && (after_name[2] == 'S' || after_name[2] == 'D');
}

/* Entries may outlive their sleepers; these two looks keep a late one from counting. */
static bool still_waits(const struct pending_entry *e)
{
	char function[128];

	if (e->tid == 0)
		return mem_resident(e->address & ~4095ull, 4096) == 0;
	if (!is_asleep(e->tid))
		return false;
	/* Without the kernel's word, a write-protect sleeper and a finished one look alike: absent only. */
	return kernel_function(e->tid, function, sizeof(function)) ||
	       mem_resident(e->address & ~4095ull, 4096) == 0;
}

/*
 * The kernel counts who waits on a userfaultfd, message read or not ("total:" of its fdinfo). The one
 * sign that needs neither symbols nor anybody having read the message.
 */
static uint64_t waiting_on(int uffd)
{
	char path[48], text[512];
	const char *total;
	ssize_t n = -1;
	int fd;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", uffd);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		n = read(fd, text, sizeof(text) - 1);
		close(fd);
	}
	if (n <= 0)
		return 0;
	text[n] = '\0';
	total = strstr(text, "total:");
	return total ? strtoull(total + strlen("total:"), NULL, 10) : 0;
}

/* Thread ids of this process, without opendir(), which allocates. */
static uint32_t list_tasks(uint32_t *tids, uint32_t max)
{
	struct {
		uint64_t inode;
		int64_t offset;
		uint16_t length;
		uint8_t type;
		char name[];
	} *entry;
	char buffer[4096] __attribute__((aligned(8)));
	int fd = open("/proc/self/task", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	uint32_t n = 0;
	long got;

	if (fd < 0)
		return 0;
	while ((got = syscall(SYS_getdents64, fd, buffer, sizeof(buffer))) > 0) {
		for (long at = 0; at < got && n < max; at += entry->length) {
			entry = (void *)(buffer + at);
			if (entry->name[0] != '.')
				tids[n++] = (uint32_t)strtoul(entry->name, NULL, 10);
		}
	}
	close(fd);
	return n;
}

static bool listed(const struct pending_entry *entries, uint32_t count, uint32_t tid)
{
	for (uint32_t i = 0; i < count; i++)
		if (entries[i].tid == tid)
			return true;
	return false;
}

bool sleepers_exist(const struct watchdog_watch *watches, uint32_t count)
{
	uint32_t tids[TASKS_MAX];
	uint32_t tasks = list_tasks(tids, TASKS_MAX);
	struct pending_entry e[TASKS_MAX];

	for (uint32_t i = 0; i < tasks; i++)
		if (in_userfault(tids[i]))
			return true;
	for (uint32_t i = 0; i < count; i++) {
		uint32_t n = watches[i].table ? pending_list(watches[i].table, e, TASKS_MAX) : 0;

		if (watches[i].uffd >= 0 && waiting_on(watches[i].uffd) > 0)
			return true;
		for (uint32_t j = 0; j < n; j++)
			if (still_waits(&e[j]))
				return true;
	}
	return false;
}

static void write_thread(const struct sleepers_report *out, uint32_t tid)
{
	char name[64], function[128], stack[TEXT_MAX / 2];

	read_task(tid, "comm", name, sizeof(name));
	sleepers_print(out, "  thread %u \"%s\"", tid, name);
	if (kernel_function(tid, function, sizeof(function)))
		sleepers_print(out, ", asleep in the kernel's %s", function);
	sleepers_print(out, "\n");
	if (read_task(tid, "stack", stack, sizeof(stack)))
		sleepers_print(out, "  its kernel stack:\n%s\n", stack);
}

static void write_unread(const struct sleepers_report *out, int uffd)
{
	struct uffd_msg msgs[MESSAGES_MAX];
	int64_t n = uffd_read(uffd, msgs, MESSAGES_MAX);

	for (int64_t i = 0; i < n; i++) {
		if (msgs[i].event != UFFD_EVENT_PAGEFAULT)
			continue;
		sleepers_print(out, "fault nobody had read: address 0x%llx, thread %u\n",
			       (unsigned long long)msgs[i].arg.pagefault.address,
			       msgs[i].arg.pagefault.feat.ptid);
	}
}

void sleepers_write(struct sleepers_report *out, const struct watchdog_watch *watches, uint32_t count,
		    bool take_messages)
{
	struct pending_entry e[TASKS_MAX];
	uint32_t tids[TASKS_MAX];
	uint32_t known = 0, tasks;

	for (uint32_t i = 0; i < count && known < TASKS_MAX; i++)
		if (watches[i].table)
			known += pending_list(watches[i].table, e + known, TASKS_MAX - known);
	for (uint32_t i = 0; i < known; i++) {
		if (!still_waits(&e[i]))
			continue;
		sleepers_print(out, "missing page at address 0x%llx, waited for %llu ms\n",
			       (unsigned long long)e[i].address,
			       (unsigned long long)((out->now_ns - e[i].since_ns) / 1000000));
		if (e[i].tid)
			write_thread(out, e[i].tid);
	}
	tasks = list_tasks(tids, TASKS_MAX);
	for (uint32_t i = 0; i < tasks; i++) {
		if (listed(e, known, tids[i]) || !in_userfault(tids[i]))
			continue;
		sleepers_print(out, "missing page, address in no table\n");
		write_thread(out, tids[i]);
	}
	for (uint32_t i = 0; i < count; i++) {
		if (watches[i].uffd < 0)
			continue;
		sleepers_print(out, "userfaultfd %d: %llu asleep\n", watches[i].uffd,
			       (unsigned long long)waiting_on(watches[i].uffd));
		if (take_messages)
			write_unread(out, watches[i].uffd);
	}
}
