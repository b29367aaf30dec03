/* SPDX-License-Identifier: MIT */
/* A vCPU that is a native thread of ours. */
#ifndef TOYVM_VCPU_H
#define TOYVM_VCPU_H

#include "gate.h"
#include "guard.h"
#include "pace.h"
#include "toy.h"

enum vcpu_status { VCPU_READY, VCPU_LOST_PAGE, VCPU_FAILED };

struct vcpu {
	struct gate gate;
	struct guard guard;
	struct toy_view view;
	struct pace pace;
	uint32_t index;
	uint32_t status;                        /* enum vcpu_status; why it parked by itself */
	uint64_t lost_address;                  /* host address of the page it was lost on */
	uint64_t last_op_ns;                    /* CLOCK_MONOTONIC of the last operation before the park */
	uint64_t last_op_realtime_ns;
	int32_t error;                          /* -errno of a VCPU_FAILED */
};

/* `view` is copied. 0 or -EINVAL (the vCPU has no page of its own). */
int vcpu_init(struct vcpu *vcpu, uint32_t index, const struct toy_view *view);

/* The thread's whole life; returns after gate_quit. Needs guard_install before. */
int vcpu_serve(struct vcpu *vcpu);

void vcpu_go(struct vcpu *vcpu);
void vcpu_ask_halt(struct vcpu *vcpu);          /* first half of halt: ask and kick, do not wait */
void vcpu_halt(struct vcpu *vcpu);              /* returns when parked; never waits for a missing page */
void vcpu_quit(struct vcpu *vcpu);              /* after vcpu_halt */
bool vcpu_is_running(const struct vcpu *vcpu);

/* Received bitmaps, one address per block, 0 = none. Only while parked. */
void vcpu_set_received(struct vcpu *vcpu, const uint64_t *maps);

/* Writes down when the last operation was: now, or, for a vCPU given up in a timed probe, before it. */
void vcpu_note_last_op(struct vcpu *vcpu);

#endif
