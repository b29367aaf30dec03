// SPDX-License-Identifier: MIT
#include "kvmlog.h"

#include <errno.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>

#include "bitmap.h"

/* KVM clears the log in whole words of 64 pages, except at the slot's end. */
#define CLEAR_UNIT 64

int kvmlog_enable_manual_protect(int vm_fd)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
		/* Not INITIALLY_SET: the first log is to hold what was written, not everything. */
		.args = { KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE },
	};

	if (ioctl(vm_fd, KVM_CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) <= 0)
		return 0;
	return ioctl(vm_fd, KVM_ENABLE_CAP, &cap) < 0 ? -errno : 1;
}

int kvmlog_set_logging(int vm_fd, const struct kvmlog_slot *slot, bool enabled)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot->slot,
		.flags = slot->flags | (enabled ? KVM_MEM_LOG_DIRTY_PAGES : 0),
		.guest_phys_addr = slot->guest_address,
		.memory_size = slot->length,
		.userspace_addr = slot->host,
	};

	return ioctl(vm_fd, KVM_SET_USER_MEMORY_REGION, &region) < 0 ? -errno : 0;
}

/* Re-protect the pages named in log, one call for each stretch of words that names any. */
static int clear_log(int vm_fd, uint32_t slot, uint64_t *log, uint64_t npages)
{
	uint64_t words = BITMAP_WORDS(npages), first, end;

	for (first = 0; first < words; first = end) {
		struct kvm_clear_dirty_log op = { .slot = slot };

		end = first + 1;
		if (!log[first])
			continue;
		while (end < words && log[end])
			end++;
		op.first_page = first * CLEAR_UNIT;
		op.num_pages = (end == words ? npages : end * CLEAR_UNIT) - op.first_page;
		op.dirty_bitmap = &log[first];
		if (ioctl(vm_fd, KVM_CLEAR_DIRTY_LOG, &op) < 0)
			return -errno;
	}
	return 0;
}

int64_t kvmlog_collect(int vm_fd, uint32_t slot, bool manual, uint64_t *scratch, uint64_t npages,
		       uint64_t *map, uint64_t first_bit)
{
	struct kvm_dirty_log log = { .slot = slot, .dirty_bitmap = scratch };
	int rc;

	if (ioctl(vm_fd, KVM_GET_DIRTY_LOG, &log) < 0)
		return -errno;
	if (manual) {
		rc = clear_log(vm_fd, slot, scratch, npages);
		/* What was read but not protected again stays in KVM's log: nothing is lost. */
		if (rc < 0)
			return rc;
	}
	return bitmap_or_at(map, first_bit, scratch, npages);
}
