/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "kvm_state.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#include "kvm_guest.h"

#define CR0_LONG_MODE 0x80050033ull
#define CR4_PAE 0x20ull
#define CR4_OSFXSR 0x600ull
#define EFER_LONG_MODE 0x500ull
#define RFLAGS_FIXED 0x2ull
#define SELECTOR_CODE 0x33u
#define SELECTOR_DATA 0x2bu
#define DPL_USER 3u

/* What user mode can have left in model specific registers. The tick counter is the host's. */
static const uint32_t kvm_msrs[] = {
	0x174, 0x175, 0x176,                    /* SYSENTER_CS, _ESP, _EIP */
	0x277,                                  /* PAT */
	0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, /* STAR, LSTAR, CSTAR, SFMASK */
	0xC0000100, 0xC0000101, 0xC0000102,     /* FS, GS and kernel GS base */
	0xC0000103,                             /* TSC_AUX */
};

struct kvm_one_msr {
	struct kvm_msrs head;
	struct kvm_msr_entry entry;
};

_Static_assert(sizeof(kvm_msrs) / sizeof(kvm_msrs[0]) <= KVM_STATE_MSRS, "room for all");
_Static_assert(sizeof(struct kvm_regs) == 144, "kernel layout");
_Static_assert(sizeof(struct kvm_sregs) == 312, "kernel layout");
_Static_assert(sizeof(struct kvm_debugregs) == 128, "kernel layout");
_Static_assert(sizeof(struct kvm_xcrs) == 392, "kernel layout");
_Static_assert(sizeof(struct kvm_vcpu_events) == 64, "kernel layout");
_Static_assert(sizeof(struct kvm_xsave) == 4096, "kernel layout");
_Static_assert(sizeof(struct kvm_one_msr) == 24, "kernel layout");

static uint64_t kvm_vcpu_page(const struct kvm_vcpu *vcpu)
{
	return BOOT_VCPU_PAGE + 2ull * vcpu->index;
}

static void *kvm_stack(const struct kvm_vcpu *vcpu)
{
	return (char *)vcpu->shared + TOY_PAGE_BYTES;
}

static uint64_t kvm_tables_gpa(void)
{
	return GUEST_BOOT + BOOT_TABLES_PAGE * TOY_PAGE_BYTES;
}

static struct kvm_segment kvm_user_segment(uint8_t type, uint16_t selector)
{
	return (struct kvm_segment){
		.limit = 0xFFFFFFFF, .selector = selector, .type = type, .present = 1,
		.dpl = DPL_USER, .s = 1, .g = 1,
	};
}

int kvm_state_reset(struct kvm_vcpu *vcpu)
{
	uint64_t shared = GUEST_BOOT + kvm_vcpu_page(vcpu) * TOY_PAGE_BYTES;
	uint64_t entry = (uint64_t)((const char *)guest_main - __start_toyguest);
	struct kvm_regs regs = {
		.rip = GUEST_BOOT + BOOT_CODE_PAGE * TOY_PAGE_BYTES + entry,
		/* As after a call: 8 below a multiple of 16. */
		.rsp = shared + TOY_PAGE_BYTES + GUEST_STACK_BYTES - 8,
		.rdi = shared,
		.rflags = RFLAGS_FIXED,
	};
	struct kvm_sregs sregs;

	if (ioctl(vcpu->fd, KVM_GET_SREGS, &sregs))
		return -errno;
	sregs.cr0 = CR0_LONG_MODE;
	sregs.cr3 = kvm_tables_gpa();
	sregs.cr4 = CR4_PAE | CR4_OSFXSR;
	sregs.efer = EFER_LONG_MODE;
	sregs.cs = kvm_user_segment(11, SELECTOR_CODE);
	sregs.cs.l = 1;
	sregs.ss = kvm_user_segment(3, SELECTOR_DATA);
	sregs.ss.db = 1;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss;
	if (ioctl(vcpu->fd, KVM_SET_SREGS, &sregs) || ioctl(vcpu->fd, KVM_SET_REGS, &regs))
		return -errno;
	return 0;
}

