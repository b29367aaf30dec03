#include "pagesum.h"

#include "be.h"
#include "crc32c.h"
#include "ramrec.h"
#include "zero.h"

uint32_t crc32c_pages(const void *base, uint64_t start, uint64_t end, uint32_t crc)
{
	for (; start < end; start += RAM_PAGE_BYTES) {
		const uint8_t *page = (const uint8_t *)base + start;
		uint8_t offset[8];

		if (buffer_is_zero(page, RAM_PAGE_BYTES))
			continue;
		put_be64(offset, start);
		crc = crc32c(crc32c(crc, offset, sizeof(offset)), page, RAM_PAGE_BYTES);
	}
	return crc;
}
