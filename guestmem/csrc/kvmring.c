// SPDX-License-Identifier: MIT
#include "kvmring.h"

#include <errno.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bitmap.h"

/* Kernel interface (Linux 5.11; 6.1 for the second, which is also for weakly ordered processors). */
#ifndef KVM_CAP_DIRTY_LOG_RING
#define KVM_CAP_DIRTY_LOG_RING 192
#endif
#ifndef KVM_CAP_DIRTY_LOG_RING_ACQ_REL
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL 223
#endif

_Static_assert(sizeof(struct kvm_dirty_gfn) == 16, "a ring's entry");

static int ring_capability(int vm_fd, int64_t *bytes)
{
	const int known[] = { KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING };

	for (unsigned i = 0; i < sizeof(known) / sizeof(*known); i++) {
		*bytes = ioctl(vm_fd, KVM_CHECK_EXTENSION, known[i]);
		if (*bytes < 0)
			return -errno;
		if (*bytes > 0)
			return known[i];
	}
	return 0;
}

int64_t kvmring_most_entries(int vm_fd)
{
	int64_t bytes;
	int cap = ring_capability(vm_fd, &bytes);

	return cap <= 0 ? cap : bytes / (int64_t)sizeof(struct kvm_dirty_gfn);
}

int kvmring_enable(int vm_fd, uint32_t entries)
{
	struct kvm_enable_cap enable = { 0 };
	int64_t most;
	int cap = ring_capability(vm_fd, &most);

	if (cap < 0)
		return cap;
	if (cap == 0)
		return -EOPNOTSUPP;
	enable.cap = (uint32_t)cap;
	enable.args[0] = entries * sizeof(struct kvm_dirty_gfn);
	return ioctl(vm_fd, KVM_ENABLE_CAP, &enable) < 0 ? -errno : 0;
}

int kvmring_init(struct kvmring *r, int vm_fd, uint32_t entries, uint32_t max_vcpus)
{
	memset(r, 0, sizeof(*r));
	r->vm_fd = vm_fd;
	r->entries = entries;
	r->vcpu_max = max_vcpus;
	r->vcpus = calloc(max_vcpus, sizeof(*r->vcpus));
	if (!r->vcpus)
		return -ENOMEM;
	return -pthread_mutex_init(&r->lock, NULL);
}

static uint64_t ring_bytes(const struct kvmring *r)
{
	return r->entries * sizeof(struct kvm_dirty_gfn);
}

int kvmring_add_vcpu(struct kvmring *r, int vcpu_fd)
{
	off_t at = KVM_DIRTY_LOG_PAGE_OFFSET * sysconf(_SC_PAGESIZE);
	void *entries;
	int rc = 0;

	entries = mmap(NULL, ring_bytes(r), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_fd, at);
	if (entries == MAP_FAILED)
		return -errno;
	madvise(entries, ring_bytes(r), MADV_DONTFORK);
	pthread_mutex_lock(&r->lock);
	if (r->vcpu_count < r->vcpu_max)
		r->vcpus[r->vcpu_count++].entries = entries;
	else
		rc = -E2BIG;
	pthread_mutex_unlock(&r->lock);
	if (rc < 0)
		munmap(entries, ring_bytes(r));
	return rc;
}

void kvmring_deinit(struct kvmring *r)
{
	if (!r->vcpus)
		return;
	for (uint32_t i = 0; i < r->vcpu_count; i++)
		munmap(r->vcpus[i].entries, ring_bytes(r));
	free(r->vcpus);
	free(r->ranges);
	r->vcpus = NULL;
	r->ranges = NULL;
	pthread_mutex_destroy(&r->lock);
}

/* A slot may be shown in parts; one that is not listed is not guest RAM. */
static void note(struct kvmring *r, uint32_t slot, uint64_t page)
{
	for (uint32_t i = 0; i < r->range_count; i++) {
		const struct kvmring_range *range = &r->ranges[i];

		if (range->slot != slot || page >= range->npages)
			continue;
		bitmap_set(range->map, range->first_bit + page, 1);
		return;
	}
}

/* KVM fills entries in order, so the first that is not dirty ends what there is. */
static int64_t harvest(struct kvmring *r, struct kvmring_vcpu *v)
{
	int64_t found = 0;

	for (;; v->next++, found++) {
		struct kvm_dirty_gfn *entry = &v->entries[v->next & (r->entries - 1)];

		if (__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
			return found;
		note(r, entry->slot, entry->offset);
		__atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
	}
}

static int64_t collect_locked(struct kvmring *r)
{
	int64_t found = 0;

	for (uint32_t i = 0; i < r->vcpu_count; i++)
		found += harvest(r, &r->vcpus[i]);
	/* Always: an earlier call may have harvested and failed to reset. */
	if (ioctl(r->vm_fd, KVM_RESET_DIRTY_RINGS, 0) < 0)
		return -errno;
	return found;
}

int64_t kvmring_collect(struct kvmring *r)
{
	int64_t found;

	pthread_mutex_lock(&r->lock);
	found = collect_locked(r);
	pthread_mutex_unlock(&r->lock);
	return found;
}

int64_t kvmring_full(struct kvmring *r)
{
	int64_t found;

	pthread_mutex_lock(&r->lock);
	r->full_exits++;
	found = collect_locked(r);
	pthread_mutex_unlock(&r->lock);
	return found;
}

int kvmring_set_ranges(struct kvmring *r, const struct kvmring_range *ranges, uint32_t count)
{
	struct kvmring_range *copy = NULL;
	int64_t rc;

	if (count) {
		copy = calloc(count, sizeof(*copy));
		if (!copy)
			return -ENOMEM;
		memcpy(copy, ranges, count * sizeof(*copy));
	}
	pthread_mutex_lock(&r->lock);
	free(r->ranges);
	r->ranges = NULL;
	r->range_count = 0;
	rc = collect_locked(r);
	r->ranges = copy;
	r->range_count = count;
	pthread_mutex_unlock(&r->lock);
	return rc < 0 ? (int)rc : 0;
}

uint64_t kvmring_take(struct kvmring *r, uint64_t *map, uint64_t nbits, uint64_t *into)
{
	uint64_t fresh;

	pthread_mutex_lock(&r->lock);
	fresh = bitmap_take(into, map, nbits);
	pthread_mutex_unlock(&r->lock);
	return fresh;
}

uint64_t kvmring_full_exits(struct kvmring *r)
{
	uint64_t exits;

	pthread_mutex_lock(&r->lock);
	exits = r->full_exits;
	pthread_mutex_unlock(&r->lock);
	return exits;
}
