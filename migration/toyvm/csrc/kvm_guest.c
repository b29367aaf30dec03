/* SPDX-License-Identifier: MIT */
/*
 * What KVM vCPUs run, at CPL 3 of a guest without a kernel.
 *
 * Compiled with the rest, but copied out of the section "toyguest" into guest memory, so it must not
 * refer to anything outside it: no calls, no constants in other sections, no instrumentation. The pragmas
 * and attributes below see to that; the native tests run it, and any stray reference ends in a shutdown exit.
 */
#pragma GCC target("general-regs-only")
#pragma GCC optimize("no-stack-protector,no-jump-tables,no-tree-loop-distribute-patterns")
#pragma GCC optimize("no-reorder-blocks-and-partition,no-tree-vectorize")

#define GUEST_PURE no_sanitize_address, no_sanitize_thread, no_sanitize_undefined
#define TOY_INLINE static inline __attribute__((always_inline, GUEST_PURE))

#include "kvm_guest.h"
#include "touch.h"

TOY_INLINE uint64_t guest_ticks(void)
{
	uint32_t low, high;

	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (uint64_t)high << 32 | low;
}

/*
 * A store where no memory is, and not a port: the I/O privilege of the flags gets lost under a KVM that
 * runs user mode natively. Everything the host looks at must be in memory before.
 */
TOY_INLINE void guest_ring(enum guest_bell bell)
{
	volatile uint64_t *doorbell = (volatile uint64_t *)(GUEST_DOORBELL + bell);

	__asm__ volatile("movq %1, %0" : "=m"(*doorbell) : "r"(0ull) : "memory");
}

TOY_INLINE uint64_t guest_ns(const struct guest_shared *shared, uint64_t ticks)
{
	return (uint64_t)((unsigned __int128)ticks * shared->ns_per_tick >> 32);
}

TOY_INLINE void guest_phase(struct toy_state *state, enum toy_phase phase)
{
	__asm__ volatile("" ::: "memory");
	toy_store(&state->phase, phase);
	__asm__ volatile("" ::: "memory");
}

/* The host parks us anywhere outside PHASE_MODIFY, and may move us to another host while we are in
 * PHASE_PROBE. It then corrects probe_clock, so this is read again afterwards. */
TOY_INLINE void guest_probe(struct guest_shared *shared, struct toy_state *state, uint64_t *page,
			    bool is_write, enum toy_presence presence)
{
	if (presence == PRESENCE_MISSING)
		toy_store(&state->probe_clock, guest_ticks());
	guest_phase(state, PHASE_PROBE);
	if (is_write)
		__asm__ volatile("lock addq $0, %0" : "+m"(*(volatile uint64_t *)page) : : "cc");
	else
		__asm__ volatile("cmpq $0, %0" : : "m"(*(const volatile uint64_t *)page) : "cc");
	guest_phase(state, PHASE_MODIFY);
	if (presence == PRESENCE_MISSING) {
		uint64_t since = __atomic_load_n(&state->probe_clock, __ATOMIC_RELAXED);

		histogram_add(&state->latency, guest_ns(shared, guest_ticks() - since));
		toy_add(&state->misses, 1);
		toy_store(&state->probe_clock, 0);
	} else if (presence == PRESENCE_RECEIVED) {
		toy_add(&state->hits, 1);
	}
}

/* May another operation be done now? While the workload is limited, the host counts. */
TOY_INLINE bool guest_may_go(struct guest_shared *shared, const struct toy_workload *workload)
{
	uint64_t limited = __atomic_load_n(&workload->rate, __ATOMIC_RELAXED) |
			   __atomic_load_n(&workload->stop_at, __ATOMIC_RELAXED);
	uint64_t granted;

	if (__atomic_load_n(&shared->stop, __ATOMIC_ACQUIRE)) {
		guest_ring(BELL_STOP);
		return false;
	}
	if (!limited)
		return true;
	granted = __atomic_load_n(&shared->granted, __ATOMIC_RELAXED);
	if (!granted) {
		guest_ring(BELL_GRANT);
		return false;
	}
	toy_store(&shared->granted, granted - 1);
	return true;
}

__attribute__((section("toyguest"), used, noinline, GUEST_PURE))
void guest_main(struct guest_shared *shared)
{
	const struct toy_view *view = &shared->view;
	const struct toy_layout *layout = (const struct toy_layout *)view->layout;
	const struct toy_workload *workload = (const struct toy_workload *)view->workload;
	struct toy_state *state = (struct toy_state *)view->state;
	struct toy_share share = toy_share_of(layout, shared->index);
	uint32_t *log = (uint32_t *)view->log;

	for (;;) {
		struct toy_pick pick;
		uint64_t *page;

		if (!guest_may_go(shared, workload))
			continue;
		pick = toy_pick(layout, workload, state, &share);
		page = (uint64_t *)(view->base[pick.at.block] + pick.at.page * TOY_PAGE_BYTES);
		guest_probe(shared, state, page, pick.is_write, toy_presence(view, pick.at));
		toy_finish(layout, workload, state, log, share.slots, &pick, page);
		if (!__atomic_load_n(&state->first_clock, __ATOMIC_RELAXED))
			toy_store(&state->first_clock, guest_ticks());
		guest_phase(state, PHASE_IDLE);
	}
}
