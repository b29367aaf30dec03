/* SPDX-License-Identifier: MIT */
/* One KVM vCPU: set-up, and the loop around KVM_RUN. */
#define _GNU_SOURCE
#include "kvm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "kvm_guest.h"
#include "kvm_state.h"

#define CPUID_ENTRIES_MAX 256u
/* Kernel interface (Linux 5.11). */
#ifndef KVM_EXIT_DIRTY_RING_FULL
#define KVM_EXIT_DIRTY_RING_FULL 31
#endif

static struct toy_state *kvm_vcpu_state(const struct kvm_vcpu *vcpu)
{
	return (struct toy_state *)(uintptr_t)vcpu->host.state;
}

static uint64_t kvm_ticks(void)
{
	return __builtin_ia32_rdtsc();
}

uint64_t kvm_vcpu_tick_ns(const struct kvm_vcpu *vcpu, uint64_t ticks)
{
	uint64_t now = kvm_ticks(), now_ns = gate_now_ns();

	if (!ticks)
		return 0;
	ticks += vcpu->tick_offset;
	if (ticks > now)                        /* within the two counters' difference */
		return now_ns;
	return now_ns - (uint64_t)((unsigned __int128)(now - ticks) * 1000000000u / vcpu->ticks_per_s);
}

/* The supported CPUID, which also tells KVM what state the guest may have. */
static int kvm_set_cpuid(int fd)
{
	size_t bytes = sizeof(struct kvm_cpuid2) + CPUID_ENTRIES_MAX * sizeof(struct kvm_cpuid_entry2);
	struct kvm_cpuid2 *cpuid = calloc(1, bytes);
	int system = open("/dev/kvm", O_RDWR | O_CLOEXEC), err = 0;

	if (!cpuid || system < 0) {
		err = cpuid ? -errno : -ENOMEM;
	} else {
		cpuid->nent = CPUID_ENTRIES_MAX;
		if (ioctl(system, KVM_GET_SUPPORTED_CPUID, cpuid) || ioctl(fd, KVM_SET_CPUID2, cpuid))
			err = -errno;
	}
	if (system >= 0)
		close(system);
	free(cpuid);
	return err;
}

/* The guest reads the host's tick counter where KVM lets us say so (Linux 5.16), so that what it wrote
 * compares with the host's clock to the tick; else the difference is what two readings say. */
static void kvm_share_ticks(struct kvm_vcpu *vcpu)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} counter = { .head.nmsrs = 1, .entry.index = 0x10 /* IA32_TSC */ };
	uint64_t zero = 0;
	struct kvm_device_attr attr = {
		.group = 0 /* KVM_VCPU_TSC_CTRL */, .attr = 0 /* KVM_VCPU_TSC_OFFSET */,
		.addr = (uint64_t)(uintptr_t)&zero,
	};

	if (ioctl(vcpu->fd, KVM_SET_DEVICE_ATTR, &attr) == 0)
		return;
	if (ioctl(vcpu->fd, KVM_GET_MSRS, &counter) == 1)
		vcpu->tick_offset = kvm_ticks() - counter.entry.data;
}

static void kvm_fill_shared(struct kvm_vcpu *vcpu, uint64_t aux)
{
	struct guest_shared *shared = vcpu->shared;
	const struct toy_view *host = &vcpu->host;
	uint32_t i;

	memset(shared, 0, sizeof(*shared));
	memcpy(shared->view.base, vcpu->vm->ram_gpa, sizeof(shared->view.base));
	shared->view.log = host->log - aux + GUEST_AUX;
	shared->view.state = host->state - aux + GUEST_AUX;
	shared->view.layout = host->layout - aux + GUEST_AUX;
	shared->view.workload = host->workload - aux + GUEST_AUX;
	shared->index = vcpu->index;
	shared->ns_per_tick =
		(uint64_t)(((unsigned __int128)1000000000u << 32) / vcpu->ticks_per_s);
	for (i = 0; i < TOY_MAX_BLOCKS; i++)
		shared->view.received[i] = 0;
}

