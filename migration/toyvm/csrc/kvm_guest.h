/* SPDX-License-Identifier: MIT */
/* The guest's program as bytes: position independent, no reference to anything outside itself. */
#ifndef TOYVM_KVM_GUEST_H
#define TOYVM_KVM_GUEST_H

#include "kvm.h"

extern const char __start_toyguest[] __attribute__((visibility("hidden")));
extern const char __stop_toyguest[] __attribute__((visibility("hidden")));

/* Runs for ever. Never called by us: entered through a vCPU's registers. */
void guest_main(struct guest_shared *shared) __attribute__((visibility("hidden")));

#endif
