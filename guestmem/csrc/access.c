// SPDX-License-Identifier: MIT
#include "access.h"

#include <string.h>

uint64_t access_fetch_add_u64(uint64_t address, uint64_t value)
{
	return __atomic_fetch_add((uint64_t *)(uintptr_t)address, value, __ATOMIC_SEQ_CST);
}

void access_move(uint64_t dst, uint64_t src, uint64_t len)
{
	memmove((void *)(uintptr_t)dst, (const void *)(uintptr_t)src, len);
}
