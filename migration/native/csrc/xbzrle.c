#include "xbzrle.h"

#include <errno.h>
#include <string.h>

/* Bytes consumed, or -EINVAL. */
static int get_uleb(const uint8_t *in, size_t len, uint32_t *value)
{
	if (!len)
		return -EINVAL;
	*value = in[0] & 0x7f;
	if (!(in[0] & 0x80))
		return 1;
	if (len < 2 || in[1] & 0x80)
		return -EINVAL;
	*value |= (uint32_t)in[1] << 7;
	return 2;
}

int xbzrle_decode(const uint8_t *in, size_t len, uint8_t *page, size_t page_len)
{
	size_t at = 0, i = 0;

	while (i < len) {
		uint32_t same, fresh;
		int n = get_uleb(in + i, len - i, &same);

		if (n < 0 || (i && !same))
			return -EINVAL;
		i += (size_t)n;
		if (same > page_len - at)
			return -EINVAL;
		at += same;
		n = get_uleb(in + i, len - i, &fresh);
		if (n < 0 || !fresh)
			return -EINVAL;
		i += (size_t)n;
		if (fresh > page_len - at || fresh > len - i)
			return -EINVAL;
		memcpy(page + at, in + i, fresh);
		at += fresh;
		i += fresh;
	}
	return 0;
}

/* Bytes written (1 or 2), or 0 when there is no room. */
static size_t put_uleb(uint8_t *out, size_t room, size_t value)
{
	if (value < 0x80) {
		if (!room)
			return 0;
		out[0] = (uint8_t)value;
		return 1;
	}
	if (room < 2)
		return 0;
	out[0] = (uint8_t)(value & 0x7f) | 0x80;
	out[1] = (uint8_t)(value >> 7);
	return 2;
}

int xbzrle_encode(const uint8_t *old, const uint8_t *new_, size_t page_len, uint8_t *out, size_t cap)
{
	size_t at = 0, i = 0;

	for (;;) {
		size_t start = at, n;

		while (at < page_len && old[at] == new_[at])
			at++;
		if (at == page_len)
			return (int)i;
		n = put_uleb(out + i, cap - i, at - start);
		if (!n)
			return -EOVERFLOW;
		i += n;
		start = at;
		while (at < page_len && old[at] != new_[at])
			at++;
		n = put_uleb(out + i, cap - i, at - start);
		if (!n || at - start > cap - i - n)
			return -EOVERFLOW;
		i += n;
		memcpy(out + i, new_ + start, at - start);
		i += at - start;
	}
}
