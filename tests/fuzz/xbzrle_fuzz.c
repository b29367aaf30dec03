// SPDX-License-Identifier: MIT
/* sources: migration/native/csrc/xbzrle.c */
/* Decoding any bytes stays in its page; encoding a change and decoding it again gives the change. */
#include "fuzz_feed.h"

#include "xbzrle.h"

#define PAGE_BYTES 4096

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static uint8_t *page, *changed, *out;
	uint8_t *exact = malloc(size ? size : 1);
	int n;

	if (!page) {
		page = guarded(PAGE_BYTES);
		changed = guarded(PAGE_BYTES);
		out = guarded(PAGE_BYTES);
	}
	memcpy(exact, data, size);
	memset(page, 0x5a, PAGE_BYTES);
	n = xbzrle_decode(exact, size, page, PAGE_BYTES);
	MUST(n == 0 || n == -EINVAL);
	free(exact);
	/* What came out, seen as the new contents of a page that was the same everywhere. */
	memcpy(changed, page, PAGE_BYTES);
	memset(page, 0x5a, PAGE_BYTES);
	n = xbzrle_encode(page, changed, PAGE_BYTES, out, PAGE_BYTES);
	MUST(n >= -EOVERFLOW && n <= PAGE_BYTES);
	if (n >= 0)
		MUST(xbzrle_decode(out, (size_t)n, page, PAGE_BYTES) == 0 && !memcmp(page, changed, PAGE_BYTES));
	return 0;
}
