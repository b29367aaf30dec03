/*
 * The page area of one block in a mapped-ram file: page n of the block lies at pages_offset + n pages,
 * a bitmap says which are there. Writing from and reading into guest RAM without a copy between.
 */
#ifndef MIG_MAPPED_H
#define MIG_MAPPED_H

#include <stdint.h>

/*
 * Write the pages [first, first + count) that are not zero and set their bits in present; zero ones are
 * left out and their bits cleared. Returns pages written, or -errno (present then says what is there).
 */
int64_t mapped_write(int fd, uint64_t host, uint64_t pages_offset, uint64_t first, uint64_t count,
		     uint64_t *present);
/*
 * Read the pages whose bits are set among [first, first + count). Returns pages read, -ENODATA when the
 * file ends before, or -errno. Nobody may be watching the RAM with a userfaultfd.
 */
int64_t mapped_read(int fd, uint64_t host, uint64_t pages_offset, uint64_t first, uint64_t count,
		    const uint64_t *present);

#endif
