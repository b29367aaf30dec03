/*
 * Pages that go into memory or a file instead of being placed: everything before LISTEN, and all of them
 * when nobody runs here (a VM is parked, or passes through).
 */
#define _GNU_SOURCE
#include "dst.h"

#include "bitmap.h"
#include "src.h"
#include "xbzrle.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

static int store_failed(struct dst_rx *rx, const struct dst_block *b, uint64_t offset, int code)
{
	return mig_fail(&rx->error, code, rx->ch->rpos, "ram", "block %s offset %#llx: storing the page: %s",
			b->idstr, (unsigned long long)offset, strerror(code));
}

static int write_file(struct dst_rx *rx, const struct dst_block *b, uint64_t offset, const uint8_t *data,
		      uint64_t length)
{
	while (length) {
		ssize_t put = pwrite(b->fd, data, length, (off_t)offset);

		if (put < 0) {
			if (errno == EINTR)
				continue;
			return store_failed(rx, b, offset, errno);
		}
		offset += (uint64_t)put;
		data += put;
		length -= (uint64_t)put;
	}
	return 0;
}

/* A page that held data becomes a hole again; one that never did is one. */
static int zero_again(struct dst_rx *rx, const struct dst_block *b, uint64_t offset)
{
	if (b->host) {
		memset(b->host + offset, 0, RAM_PAGE_BYTES);
		return 0;
	}
	if (fallocate(b->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, RAM_PAGE_BYTES) == 0)
		return 0;
	if (errno == EOPNOTSUPP) {
		static const uint8_t zeros[RAM_PAGE_BYTES];

		return write_file(rx, b, offset, zeros, sizeof(zeros));
	}
	return store_failed(rx, b, offset, errno);
}

int dst_store_run(struct dst_rx *rx, struct dst_block *b, uint64_t offset, const uint8_t *data, uint64_t length)
{
	uint64_t end = offset + length;
	int ret = 0;

	if (data) {
		if (!b->host)
			return write_file(rx, b, offset, data, length);
		memcpy(b->host + offset, data, length);
		return 0;
	}
	for (; offset < end && !ret; offset += RAM_PAGE_BYTES)
		if (bitmap_test(b->received, offset >> RAM_PAGE_BITS))
			ret = zero_again(rx, b, offset);
	return ret;
}

int dst_load_xbzrle(struct dst_rx *rx, struct dst_block *b, uint64_t offset, const uint8_t *in, uint32_t len)
{
	uint8_t page[RAM_PAGE_BYTES];

	if (!bitmap_test(b->received, offset >> RAM_PAGE_BITS))
		return mig_fail(&rx->error, EBADMSG, rx->ch->rpos, "ram",
				"an XBZRLE record for block %s offset %#llx, whose page never came", b->idstr,
				(unsigned long long)offset);
	if (b->host)
		memcpy(page, b->host + offset, sizeof(page));
	else if (pread(b->fd, page, sizeof(page), (off_t)offset) != (ssize_t)sizeof(page))
		return store_failed(rx, b, offset, errno ? errno : EIO);
	if (xbzrle_decode(in, len, page, sizeof(page)) < 0)
		return mig_fail(&rx->error, EBADMSG, rx->ch->rpos, "ram",
				"an XBZRLE record that does not decode (block %s offset %#llx)", b->idstr,
				(unsigned long long)offset);
	return dst_store_run(rx, b, offset, page, sizeof(page));
}

void dst_set_sink(struct dst *d, struct src *relay_to)
{
	d->sink = true;
	d->relay_to = relay_to;
}

void dst_set_arrival_fd(struct dst *d, int fd)
{
	atomic_store(&d->arrival_fd, fd);
}

int dst_ask(struct dst *d, uint32_t index, uint64_t offset, uint32_t length)
{
	struct chan *ch = atomic_load(&d->ch);
	int ret;

	dst_count(&d->stats.requests, 1);
	dst_track_add(d, dst_page_key(d, index, offset), 0);
	chan_lock(ch);
	ret = dst_put_request(d, ch, index, offset, length);
	if (ret >= 0)
		ret = chan_flush_locked(ch);
	chan_unlock(ch);
	return ret;
}
