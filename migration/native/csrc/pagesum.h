/* A checksum of memory contents that does not depend on which zero pages happen to be holes. */
#ifndef MIG_PAGESUM_H
#define MIG_PAGESUM_H

#include <stdint.h>

/* CRC-32C over (be64 offset, page) of every target page in [start, end) of base that is not all zero. */
uint32_t crc32c_pages(const void *base, uint64_t start, uint64_t end, uint32_t crc);

#endif
