// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)

#define GUEST_PAGE 4096ull
#define GUEST_BOOT_PAGES 4	/* code, PML4, PDPT, PD */
#define GUEST_RAM (2ull << 20)
#define GUEST_DOORBELL (1ull << 29)	/* in the page tables, but in no memory slot */
#define GUEST_CPUID_MAX 256u
#define PTE_TABLE 0x67ull	/* present, writable, user, accessed, dirty */
#define PTE_LARGE 0xE7ull
#define CAP_DIRTY_RING 192	/* KVM_CAP_DIRTY_LOG_RING */
#define CAP_DIRTY_RING_ACQ_REL 223
#define DIRTY_RING_PAGE_OFFSET 64ull
#define DIRTY_F_DIRTY 1u
#define DIRTY_F_RESET 2u
#define RESET_DIRTY_RINGS _IO(KVMIO, 0xc7)

/* struct kvm_dirty_gfn, which the build host's headers may be too old to have. */
struct guest_dirty_gfn {
	uint32_t flags, slot;
	uint64_t offset;
};

_Static_assert(sizeof(struct guest_dirty_gfn) == 16, "kernel layout");
_Static_assert(sizeof(struct kvm_regs) == 144, "kernel layout");
_Static_assert(sizeof(struct kvm_sregs) == 312, "kernel layout");
_Static_assert(sizeof(struct kvm_dirty_log) == 16, "kernel layout");

/* Each ends with a store to the doorbell, whose address is in rdi: KVM hands it over as MMIO, from user
 * mode too, where port I/O would ask for privileges. */
static const uint8_t guest_code[][16] = {
	[GUEST_SPIN] = { 0x48, 0xff, 0xc9,		/* 1: dec rcx */
			 0x75, 0xfb,			/*    jnz 1b */
			 0x48, 0x89, 0x07 },		/*    mov [rdi], rax */
	[GUEST_LOAD] = { 0x48, 0x8b, 0x06,		/* mov rax, [rsi] */
			 0x48, 0x89, 0x07 },
	[GUEST_STORE] = { 0x48, 0x89, 0x06,		/* mov [rsi], rax */
			  0x48, 0x89, 0x07 },
};

static void *guest_map(uint64_t bytes, int fd, uint64_t offset)
{
	int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, (off_t)offset);

	return at == MAP_FAILED ? NULL : at;
}

/* Identity map of the first GiB with 2 MiB pages that user mode may use, and the programs. */
static int guest_build_boot(struct guest *g)
{
	uint64_t *pml4, *pdpt, *pd, i;

	g->boot = guest_map(GUEST_BOOT_PAGES * GUEST_PAGE, -1, 0);
	if (!g->boot)
		return -errno;
	memcpy(g->boot, guest_code, sizeof(guest_code));
	pml4 = (uint64_t *)(g->boot + GUEST_PAGE);
	pdpt = (uint64_t *)(g->boot + 2 * GUEST_PAGE);
	pd = (uint64_t *)(g->boot + 3 * GUEST_PAGE);
	pml4[0] = 2 * GUEST_PAGE | PTE_TABLE;
	pdpt[0] = 3 * GUEST_PAGE | PTE_TABLE;
	for (i = 0; i < 512; i++)
		pd[i] = i << 21 | PTE_LARGE;
	return 0;
}

static int guest_add_slot(struct guest *g, uint32_t slot, uint64_t gpa, const void *host,
			  uint64_t bytes, uint32_t flags)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot, .flags = flags, .guest_phys_addr = gpa, .memory_size = bytes,
		.userspace_addr = (uintptr_t)host,
	};

	return ioctl(g->vm, KVM_SET_USER_MEMORY_REGION, &region) ? -errno : 0;
}

/* The newer capability promises the ordering every architecture needs; x86 has that with the older. */
static int guest_enable_ring(struct guest *g, uint32_t ring_bytes)
{
	static const uint32_t caps[] = { CAP_DIRTY_RING_ACQ_REL, CAP_DIRTY_RING };
	unsigned int i;

	for (i = 0; i < 2; i++) {
		struct kvm_enable_cap enable = { .cap = caps[i], .args = { ring_bytes } };

		if (ioctl(g->vm, KVM_CHECK_EXTENSION, caps[i]) <= 0)
			continue;
		if (ioctl(g->vm, KVM_ENABLE_CAP, &enable))
			return -errno;
		g->ring_entries = ring_bytes / sizeof(struct guest_dirty_gfn);
		return 0;
	}
	return -EOPNOTSUPP;
}

