/* SPDX-License-Identifier: MIT */
/* The VM: its file descriptor, memory slots, page tables and program. */
#define _GNU_SOURCE
#include "kvm.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "auxmem.h"
#include "kvm_guest.h"

#define PTE_PRESENT 0x1ull
#define PTE_WRITE 0x2ull
#define PTE_USER 0x4ull
/* Set beforehand, so that no page walk has to write into the tables. */
#define PTE_ACCESSED_DIRTY 0x60ull
#define PTE_LARGE 0x80ull
#define PTE_TABLE (PTE_PRESENT | PTE_WRITE | PTE_USER | PTE_ACCESSED_DIRTY)
#define TABLE_ENTRIES 512u
#define LARGE_BYTES 0x200000ull

static uint64_t kvm_round_up(uint64_t value, uint64_t unit)
{
	return (value + unit - 1) / unit * unit;
}

uint64_t kvm_vm_code_bytes(void)
{
	return (uint64_t)(__stop_toyguest - __start_toyguest);
}

uint64_t kvm_vm_code(const struct kvm_vm *vm)
{
	return vm->boot + BOOT_CODE_PAGE * TOY_PAGE_BYTES;
}

int kvm_vm_set_slot(struct kvm_vm *vm, uint32_t slot, uint64_t gpa, uint64_t bytes, uint64_t host,
		    uint32_t flags)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot, .flags = flags, .guest_phys_addr = gpa, .memory_size = bytes,
		.userspace_addr = host,
	};

	return ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &region) ? -errno : 0;
}

/* Identity map of [0, gibs GiB) with 2 MiB pages that user mode may use. KVM splits them as it likes. */
static void kvm_build_tables(struct kvm_vm *vm, uint64_t gibs)
{
	uint64_t first = vm->boot + BOOT_TABLES_PAGE * TOY_PAGE_BYTES;
	uint64_t gpa = GUEST_BOOT + BOOT_TABLES_PAGE * TOY_PAGE_BYTES;
	uint64_t *pml4 = (uint64_t *)(uintptr_t)first;
	uint64_t *pdpt = pml4 + TABLE_ENTRIES, *pd = pdpt + TABLE_ENTRIES;
	uint64_t i;

	pml4[0] = (gpa + TOY_PAGE_BYTES) | PTE_TABLE;
	for (i = 0; i < gibs; i++)
		pdpt[i] = (gpa + (2 + i) * TOY_PAGE_BYTES) | PTE_TABLE;
	for (i = 0; i < gibs * TABLE_ENTRIES; i++)
		pd[i] = (i * LARGE_BYTES) | PTE_TABLE | PTE_LARGE;
}

static int kvm_open(struct kvm_vm *vm)
{
	int system = open("/dev/kvm", O_RDWR | O_CLOEXEC), err = 0;

	if (system < 0)
		return -errno;
	if (ioctl(system, KVM_GET_API_VERSION, 0) != KVM_API_VERSION) {
		err = -ENOSYS;
		goto out;
	}
	vm->run_bytes = (uint64_t)ioctl(system, KVM_GET_VCPU_MMAP_SIZE, 0);
	vm->fd = ioctl(system, KVM_CREATE_VM, 0);
	if (vm->fd < 0)
		err = -errno;
	else if (fcntl(vm->fd, F_SETFD, FD_CLOEXEC))
		err = -errno;
out:
	close(system);
	return err;
}

static int kvm_map_boot(struct kvm_vm *vm, uint64_t gibs)
{
	int64_t address;

	if (kvm_vm_code_bytes() > BOOT_CODE_PAGES * TOY_PAGE_BYTES)
		return -E2BIG;
	vm->boot_bytes = (BOOT_TABLES_PAGE + 2 + gibs) * TOY_PAGE_BYTES;
	address = aux_map(vm->boot_bytes);
	if (address < 0)
		return (int)address;
	vm->boot = (uint64_t)address;
	kvm_build_tables(vm, gibs);
	memcpy((void *)(uintptr_t)kvm_vm_code(vm), __start_toyguest, kvm_vm_code_bytes());
	return kvm_vm_set_slot(vm, SLOT_BOOT, GUEST_BOOT, vm->boot_bytes, vm->boot, 0);
}

