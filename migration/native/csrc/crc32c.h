/* CRC-32C (Castagnoli, reflected 0x82F63B78), as in RFC 3720. Start with 0; feed pieces in order. */
#ifndef MIG_CRC32C_H
#define MIG_CRC32C_H

#include <stddef.h>
#include <stdint.h>

uint32_t crc32c(uint32_t crc, const void *data, size_t len);
uint32_t crc32c_portable(uint32_t crc, const void *data, size_t len);

#endif
