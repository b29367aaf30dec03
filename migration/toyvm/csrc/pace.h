/* SPDX-License-Identifier: MIT */
/*
 * So many operations a second: grants small batches as they come due, at most a thousand batches a second,
 * so that pacing costs no clock reading per operation. Time lost (asleep on a page, stopped) is not
 * made up for by a burst.
 */
#ifndef TOYVM_PACE_H
#define TOYVM_PACE_H

#include "gate.h"

#define PACE_TICK_NS 1000000u
#define PACE_FORGIVE_NS 10000000u

struct pace {
	uint64_t rate;
	uint64_t granted;
	uint64_t paid_until_ns;                 /* operations due before this were granted */
};

/* True: do one operation. False: running is no longer wanted. Sleeps until one is due. */
static inline bool pace_next(struct pace *pace, struct gate *gate, uint64_t rate)
{
	uint64_t now, due;

	if (!rate)
		return true;
	if (pace->rate != rate) {
		pace->rate = rate;
		pace->granted = 0;
		pace->paid_until_ns = gate_now_ns();
	}
	while (!pace->granted) {
		now = gate_now_ns();
		if (now > pace->paid_until_ns + PACE_FORGIVE_NS + 1000000000u / rate)
			pace->paid_until_ns = now - 1000000000u / rate;
		due = now > pace->paid_until_ns ? (now - pace->paid_until_ns) * rate / 1000000000u : 0;
		if (due) {
			pace->granted = due;
			pace->paid_until_ns += due * 1000000000u / rate;
		} else {
			uint64_t next = pace->paid_until_ns + 1000000000u / rate + 1;

			if (next < now + PACE_TICK_NS)
				next = now + PACE_TICK_NS;
			if (!gate_sleep_until(gate, next))
				return false;
		}
	}
	pace->granted--;
	return true;
}

#endif
