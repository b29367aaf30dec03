/* XBZRLE: a page as its difference to the one before. Pairs of (equal bytes, new bytes), each count ULEB128 of
 * at most two bytes. */
#ifndef MIG_XBZRLE_H
#define MIG_XBZRLE_H

#include <stddef.h>
#include <stdint.h>

/* Apply in[0..len) to page (page_len bytes). 0, or -EINVAL when it is no such encoding or leaves the page. */
int xbzrle_decode(const uint8_t *in, size_t len, uint8_t *page, size_t page_len);

/* Encode the way from old to new. Bytes written; 0 = equal; -EOVERFLOW when it takes more than cap bytes. */
int xbzrle_encode(const uint8_t *old, const uint8_t *new_, size_t page_len, uint8_t *out, size_t cap);

#endif
