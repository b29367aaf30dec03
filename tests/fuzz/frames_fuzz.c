// SPDX-License-Identifier: MIT
/* sources: migration/native/csrc/chan.c migration/native/csrc/crc32c.c migration/native/csrc/err.c */
/* A reader of frames fed any bytes, by reads of any size: no byte of a bad frame gets through. */
#include "fuzz_feed.h"

#include "be.h"
#include "crc32c.h"

/* How many payload bytes stand in good frames before the first bad one. */
static size_t good_bytes(const uint8_t *data, size_t size)
{
	uint64_t sequence = 0;
	size_t at = 0, sum = 0;

	while (size - at >= CHAN_FRAME_HEADER) {
		uint32_t len = get_be32(data + at);
		uint8_t seed[12];

		if (!len || len > CHAN_FRAME_MAX || len > size - at - CHAN_FRAME_HEADER)
			break;
		put_be64(seed, sequence++);
		put_be32(seed + 8, len);
		if (crc32c_portable(crc32c_portable(0, seed, 12), data + at + 8, len) != get_be32(data + at + 4))
			break;
		at += CHAN_FRAME_HEADER + len;
		sum += len;
	}
	return sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static uint8_t out[CHAN_NEED_MAX];
	struct feed f;
	size_t sum = 0, want;
	uint32_t script;
	int64_t n = 1;

	if (size < 4 || size > FEED_MAX)
		return 0;
	script = get_be32(data);
	data += 4;
	size -= 4;
	feed_init(&f, data, size, false);
	chan_set_read_framed(f.ch);
	do {
		want = 1 + script % 0xffff % CHAN_NEED_MAX;
		switch (script >> 30) {
		case 0:
			n = chan_read_some(f.ch, out, want);
			break;
		case 1:
			n = chan_peek(f.ch, out, want);
			if (n > 0)
				n = chan_read(f.ch, out, (size_t)n) < 0 ? -EIO : n;
			break;
		default:
			n = chan_need(f.ch, 1 + want % 8);
			if (n >= 0) {
				chan_skip(f.ch, 1 + want % 8);
				n = 1 + (int64_t)(want % 8);
			}
		}
		sum += n > 0 ? (size_t)n : 0;
		script = script * 2654435761u + 12345;
	} while (n > 0);
	MUST(chan_read_position(f.ch) == sum && sum <= good_bytes(data, size));
	MUST(!f.ch->rerror.code || (f.ch->rerror.message[0] && !strcmp(f.ch->rerror.section, "frame")));
	feed_deinit(&f);
	return 0;
}
