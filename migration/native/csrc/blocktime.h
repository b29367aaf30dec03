/*
 * How long vCPUs were asleep on missing pages: each for itself, and all of them at once (that is what a user
 * of the guest notices). From the reading of the fault's message to the placing of its page.
 */
#ifndef MIG_BLOCKTIME_H
#define MIG_BLOCKTIME_H

#include <pthread.h>
#include <stdint.h>

#define BLOCKTIME_VCPUS 64u

struct blocktime_vcpu {
	int32_t tid;
	uint64_t page;			/* what it waits for; 0 = it runs */
	uint64_t since_ns;
	uint64_t total_ns, faults;
};

struct blocktime {
	pthread_mutex_t lock;
	uint32_t count, blocked;
	uint64_t all_since_ns, all_ns;	/* every vCPU asleep at once */
	uint64_t other_ns, other_faults;	/* threads that are no vCPU */
	struct blocktime_vcpu vcpus[BLOCKTIME_VCPUS];
};

void blocktime_init(struct blocktime *b);
void blocktime_deinit(struct blocktime *b);
void blocktime_set_vcpus(struct blocktime *b, const int32_t *tids, uint32_t count);
/* The thread waits for page. False: it is no vCPU. */
int blocktime_begin(struct blocktime *b, int32_t tid, uint64_t page, uint64_t now_ns);
/* The page is there: whoever waited for it runs on. */
void blocktime_end(struct blocktime *b, uint64_t page, uint64_t now_ns);
/* The page was there already: no time was spent. */
void blocktime_forget(struct blocktime *b, uint64_t page);
void blocktime_note_other(struct blocktime *b, uint64_t ns);

#endif