int kvm_vcpu_init(struct kvm_vcpu *vcpu, struct kvm_vm *vm, uint32_t index,
		  const struct toy_view *host, uint64_t aux)
{
	uint64_t page = BOOT_VCPU_PAGE + 2ull * index;
	void *run;
	int err, khz;

	memset(vcpu, 0, sizeof(*vcpu));
	gate_init(&vcpu->gate);
	vcpu->vm = vm;
	vcpu->index = index;
	vcpu->host = *host;
	vcpu->shared = (struct guest_shared *)(uintptr_t)(vm->boot + page * TOY_PAGE_BYTES);
	vcpu->fd = ioctl(vm->fd, KVM_CREATE_VCPU, (unsigned long)index);
	if (vcpu->fd < 0)
		return -errno;
	run = mmap(NULL, vm->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
	if (run == MAP_FAILED) {
		err = -errno;
		goto fail;
	}
	vcpu->run = run;
	madvise(run, vm->run_bytes, MADV_DONTFORK);
	err = kvm_vm_ring(vm) ? kvmring_add_vcpu(&vm->ring, vcpu->fd) : 0;
	if (err < 0)
		goto fail;
	err = kvm_set_cpuid(vcpu->fd);
	if (err < 0)
		goto fail;
	kvm_share_ticks(vcpu);
	khz = ioctl(vcpu->fd, KVM_GET_TSC_KHZ, 0);
	if (khz <= 0) {
		err = khz < 0 ? -errno : -EIO;
		goto fail;
	}
	vcpu->ticks_per_s = (uint64_t)khz * 1000u;
	kvm_fill_shared(vcpu, aux);
	err = kvm_state_reset(vcpu);
	if (err == 0)
		return 0;
fail:
	kvm_vcpu_deinit(vcpu);
	return err;
}

void kvm_vcpu_deinit(struct kvm_vcpu *vcpu)
{
	if (vcpu->run)
		munmap(vcpu->run, vcpu->vm->run_bytes);
	vcpu->run = NULL;
	if (vcpu->fd >= 0)
		close(vcpu->fd);
	vcpu->fd = -1;
}

void kvm_vcpu_go(struct kvm_vcpu *vcpu)
{
	struct toy_state *state = kvm_vcpu_state(vcpu);

	/* A probe given up is timed anew: what lay between was not the guest's. */
	if (state->probe_clock)
		toy_store(&state->probe_clock, kvm_ticks() - vcpu->tick_offset);
	__atomic_store_n(&vcpu->shared->stop, 0, __ATOMIC_RELEASE);
	gate_go(&vcpu->gate);
}

void kvm_vcpu_ask_halt(struct kvm_vcpu *vcpu)
{
	__atomic_store_n(&vcpu->shared->stop, 1, __ATOMIC_RELEASE);
	gate_ask_halt(&vcpu->gate, &vcpu->run->immediate_exit);
}

void kvm_vcpu_halt(struct kvm_vcpu *vcpu)
{
	__atomic_store_n(&vcpu->shared->stop, 1, __ATOMIC_RELEASE);
	gate_halt(&vcpu->gate, &vcpu->run->immediate_exit);
}

void kvm_vcpu_quit(struct kvm_vcpu *vcpu)
{
	gate_quit(&vcpu->gate);
}

bool kvm_vcpu_is_running(const struct kvm_vcpu *vcpu)
{
	return gate_is_running(&vcpu->gate);
}

static void kvm_vcpu_fail(struct kvm_vcpu *vcpu, int error)
{
	vcpu->error = error;
	vcpu->exit_reason = vcpu->run->exit_reason;
	__atomic_store_n(&vcpu->status, VCPU_FAILED, __ATOMIC_RELEASE);
	gate_park_self(&vcpu->gate);
}

/* KVM_RUN came back with a signal. True: run on. */
static bool kvm_vcpu_interrupted(struct kvm_vcpu *vcpu)
{
	if (vcpu->guard.is_lost) {
		vcpu->lost_address = vcpu->guard.lost_address;
		__atomic_store_n(&vcpu->status, VCPU_LOST_PAGE, __ATOMIC_RELEASE);
		gate_park_self(&vcpu->gate);
		return false;
	}
	if (gate_is_open(&vcpu->gate))
		return true;
	if (kvm_vcpu_state(vcpu)->phase != PHASE_MODIFY)
		return false;
	/* In the middle of a page that is present: it will see `stop` in a moment. */
	__atomic_store_n(&vcpu->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
	return true;
}

/* The guest used up its share of a limited rate. True: it has a new one. */
static bool kvm_vcpu_grant(struct kvm_vcpu *vcpu)
{
	const struct toy_workload *workload =
		(const struct toy_workload *)(uintptr_t)vcpu->host.workload;
	uint64_t rate = __atomic_load_n(&workload->rate, __ATOMIC_RELAXED);
	uint64_t stop_at = __atomic_load_n(&workload->stop_at, __ATOMIC_RELAXED);
	uint64_t ops = kvm_vcpu_state(vcpu)->ops, granted = UINT32_MAX;

	if (stop_at && ops >= stop_at) {
		gate_park_self(&vcpu->gate);
		return false;
	}
	if (rate) {
		if (!pace_next(&vcpu->pace, &vcpu->gate, rate))
			return false;
		granted = vcpu->pace.granted + 1;
		vcpu->pace.granted = 0;
	}
	if (stop_at && granted > stop_at - ops)
		granted = stop_at - ops;
	toy_store(&vcpu->shared->granted, granted);
	return true;
}

/* No room to note the next page: the guest is not entered before the ring is emptied. Natively, since a
 * thread with the GIL may be waiting for this very guest. */
static bool kvm_vcpu_ring_full(struct kvm_vcpu *vcpu)
{
	int64_t found = kvmring_full(&vcpu->vm->ring);

	if (found >= 0)
		return true;
	kvm_vcpu_fail(vcpu, (int)found);
	return false;
}

/* True: run on. */
static bool kvm_vcpu_exited(struct kvm_vcpu *vcpu)
{
	const struct kvm_run *run = vcpu->run;

	if (run->exit_reason == KVM_EXIT_INTR)
		return kvm_vcpu_interrupted(vcpu);
	if (run->exit_reason == KVM_EXIT_DIRTY_RING_FULL)
		return kvm_vcpu_ring_full(vcpu);
	if (run->exit_reason == KVM_EXIT_MMIO && run->mmio.phys_addr == GUEST_DOORBELL + BELL_STOP)
		return gate_is_open(&vcpu->gate);
	if (run->exit_reason == KVM_EXIT_MMIO && run->mmio.phys_addr == GUEST_DOORBELL + BELL_GRANT)
		return kvm_vcpu_grant(vcpu);
	kvm_vcpu_fail(vcpu, -EIO);
	return false;
}

/* One KVM_RUN. True: run on. */
static bool kvm_vcpu_enter(struct kvm_vcpu *vcpu)
{
	if (ioctl(vcpu->fd, KVM_RUN, 0) == 0)
		return kvm_vcpu_exited(vcpu);
	if (errno == EINTR)
		return kvm_vcpu_interrupted(vcpu);
	kvm_vcpu_fail(vcpu, -errno);
	return false;
}

static void kvm_vcpu_run(struct kvm_vcpu *vcpu)
{
	struct toy_state *state = kvm_vcpu_state(vcpu);
	struct timespec real;
	uint64_t now;

	__atomic_store_n(&vcpu->status, VCPU_READY, __ATOMIC_RELAXED);
	guard_enter(&vcpu->guard);
	vcpu->guard.is_noting = 1;
	guard_open(&vcpu->guard);
	while (kvm_vcpu_enter(vcpu))
		;
	guard_close(&vcpu->guard);
	guard_leave(&vcpu->guard);
	now = gate_now_ns();
	clock_gettime(CLOCK_REALTIME, &real);
	vcpu->last_op_ns = state->probe_clock ? kvm_vcpu_tick_ns(vcpu, state->probe_clock) : now;
	vcpu->last_op_realtime_ns = (uint64_t)real.tv_sec * 1000000000u + (uint64_t)real.tv_nsec -
				    (now - vcpu->last_op_ns);
	kvm_state_commit(vcpu);
}

int kvm_vcpu_serve(struct kvm_vcpu *vcpu)
{
	gate_enter(&vcpu->gate);
	while (gate_wait(&vcpu->gate) == GATE_RUN)
		kvm_vcpu_run(vcpu);
	return 0;
}
