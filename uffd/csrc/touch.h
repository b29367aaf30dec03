/* SPDX-License-Identifier: MIT */
/*
 * Loads and stores by address. The calling thread may sleep in the kernel on a missing page; called
 * through the binding it sleeps without the interpreter lock, which is the whole point of this file.
 */
#ifndef UFFD_TOUCH_H
#define UFFD_TOUCH_H

#include <stdint.h>

uint8_t touch_load_u8(uint64_t address);
void touch_store_u8(uint64_t address, uint8_t value);
uint64_t touch_load_u64(uint64_t address);		/* address: multiple of 8 */
void touch_store_u64(uint64_t address, uint64_t value);
void touch_read(uint64_t address, void *into, uint64_t len);
void touch_write(uint64_t address, const void *from, uint64_t len);
void touch_fill(uint64_t address, uint8_t value, uint64_t len);

#endif
