/* SPDX-License-Identifier: MIT */
/*
 * KVM's dirty rings: one per vCPU, in which KVM names each page that vCPU dirties first. They replace the
 * dirty log of the whole VM and are chosen before its first vCPU exists.
 *
 * Two empty the rings: whoever collects, and a vCPU whose ring is full, which cannot enter the guest before.
 * Both do it here, under one lock, and a page only counts as found once KVM protects it again: taken before
 * that, it could be read, then written without a trace, then protected.
 */
#ifndef GUESTMEM_KVMRING_H
#define GUESTMEM_KVMRING_H

#include <pthread.h>
#include <stdint.h>

struct kvm_dirty_gfn;

/* Where the pages of one memory slot are noted: bit first_bit + page of map. */
struct kvmring_range {
	uint32_t slot;		/* address space << 16 | number */
	uint64_t npages;
	uint64_t first_bit;
	uint64_t *map;		/* the caller's; bit per target page, touched under the lock only */
};

struct kvmring_vcpu {
	struct kvm_dirty_gfn *entries;
	uint32_t next;		/* free running: where harvesting goes on */
};

struct kvmring {
	int32_t vm_fd;		/* borrowed */
	uint32_t entries;	/* per vCPU, a power of two */
	uint32_t vcpu_count, vcpu_max;
	uint32_t range_count;
	struct kvmring_vcpu *vcpus;
	struct kvmring_range *ranges;
	uint64_t full_exits;	/* times a vCPU came out because its ring was full */
	pthread_mutex_t lock;
};

/* The most entries KVM lets a ring have, 0 where it has none, or -errno. */
int64_t kvmring_most_entries(int vm_fd);
/* Before the first vCPU; entries: a power of two. 0 or -errno. From then on the VM has no dirty log. */
int kvmring_enable(int vm_fd, uint32_t entries);

int kvmring_init(struct kvmring *r, int vm_fd, uint32_t entries, uint32_t max_vcpus);
/* Map a new vCPU's ring. 0 or -errno. */
int kvmring_add_vcpu(struct kvmring *r, int vcpu_fd);
void kvmring_deinit(struct kvmring *r);

/* What is noted from now on; what the rings still hold is dropped. Pages of other slots are not noted. */
int kvmring_set_ranges(struct kvmring *r, const struct kvmring_range *ranges, uint32_t count);
/* Empty all rings into the maps, then have KVM protect those pages again. Entries, or -errno. */
int64_t kvmring_collect(struct kvmring *r);
/* The same, for a vCPU that left the guest because its ring was full. */
int64_t kvmring_full(struct kvmring *r);
/* Move what was found into another bitmap; how many bits are new there. */
uint64_t kvmring_take(struct kvmring *r, uint64_t *map, uint64_t nbits, uint64_t *into);
uint64_t kvmring_full_exits(struct kvmring *r);

#endif
