/* SPDX-License-Identifier: MIT */
/* Memory of the toy VM outside guest RAM: layout, vCPU states, logs, histograms. */
#ifndef TOYVM_AUX_H
#define TOYVM_AUX_H

#include <stdint.h>

#include "toy.h"

/* Zeroed, page aligned, not inherited by children, not dumped. Address, or -errno. */
int64_t aux_map(uint64_t bytes);
int aux_unmap(uint64_t address, uint64_t bytes);

/* The inline arithmetic, for Python. */
uint64_t toy_slots_of(const struct toy_layout *layout, uint32_t owner);
uint32_t toy_bucket_of(uint64_t ns);

#endif