static int guest_set_cpuid(struct guest *g)
{
	size_t bytes = sizeof(struct kvm_cpuid2) +
		       GUEST_CPUID_MAX * sizeof(struct kvm_cpuid_entry2);
	struct kvm_cpuid2 *cpuid = calloc(1, bytes);
	int err = 0;

	if (!cpuid)
		return -ENOMEM;
	cpuid->nent = GUEST_CPUID_MAX;
	if (ioctl(g->system, KVM_GET_SUPPORTED_CPUID, cpuid) ||
	    ioctl(g->vcpu, KVM_SET_CPUID2, cpuid))
		err = -errno;
	free(cpuid);
	return err;
}

static int guest_open_vcpu(struct guest *g)
{
	int err;

	g->vcpu = ioctl(g->vm, KVM_CREATE_VCPU, 0ul);
	if (g->vcpu < 0)
		return -errno;
	err = guest_set_cpuid(g);
	if (err < 0)
		return err;
	g->run_bytes = (uint64_t)ioctl(g->system, KVM_GET_VCPU_MMAP_SIZE, 0);
	g->run = guest_map(g->run_bytes, g->vcpu, 0);
	if (!g->run)
		return -errno;
	if (g->ring_entries)
		g->ring = guest_map(g->ring_entries * sizeof(struct guest_dirty_gfn), g->vcpu,
				    DIRTY_RING_PAGE_OFFSET * GUEST_PAGE);
	return g->ring_entries && !g->ring ? -errno : 0;
}

static int guest_open_vm(struct guest *g)
{
	g->vm = ioctl(g->system, KVM_CREATE_VM, 0ul);
	if (g->vm < 0)
		return -errno;
	/* Pages Intel hardware wants for real mode; elsewhere nobody looks at them. */
	(void)ioctl(g->vm, KVM_SET_TSS_ADDR, 0xfffbd000ul);
	return 0;
}

static int guest_add_memory(struct guest *g)
{
	int err = guest_build_boot(g);

	if (err == 0)
		err = guest_add_slot(g, 0, 0, g->boot, GUEST_BOOT_PAGES * GUEST_PAGE, 0);
	if (err == 0)
		err = guest_add_slot(g, GUEST_RAM_SLOT, GUEST_RAM, g->ram, g->ram_bytes,
				     KVM_MEM_LOG_DIRTY_PAGES);
	return err;
}

int guest_init(struct guest *g, uint64_t ram, uint64_t ram_bytes, uint32_t ring_bytes,
	       uint32_t *step_out)
{
	int err = 0;

	memset(g, 0, sizeof(*g));
	g->vm = g->vcpu = -1;
	g->ram = (uint8_t *)(uintptr_t)ram;
	g->ram_bytes = ram_bytes;
	*step_out = GUEST_STEP_OPEN;
	g->system = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (g->system < 0)
		return -errno;
	if (ioctl(g->system, KVM_GET_API_VERSION, 0) != KVM_API_VERSION)
		err = -ENOTTY;
	if (err == 0) {
		*step_out = GUEST_STEP_VM;
		err = guest_open_vm(g);
	}
	if (err == 0 && ring_bytes) {
		*step_out = GUEST_STEP_RING;
		err = guest_enable_ring(g, ring_bytes);
	}
	if (err == 0) {
		*step_out = GUEST_STEP_MEMORY;
		err = guest_add_memory(g);
	}
	if (err == 0) {
		*step_out = GUEST_STEP_VCPU;
		err = guest_open_vcpu(g);
	}
	if (err < 0)
		guest_deinit(g);
	return err;
}

void guest_deinit(struct guest *g)
{
	if (g->ring)
		munmap(g->ring, g->ring_entries * sizeof(struct guest_dirty_gfn));
	if (g->run)
		munmap(g->run, g->run_bytes);
	if (g->vcpu >= 0)
		close(g->vcpu);
	if (g->vm >= 0)
		close(g->vm);
	if (g->system >= 0)
		close(g->system);
	if (g->boot)
		munmap(g->boot, GUEST_BOOT_PAGES * GUEST_PAGE);
	memset(g, 0, sizeof(*g));
	g->system = g->vm = g->vcpu = -1;
}

static struct kvm_segment guest_segment(uint8_t type, uint16_t selector, uint32_t cpl)
{
	return (struct kvm_segment){
		.limit = 0xffffffff, .selector = (uint16_t)(selector | cpl), .type = type,
		.present = 1, .dpl = (uint8_t)cpl, .s = 1, .g = 1,
	};
}

/* 64-bit mode from the first instruction on. No descriptor table in memory: nothing loads a segment,
 * and nothing may interrupt. */