static int kvm_add_ring(struct kvm_vm *vm, uint32_t entries)
{
	int err = kvmring_enable(vm->fd, entries);

	return err < 0 ? err : kvmring_init(&vm->ring, vm->fd, entries, vm->smp);
}

struct kvmring *kvm_vm_ring(struct kvm_vm *vm)
{
	return vm->ring.entries ? &vm->ring : NULL;
}

int kvm_vm_init(struct kvm_vm *vm, uint32_t smp, uint32_t blocks, const uint64_t *base,
		const uint64_t *pages, uint64_t aux, uint64_t aux_bytes, uint32_t ring_entries)
{
	uint64_t gpa = GUEST_RAM;
	uint32_t i;
	int err;

	memset(vm, 0, sizeof(*vm));
	vm->fd = -1;
	vm->smp = smp;
	for (i = 0; i < blocks; i++) {
		vm->ram_gpa[i] = gpa;
		gpa += kvm_round_up(pages[i] * TOY_PAGE_BYTES, GUEST_GIB);
	}
	if (gpa / GUEST_GIB > TABLE_ENTRIES || aux_bytes > GUEST_RECEIVED - GUEST_AUX)
		return -E2BIG;
	err = kvm_open(vm);
	if (err < 0)
		goto fail;
	err = ring_entries ? kvm_add_ring(vm, ring_entries) : 0;
	if (err < 0)
		goto fail;
	/* Three pages Intel hardware wants for real mode; elsewhere nobody looks at them. */
	ioctl(vm->fd, KVM_SET_TSS_ADDR, 0xFFFBD000ul);
	err = kvm_map_boot(vm, gpa / GUEST_GIB);
	if (err == 0)
		err = kvm_vm_set_slot(vm, SLOT_AUX, GUEST_AUX, aux_bytes, aux, 0);
	for (i = 0; i < blocks && err == 0; i++)
		err = kvm_vm_set_slot(vm, SLOT_RAM + i, vm->ram_gpa[i], pages[i] * TOY_PAGE_BYTES,
				      base[i], 0);
	if (err == 0)
		return 0;
fail:
	kvm_vm_deinit(vm);
	return err;
}

void kvm_vm_deinit(struct kvm_vm *vm)
{
	kvmring_deinit(&vm->ring);
	if (vm->fd >= 0)
		close(vm->fd);
	vm->fd = -1;
	if (vm->boot)
		aux_unmap(vm->boot, vm->boot_bytes);
	vm->boot = 0;
}

int kvm_vm_set_received(struct kvm_vm *vm, uint32_t number, uint64_t host, uint64_t bytes,
			uint64_t *guest_out)
{
	uint64_t gpa = GUEST_RECEIVED + number * GUEST_RECEIVED_STEP;
	uint64_t start = host / TOY_PAGE_BYTES * TOY_PAGE_BYTES;
	uint64_t length = kvm_round_up(host + bytes, TOY_PAGE_BYTES) - start;
	int err;

	*guest_out = 0;
	/* A slot cannot be moved to other memory in place: take the old one away first. */
	err = kvm_vm_set_slot(vm, SLOT_RECEIVED + number, gpa, 0, 0, 0);
	if (err == -EINVAL)                     /* there was none */
		err = 0;
	if (err < 0 || !host)
		return err;
	if (length > GUEST_RECEIVED_STEP)
		return -E2BIG;
	err = kvm_vm_set_slot(vm, SLOT_RECEIVED + number, gpa, length, start, KVM_MEM_READONLY);
	if (err == 0)
		*guest_out = gpa + (host - start);
	return err;
}