void kvm_state_commit(struct kvm_vcpu *vcpu)
{
	__atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
	(void)ioctl(vcpu->fd, KVM_RUN, 0);
	/* Who asked for the halt set it too and clears it when we are parked; either order is fine. */
	__atomic_store_n(&vcpu->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
}

static int kvm_get_msrs(int fd, struct kvm_state *out)
{
	size_t i;

	out->msr_count = 0;
	for (i = 0; i < sizeof(kvm_msrs) / sizeof(kvm_msrs[0]); i++) {
		struct kvm_one_msr one = { .head.nmsrs = 1, .entry.index = kvm_msrs[i] };
		int count = ioctl(fd, KVM_GET_MSRS, &one);

		if (count < 0)
			return -errno;
		if (count == 1)                 /* 0: this KVM has no such register */
			out->msrs[out->msr_count++] = (struct kvm_state_msr){
				.index = kvm_msrs[i], .value = one.entry.data,
			};
	}
	return 0;
}

/* A register this KVM refuses is no harm as long as it holds what it should. */
static int kvm_set_msr(int fd, const struct kvm_state_msr *msr)
{
	struct kvm_one_msr one = {
		.head.nmsrs = 1, .entry = { .index = (uint32_t)msr->index, .data = msr->value },
	};

	if (ioctl(fd, KVM_SET_MSRS, &one) == 1)
		return 0;
	one.entry.data = ~msr->value;
	if (ioctl(fd, KVM_GET_MSRS, &one) == 1 && one.entry.data == msr->value)
		return 0;
	return msr->value ? -ENOTSUP : 0;
}

/* The order in which pending results settle: run state first, what interrupts it last. */
int kvm_state_save(struct kvm_vcpu *vcpu, struct kvm_state *out)
{
	struct kvm_mp_state mp;
	int fd = vcpu->fd;

	memset(out, 0, sizeof(*out));
	if (ioctl(fd, KVM_GET_MP_STATE, &mp) || ioctl(fd, KVM_GET_REGS, &out->regs) ||
	    ioctl(fd, KVM_GET_SREGS, &out->sregs) || ioctl(fd, KVM_GET_XSAVE, &out->xsave) ||
	    ioctl(fd, KVM_GET_XCRS, &out->xcrs) || ioctl(fd, KVM_GET_DEBUGREGS, &out->debugregs))
		return -errno;
	out->mp_state = mp.mp_state;
	if (kvm_get_msrs(fd, out) < 0 || ioctl(fd, KVM_GET_VCPU_EVENTS, &out->events))
		return -errno;
	memcpy(out->stack, kvm_stack(vcpu), sizeof(out->stack));
	return 0;
}

static bool kvm_is_ours(const struct kvm_state *state)
{
	return state->sregs.cs.dpl == DPL_USER && state->sregs.ss.dpl == DPL_USER &&
	       state->sregs.cr0 == CR0_LONG_MODE && state->sregs.cr3 == kvm_tables_gpa() &&
	       state->sregs.efer == EFER_LONG_MODE && state->mp_state == KVM_MP_STATE_RUNNABLE &&
	       state->msr_count <= KVM_STATE_MSRS && !state->events.exception.injected &&
	       !state->events.interrupt.injected && !state->events.nmi.pending;
}

int kvm_state_restore(struct kvm_vcpu *vcpu, const struct kvm_state *state)
{
	struct kvm_mp_state mp = { .mp_state = (uint32_t)state->mp_state };
	int fd = vcpu->fd, err = 0;
	uint64_t i;

	if (!kvm_is_ours(state))
		return -EINVAL;
	if (ioctl(fd, KVM_SET_SREGS, &state->sregs) || ioctl(fd, KVM_SET_XSAVE, &state->xsave) ||
	    ioctl(fd, KVM_SET_XCRS, &state->xcrs) ||
	    ioctl(fd, KVM_SET_DEBUGREGS, &state->debugregs))
		return -errno;
	for (i = 0; i < state->msr_count && err == 0; i++)
		err = kvm_set_msr(fd, &state->msrs[i]);
	if (err < 0)
		return err;
	if (ioctl(fd, KVM_SET_REGS, &state->regs) ||
	    ioctl(fd, KVM_SET_VCPU_EVENTS, &state->events) || ioctl(fd, KVM_SET_MP_STATE, &mp))
		return -errno;
	memcpy(kvm_stack(vcpu), state->stack, sizeof(state->stack));
	return 0;
}
