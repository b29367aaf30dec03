#include "mapped.h"

#include "bitmap.h"
#include "ramrec.h"
#include "zero.h"

#include <errno.h>
#include <unistd.h>

/* Pages in one system call: large enough to cost nothing, small enough to stay in the cache. */
#define RUN_PAGES_MAX 256u

static int write_all(int fd, const uint8_t *from, uint64_t len, uint64_t at)
{
	while (len) {
		ssize_t put = pwrite(fd, from, len, (off_t)at);

		if (put < 0 && errno == EINTR)
			continue;
		if (put < 0)
			return -errno;
		if (!put)
			return -EIO;
		from += put;
		len -= (uint64_t)put;
		at += (uint64_t)put;
	}
	return 0;
}

static int read_all(int fd, uint8_t *into, uint64_t len, uint64_t at)
{
	while (len) {
		ssize_t got = pread(fd, into, len, (off_t)at);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return -errno;
		if (!got)
			return -ENODATA;
		into += got;
		len -= (uint64_t)got;
		at += (uint64_t)got;
	}
	return 0;
}

/* How many pages from page on (at most max) are not zero; the first one is not. */
static uint64_t data_run(const uint8_t *page, uint64_t max)
{
	uint64_t n = 1;

	while (n < max && !buffer_is_zero(page + n * RAM_PAGE_BYTES, RAM_PAGE_BYTES))
		n++;
	return n;
}

int64_t mapped_write(int fd, uint64_t host, uint64_t pages_offset, uint64_t first, uint64_t count,
		     uint64_t *present)
{
	uint64_t at = first, end = first + count;
	int64_t written = 0;

	while (at < end) {
		const uint8_t *page = (const uint8_t *)(uintptr_t)(host + at * RAM_PAGE_BYTES);
		uint64_t max = end - at < RUN_PAGES_MAX ? end - at : RUN_PAGES_MAX, run;
		int ret;

		if (buffer_is_zero(page, RAM_PAGE_BYTES)) {
			bitmap_clear(present, at++, 1);
			continue;
		}
		run = data_run(page, max);
		ret = write_all(fd, page, run * RAM_PAGE_BYTES, pages_offset + at * RAM_PAGE_BYTES);
		if (ret < 0)
			return ret;
		bitmap_set(present, at, run);
		written += (int64_t)run;
		at += run;
	}
	return written;
}

int64_t mapped_read(int fd, uint64_t host, uint64_t pages_offset, uint64_t first, uint64_t count,
		    const uint64_t *present)
{
	uint64_t end = first + count, at = first, run;
	int64_t got = 0;

	while ((run = bitmap_next_run(present, end, at, &at))) {
		int ret;

		if (run > RUN_PAGES_MAX)
			run = RUN_PAGES_MAX;
		ret = read_all(fd, (uint8_t *)(uintptr_t)(host + at * RAM_PAGE_BYTES),
			       run * RAM_PAGE_BYTES, pages_offset + at * RAM_PAGE_BYTES);
		if (ret < 0)
			return ret;
		got += (int64_t)run;
		at += run;
	}
	return got;
}
