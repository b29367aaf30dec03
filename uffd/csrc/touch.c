// SPDX-License-Identifier: MIT
#include "touch.h"

#include <string.h>

/* volatile: each call is exactly one access of the stated width, as the fault tests count on. */

uint8_t touch_load_u8(uint64_t address)
{
	return *(const volatile uint8_t *)(uintptr_t)address;
}

void touch_store_u8(uint64_t address, uint8_t value)
{
	*(volatile uint8_t *)(uintptr_t)address = value;
}

uint64_t touch_load_u64(uint64_t address)
{
	return __atomic_load_n((const uint64_t *)(uintptr_t)address, __ATOMIC_ACQUIRE);
}

void touch_store_u64(uint64_t address, uint64_t value)
{
	__atomic_store_n((uint64_t *)(uintptr_t)address, value, __ATOMIC_RELEASE);
}

void touch_read(uint64_t address, void *into, uint64_t len)
{
	memcpy(into, (const void *)(uintptr_t)address, len);
}

void touch_write(uint64_t address, const void *from, uint64_t len)
{
	memcpy((void *)(uintptr_t)address, from, len);
}

void touch_fill(uint64_t address, uint8_t value, uint64_t len)
{
	memset((void *)(uintptr_t)address, value, len);
}
