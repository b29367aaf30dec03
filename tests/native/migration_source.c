// SPDX-License-Identifier: MIT
/* The source's threads: what Python does between the native calls, reduced to its bytes. */
#define _GNU_SOURCE
#include "migration_rig.h"

#include <string.h>
#include <sys/socket.h>

#include "be.h"
#include "bitmap.h"

enum { TYPE_EOF = 0, TYPE_PART = 2, TYPE_END = 3, TYPE_COMMAND = 8 };
enum { CMD_PING = 2, CMD_PACKAGED = 6 };

/* What the guest wrote since its page was sent. */
static void redirty(struct rig *r)
{
	for (uint32_t i = 0; i < RIG_BLOCKS; i++) {
		struct rig_block *b = &r->blocks[i];
		uint64_t unit = b->page_size / PAGE;

		for (uint64_t page = 5; page < b->pages; page += 11) {
			rig_fill(r, b->src + page * PAGE, i, page, 2);
			b->version[page] = 2;
			/* Whole host pages, as they travel from now on. */
			bitmap_set_atomic(b->dirty, page & ~(unit - 1), unit);
		}
		for (uint64_t page = 0; page < b->pages; page += unit)
			if (bitmap_next_set(b->dirty, page + unit, page) < page + unit)
				bitmap_set_atomic(b->dirty, page, unit);
	}
}

static int send_package(struct rig *r)
{
	static const uint8_t ping[9] = { TYPE_COMMAND, 0, CMD_PING, 0, 4, 0, 0, 0, 4 };
	size_t n = 0, blob = 0;
	uint8_t *out;
	int ret;

	for (uint32_t i = 0; i < RIG_BLOCKS; i++)
		blob += BITMAP_WORDS(r->blocks[i].pages) * 8;
	out = rig_alloc(9 + blob + sizeof(ping));
	out[n++] = TYPE_COMMAND;
	put_be16(out + n, CMD_PACKAGED);
	put_be16(out + n + 2, 4);
	put_be32(out + n + 4, (uint32_t)blob);
	n += 8;
	for (uint32_t i = 0; i < RIG_BLOCKS; i++) {
		memcpy(out + n, r->blocks[i].dirty, BITMAP_WORDS(r->blocks[i].pages) * 8);
		n += BITMAP_WORDS(r->blocks[i].pages) * 8;
	}
	memcpy(out + n, ping, sizeof(ping));
	ret = src_send_package(r->src, out, n + sizeof(ping), r->o.run_alone);
	free(out);
	return ret;
}

/* Postcopy from wherever it stands, and the end of the stream. */
static int send_rest(struct rig *r)
{
	static const uint8_t eof = TYPE_EOF;
	int64_t ret;

	while ((ret = src_postcopy_loop(r->src)) == SRC_RUN_SENT)
		;
	if (ret >= 0)
		ret = src_end_urgent(r->src, true);
	if (r->o.urgent)
		shutdown(r->urgent_fds[0], SHUT_WR);	/* its end, as the runtime makes it */
	if (ret >= 0)
		ret = src_send_part(r->src, TYPE_END, 0);
	if (ret >= 0)
		ret = chan_write(r->src_ch, &eof, 1);
	return ret < 0 ? (int)ret : chan_flush(r->src_ch);
}

static int send_all(struct rig *r)
{
	int64_t ret = 0;

	if (r->o.precopy_bytes) {
		for (uint64_t sent = 0; sent < r->o.precopy_bytes && ret >= 0; sent += 64 << 10)
			ret = src_send_part(r->src, TYPE_PART, 64 << 10);
		if (ret < 0)
			return (int)ret;
	}
	if (r->o.no_package) {
		ret = src_send_package(r->src, "", 0, false);
		return ret < 0 ? (int)ret : send_rest(r);
	}
	if (!r->o.keep_clean)
		redirty(r);
	ret = send_package(r);
	return ret < 0 ? (int)ret : send_rest(r);
}

void *rig_resume_thread(void *rig)
{
	struct rig *r = rig;

	r->migration_ret = send_rest(r);
	return NULL;
}

void *rig_migration_thread(void *rig)
{
	struct rig *r = rig;

	r->migration_ret = send_all(r);
	return NULL;
}

void *rig_return_path_thread(void *rig)
{
	struct rig *r = rig;

	r->return_path_ret = src_rp_loop(r->src);
	if (r->return_path_ret < 0)
		src_stop(r->src);	/* as the runtime does */
	return NULL;
}
