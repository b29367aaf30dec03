// SPDX-License-Identifier: MIT
/* sources: migration/native/csrc/ramrec.c */
/* A RAM record's head from any bytes: inside the bytes, the same however few more than needed are there,
 * and what it says encodes to the same bytes again. */
#include "fuzz_feed.h"

#include "ramrec.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint8_t *exact = malloc(size ? size : 1), again[RAM_HEAD_MAX];
	struct ramrec r, shorter;
	int ret;

	memcpy(exact, data, size);	/* so that a read beyond the end is one */
	ret = ramrec_decode(exact, size, &r);
	MUST(ret == 1 || ret == 0 || ret == -EINVAL);
	MUST(ret != 0 || size < RAM_HEAD_MAX);
	if (ret == 1) {
		MUST(r.head_len >= 8 && r.head_len <= size && r.head_len <= RAM_HEAD_MAX);
		MUST(!r.has_id || (r.id_len && r.id_at + r.id_len <= r.head_len));
		MUST(ramrec_decode(exact, r.head_len, &shorter) == 1 && shorter.offset == r.offset);
		MUST(ramrec_decode(exact, r.head_len - 1, &shorter) <= 0);
	}
	if (ret == 1 && (r.kind == RAM_FLAG_PAGE || r.kind == RAM_FLAG_ZERO)) {
		const char *id = r.has_id ? (const char *)exact + r.id_at : NULL;
		size_t n = ramrec_encode(again, r.offset, r.kind, id, (uint8_t)r.id_len);

		MUST(n == r.head_len - (r.kind == RAM_FLAG_ZERO) && !memcmp(again, exact, n));
	}
	free(exact);
	return 0;
}
