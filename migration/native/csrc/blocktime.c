#include "blocktime.h"

#include <string.h>

void blocktime_init(struct blocktime *b)
{
	memset(b, 0, sizeof(*b));
	pthread_mutex_init(&b->lock, NULL);
}

void blocktime_deinit(struct blocktime *b)
{
	pthread_mutex_destroy(&b->lock);
}

void blocktime_set_vcpus(struct blocktime *b, const int32_t *tids, uint32_t count)
{
	pthread_mutex_lock(&b->lock);
	b->count = count < BLOCKTIME_VCPUS ? count : BLOCKTIME_VCPUS;
	for (uint32_t i = 0; i < b->count; i++)
		b->vcpus[i].tid = tids[i];
	pthread_mutex_unlock(&b->lock);
}

static void runs_on(struct blocktime *b, struct blocktime_vcpu *v, uint64_t now_ns)
{
	if (b->blocked == b->count && now_ns > b->all_since_ns)
		b->all_ns += now_ns - b->all_since_ns;
	b->blocked--;
	v->total_ns += now_ns - v->since_ns;
	v->page = 0;
}

int blocktime_begin(struct blocktime *b, int32_t tid, uint64_t page, uint64_t now_ns)
{
	int found = 0;

	if (!b->count || !tid)
		return 0;
	pthread_mutex_lock(&b->lock);
	for (uint32_t i = 0; i < b->count && !found; i++) {
		struct blocktime_vcpu *v = &b->vcpus[i];

		if (v->tid != tid)
			continue;
		found = 1;
		if (v->page == page)
			break;		/* reported again */
		if (v->page)
			runs_on(b, v, now_ns);
		v->page = page;
		v->since_ns = now_ns;
		v->faults++;
		if (++b->blocked == b->count)
			b->all_since_ns = now_ns;
	}
	pthread_mutex_unlock(&b->lock);
	return found;
}

void blocktime_end(struct blocktime *b, uint64_t page, uint64_t now_ns)
{
	if (!b->count)
		return;
	pthread_mutex_lock(&b->lock);
	for (uint32_t i = 0; i < b->count; i++)
		if (b->vcpus[i].page == page)
			runs_on(b, &b->vcpus[i], now_ns);
	pthread_mutex_unlock(&b->lock);
}

void blocktime_forget(struct blocktime *b, uint64_t page)
{
	if (!b->count)
		return;
	pthread_mutex_lock(&b->lock);
	for (uint32_t i = 0; i < b->count; i++)
		if (b->vcpus[i].page == page)
			runs_on(b, &b->vcpus[i], b->vcpus[i].since_ns);
	pthread_mutex_unlock(&b->lock);
}

void blocktime_note_other(struct blocktime *b, uint64_t ns)
{
	pthread_mutex_lock(&b->lock);
	b->other_ns += ns;
	b->other_faults++;
	pthread_mutex_unlock(&b->lock);
}
