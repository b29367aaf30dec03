/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "vcpu.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "touch.h"

static struct toy_state *vcpu_state(const struct vcpu *vcpu)
{
	return (struct toy_state *)(uintptr_t)vcpu->view.state;
}

int vcpu_init(struct vcpu *vcpu, uint32_t index, const struct toy_view *view)
{
	const struct toy_layout *layout = (const struct toy_layout *)(uintptr_t)view->layout;

	memset(vcpu, 0, sizeof(*vcpu));
	if (index >= layout->smp || !toy_slots(layout, index))
		return -EINVAL;
	gate_init(&vcpu->gate);
	vcpu->index = index;
	vcpu->view = *view;
	return 0;
}

void vcpu_go(struct vcpu *vcpu)
{
	gate_go(&vcpu->gate);
}

void vcpu_ask_halt(struct vcpu *vcpu)
{
	gate_ask_halt(&vcpu->gate, NULL);
}

void vcpu_halt(struct vcpu *vcpu)
{
	gate_halt(&vcpu->gate, NULL);
}

void vcpu_quit(struct vcpu *vcpu)
{
	gate_quit(&vcpu->gate);
}

bool vcpu_is_running(const struct vcpu *vcpu)
{
	return gate_is_running(&vcpu->gate);
}

void vcpu_set_received(struct vcpu *vcpu, const uint64_t *maps)
{
	memcpy(vcpu->view.received, maps, sizeof(vcpu->view.received));
}

void vcpu_note_last_op(struct vcpu *vcpu)
{
	struct toy_state *state = vcpu_state(vcpu);
	uint64_t now = gate_now_ns(), last = state->probe_clock ? state->probe_clock : now;
	struct timespec real;

	clock_gettime(CLOCK_REALTIME, &real);
	vcpu->last_op_ns = last;
	vcpu->last_op_realtime_ns =
		(uint64_t)real.tv_sec * 1000000000u + (uint64_t)real.tv_nsec - (now - last);
	toy_store(&state->probe_clock, 0);
}

/* The one access that may sleep or die. False when the gate closed before it. */
static bool vcpu_probe(struct vcpu *vcpu, uint64_t *page, bool is_write)
{
	guard_open(&vcpu->guard);
	if (!gate_is_open(&vcpu->gate)) {
		guard_close(&vcpu->guard);
		return false;
	}
	if (is_write)
		guard_touch_write(page);
	else
		guard_touch_read(page);
	guard_close(&vcpu->guard);
	return true;
}

/* One operation. False when the gate closed; then nothing was done. */
static bool vcpu_operate(struct vcpu *vcpu, const struct toy_layout *layout,
			 const struct toy_workload *workload, const struct toy_share *share)
{
	struct toy_state *state = vcpu_state(vcpu);
	uint32_t *log = (uint32_t *)(uintptr_t)vcpu->view.log;
	struct toy_pick pick = toy_pick(layout, workload, state, share);
	uint64_t *page = (uint64_t *)(uintptr_t)(vcpu->view.base[pick.at.block] +
						 pick.at.page * TOY_PAGE_BYTES);
	enum toy_presence presence = toy_presence(&vcpu->view, pick.at);

	if (presence == PRESENCE_MISSING)
		toy_store(&state->probe_clock, gate_now_ns());
	if (!vcpu_probe(vcpu, page, pick.is_write))
		return false;
	if (presence == PRESENCE_MISSING) {
		histogram_add(&state->latency, gate_now_ns() - state->probe_clock);
		toy_add(&state->misses, 1);
		toy_store(&state->probe_clock, 0);
	} else if (presence == PRESENCE_RECEIVED) {
		toy_add(&state->hits, 1);
	}
	toy_finish(layout, workload, state, log, share->slots, &pick, page);
	if (!state->first_clock)
		toy_store(&state->first_clock, gate_now_ns());
	return true;
}

static void vcpu_loop(struct vcpu *vcpu)
{
	const struct toy_layout *layout = (const struct toy_layout *)(uintptr_t)vcpu->view.layout;
	const struct toy_workload *workload =
		(const struct toy_workload *)(uintptr_t)vcpu->view.workload;
	struct toy_share share = toy_share_of(layout, vcpu->index);

	/* A position from a damaged stream would index the log. */
	if (vcpu_state(vcpu)->position >= share.slots) {
		vcpu->error = -EINVAL;
		__atomic_store_n(&vcpu->status, VCPU_FAILED, __ATOMIC_RELEASE);
		gate_park_self(&vcpu->gate);
		return;
	}
	while (pace_next(&vcpu->pace, &vcpu->gate,
			 __atomic_load_n(&workload->rate, __ATOMIC_RELAXED))) {
		uint64_t stop_at = __atomic_load_n(&workload->stop_at, __ATOMIC_RELAXED);

		if (stop_at && vcpu_state(vcpu)->ops >= stop_at) {
			gate_park_self(&vcpu->gate);
			return;
		}
		if (!vcpu_operate(vcpu, layout, workload, &share))
			return;
	}
}

static void vcpu_run(struct vcpu *vcpu)
{
	struct toy_state *state = vcpu_state(vcpu);

	toy_store(&state->probe_clock, 0);
	__atomic_store_n(&vcpu->status, VCPU_READY, __ATOMIC_RELAXED);
	guard_enter(&vcpu->guard);
	switch (sigsetjmp(vcpu->guard.env, 0)) {
	case GUARD_ENTERED:
		vcpu_loop(vcpu);
		break;
	case GUARD_LOST:
		vcpu->lost_address = vcpu->guard.lost_address;
		__atomic_store_n(&vcpu->status, VCPU_LOST_PAGE, __ATOMIC_RELEASE);
		gate_park_self(&vcpu->gate);
		break;
	default: /* kicked: the operation was not begun, as far as anybody can tell */
		break;
	}
	guard_leave(&vcpu->guard);
	vcpu_note_last_op(vcpu);
}

int vcpu_serve(struct vcpu *vcpu)
{
	gate_enter(&vcpu->gate);
	while (gate_wait(&vcpu->gate) == GATE_RUN)
		vcpu_run(vcpu);
	return 0;
}