static int guest_set_registers(struct guest *g, uint32_t program, uint32_t cpl, uint64_t argument)
{
	struct kvm_regs regs = {
		.rip = program * sizeof(guest_code[0]), .rax = GUEST_STORE_VALUE, .rcx = argument,
		.rsi = GUEST_RAM + argument, .rdi = GUEST_DOORBELL, .rflags = 2,
	};
	struct kvm_sregs sregs;

	if (ioctl(g->vcpu, KVM_GET_SREGS, &sregs))
		return -errno;
	sregs.cr0 = 0x80050033ull;
	sregs.cr3 = GUEST_PAGE;
	sregs.cr4 = 0x620ull;	/* PAE, OSFXSR, OSXMMEXCPT */
	sregs.efer = 0x500ull;
	sregs.cs = guest_segment(11, cpl ? 0x30 : 0x10, cpl);
	sregs.cs.l = 1;
	sregs.ss = guest_segment(3, cpl ? 0x28 : 0x18, cpl);
	sregs.ss.db = 1;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss;
	if (ioctl(g->vcpu, KVM_SET_SREGS, &sregs) || ioctl(g->vcpu, KVM_SET_REGS, &regs))
		return -errno;
	return 0;
}

static uint64_t guest_cpu_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
	return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

int guest_run(struct guest *g, uint32_t program, uint32_t cpl, uint64_t argument,
	      struct guest_answer *out)
{
	uint64_t start;
	int err;

	memset(out, 0, sizeof(*out));
	if (program >= sizeof(guest_code) / sizeof(guest_code[0]) || (cpl != 0 && cpl != 3))
		return -EINVAL;
	err = guest_set_registers(g, program, cpl, argument);
	if (err < 0)
		return err;
	start = guest_cpu_ns();
	err = ioctl(g->vcpu, KVM_RUN, 0) ? -errno : 0;
	out->ns = guest_cpu_ns() - start;
	out->exit_reason = g->run->exit_reason;
	if (err < 0)
		return err;
	if (out->exit_reason == KVM_EXIT_MMIO && g->run->mmio.is_write &&
	    g->run->mmio.phys_addr == GUEST_DOORBELL)
		memcpy(&out->value, g->run->mmio.data, sizeof(out->value));
	else
		return -EIO;
	/* Enter once more without running, so that the store to the doorbell is over and done with. */
	g->run->immediate_exit = 1;
	(void)ioctl(g->vcpu, KVM_RUN, 0);
	g->run->immediate_exit = 0;
	return 0;
}

static int guest_harvest_ring(struct guest *g, uint64_t *pages, uint32_t max)
{
	int found = 0;

	for (;;) {
		struct guest_dirty_gfn *entry = (struct guest_dirty_gfn *)g->ring + g->ring_next;

		/* The flag is written after the rest of the entry. */
		if (!(__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) & DIRTY_F_DIRTY))
			break;
		if (entry->slot == GUEST_RAM_SLOT && (uint32_t)found < max)
			pages[found++] = entry->offset;
		__atomic_store_n(&entry->flags, DIRTY_F_RESET, __ATOMIC_RELEASE);
		g->ring_next = (g->ring_next + 1) % g->ring_entries;
	}
	return ioctl(g->vm, RESET_DIRTY_RINGS, 0) < 0 ? -errno : found;
}

int guest_dirty_pages(struct guest *g, uint64_t *pages, uint32_t max)
{
	uint64_t count = g->ram_bytes / GUEST_PAGE, page, *bits;
	struct kvm_dirty_log log = { .slot = GUEST_RAM_SLOT };
	int found = 0;

	if (g->ring)
		return guest_harvest_ring(g, pages, max);
	bits = calloc((count + 63) / 64, sizeof(*bits));
	if (!bits)
		return -ENOMEM;
	log.dirty_bitmap = bits;
	if (ioctl(g->vm, KVM_GET_DIRTY_LOG, &log))
		found = -errno;
	for (page = 0; found >= 0 && page < count && (uint32_t)found < max; page++)
		if (bits[page / 64] >> (page % 64) & 1)
			pages[found++] = page;
	free(bits);
	return found;
}

#else /* another architecture */

int guest_init(struct guest *g, uint64_t ram, uint64_t ram_bytes, uint32_t ring_bytes,
	       uint32_t *step_out)
{
	(void)ram, (void)ram_bytes, (void)ring_bytes;
	memset(g, 0, sizeof(*g));
	*step_out = GUEST_STEP_OPEN;
	return -EOPNOTSUPP;
}

void guest_deinit(struct guest *g)
{
	(void)g;
}

int guest_run(struct guest *g, uint32_t program, uint32_t cpl, uint64_t argument,
	      struct guest_answer *out)
{
	(void)g, (void)program, (void)cpl, (void)argument, (void)out;
	return -EOPNOTSUPP;
}

int guest_dirty_pages(struct guest *g, uint64_t *pages, uint32_t max)
{
	(void)g, (void)pages, (void)max;
	return -EOPNOTSUPP;
}

#endif
