/* SPDX-License-Identifier: MIT */
#ifndef GUESTMEM_ZERO_H
#define GUESTMEM_ZERO_H

#include <stdbool.h>
#include <stddef.h>

/*
 * Is every byte of p[0..len) zero? Any length and alignment; an empty buffer is zero.
 * Reads at memory speed and stops soon after the first byte that is not.
 * The buffer may be guest RAM that is being written meanwhile: the answer is then one
 * that was true of each byte at some moment, and dirty tracking catches the rest.
 */
bool buffer_is_zero(const void *p, size_t len);

#endif
