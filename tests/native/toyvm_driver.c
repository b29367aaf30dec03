// SPDX-License-Identifier: MIT
/* sources: migration/toyvm/csrc/guard.c migration/toyvm/csrc/gate.c migration/toyvm/csrc/auxmem.c
	migration/toyvm/csrc/oracle.c migration/toyvm/csrc/vcpu.c migration/toyvm/csrc/ring.c
	migration/toyvm/csrc/kvm.c migration/toyvm/csrc/kvm_vcpu.c migration/toyvm/csrc/kvm_state.c
	migration/toyvm/csrc/kvm_guest.c guestmem/csrc/kvmring.c guestmem/csrc/bitmap.c */
/*
 * The toy guest's C core without an interpreter, for the sanitizers: exit 0 pass, 1 fail, 77 skip.
 *
 * Under the thread sanitizer signals are held back until a library call, so a thread asleep in a page fault
 * cannot be kicked there; that part is left out then.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "auxmem.h"
#include "kvm.h"
#include "kvm_state.h"
#include "oracle.h"
#include "ring.h"
#include "vcpu.h"

#define PAGES 256u
#define RING_PAGES 64u
#define SMP 2u
#define FILLED (PAGES - RING_PAGES)
#define AUX_BYTES (1u << 20)

#define CHECK(condition) \
	do { \
		if (!(condition)) { \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
			exit(1); \
		} \
	} while (0)

struct guest {
	uint64_t ram[1];
	uint64_t aux;
	struct toy_layout *layout;
	struct toy_workload *workload;
	uint64_t logs[SMP];
	struct toy_view views[SMP];
};

static void guest_init(struct guest *g, void *ram, enum toy_kind kind)
{
	int64_t aux = aux_map(AUX_BYTES);
	uint32_t i;

	CHECK(aux > 0);
	memset(g, 0, sizeof(*g));
	g->aux = (uint64_t)aux;
	g->ram[0] = (uint64_t)(uintptr_t)ram;
	g->layout = (struct toy_layout *)(uintptr_t)g->aux;
	*g->layout = (struct toy_layout){
		.seed = 7, .working_set = FILLED, .smp = SMP, .block_count = 1,
		.page_count = { PAGES }, .filled = { FILLED }, .first = { 0, FILLED },
	};
	g->workload = (struct toy_workload *)(uintptr_t)(g->aux + 2048);
	g->workload->kind = kind;
	g->workload->write_share = 40000;
	for (i = 0; i < SMP; i++) {
		g->views[i] = (struct toy_view){
			.base = { g->ram[0] }, .layout = g->aux, .workload = g->aux + 2048,
			.state = g->aux + 4096 + i * 32768, .log = g->aux + 4096 + i * 32768 + 16384,
		};
		g->logs[i] = g->views[i].log;
		((struct toy_state *)(uintptr_t)g->views[i].state)->rng = i + 1;
	}
}

static struct toy_state *guest_state(const struct guest *g, uint32_t i)
{
	return (struct toy_state *)(uintptr_t)g->views[i].state;
}

static uint64_t guest_ops(const struct guest *g, uint32_t i)
{
	return __atomic_load_n(&guest_state(g, i)->ops, __ATOMIC_RELAXED);
}

static int64_t guest_sweep(const struct guest *g, struct toy_bad *bad)
{
	struct oracle_range ring = { .block = 0, .first = FILLED, .count = RING_PAGES };
	struct oracle_sweep *sweep = calloc(1, sizeof(*sweep));
	int64_t errors;

	CHECK(sweep);
	sweep->layout = g->layout;
	sweep->base = g->ram;
	sweep->logs = g->logs;
	sweep->skip = &ring;
	sweep->skip_count = 1;
	sweep->bad = bad;
	sweep->bad_room = bad ? 1 : 0;
	errors = oracle_sweep(sweep);
	CHECK(sweep->pages_checked == FILLED);
	free(sweep);
	return errors;
}

static void guest_deinit(struct guest *g)
{
	CHECK(aux_unmap(g->aux, AUX_BYTES) == 0);
}

static void *ram_map(int flags, int fd)
{
	void *ram = mmap(NULL, PAGES * TOY_PAGE_BYTES, PROT_READ | PROT_WRITE, flags, fd, 0);

	CHECK(ram != MAP_FAILED);
	return ram;
}

static void *serve_vcpu(void *vcpu)
{
	CHECK(vcpu_serve(vcpu) == 0);
	return NULL;
}

static void *serve_ring(void *ring)
{
	CHECK(ring_serve(ring) == 0);
	return NULL;
}

static void *serve_kvm(void *vcpu)
{
	CHECK(kvm_vcpu_serve(vcpu) == 0);
	return NULL;
}

/* No event marks "it did something": the counter is looked at. */
static void wait_ops(const struct guest *g, uint32_t i, uint64_t ops)
{
	while (guest_ops(g, i) < ops)
		sched_yield();
}

static void test_damage(void)
{
	void *ram = ram_map(MAP_PRIVATE | MAP_ANONYMOUS, -1);
	struct toy_bad bad;
	struct guest g;
	unsigned int at;

	guest_init(&g, ram, TOY_RANDOM);
	oracle_fill(g.layout, g.ram);
	CHECK(guest_sweep(&g, NULL) == 0);
	for (at = 0; at < TOY_PAGE_BYTES; at += 13) {
		((char *)ram)[5 * TOY_PAGE_BYTES + at] ^= 1;
		CHECK(guest_sweep(&g, &bad) == 1 && bad.page == 5);
		((char *)ram)[5 * TOY_PAGE_BYTES + at] ^= 1;
	}
	guest_deinit(&g);
	munmap(ram, PAGES * TOY_PAGE_BYTES);
}

static void test_workload(enum toy_kind kind)
{
	void *ram = ram_map(MAP_PRIVATE | MAP_ANONYMOUS, -1);
	uint64_t dirty[PAGES / 64] = { 0 };
	pthread_t threads[SMP], ring_thread;
	struct vcpu vcpus[SMP];
	struct ring ring;
	struct guest g;
	unsigned int i, round;

	guest_init(&g, ram, kind);
	oracle_fill(g.layout, g.ram);
	ring_init(&ring, g.ram[0] + FILLED * TOY_PAGE_BYTES, RING_PAGES, 7, 0,
		  (uint64_t)(uintptr_t)dirty, FILLED);
	ring_fill(&ring);
	CHECK(!pthread_create(&ring_thread, NULL, serve_ring, &ring));
	for (i = 0; i < SMP; i++) {
		CHECK(vcpu_init(&vcpus[i], i, &g.views[i]) == 0);
		CHECK(!pthread_create(&threads[i], NULL, serve_vcpu, &vcpus[i]));
	}
	for (round = 1; round <= 3; round++) {
		ring_go(&ring);
		for (i = 0; i < SMP; i++)
			vcpu_go(&vcpus[i]);
		for (i = 0; i < SMP; i++)
			wait_ops(&g, i, 2000 * round);
		for (i = 0; i < SMP; i++)
			vcpu_ask_halt(&vcpus[i]);
		for (i = 0; i < SMP; i++)
			vcpu_halt(&vcpus[i]);
		ring_halt(&ring);
		CHECK(guest_sweep(&g, NULL) == 0);
		CHECK(ring_sweep(&ring, 0, NULL, 0) == 0);
	}
	for (i = 0; i < SMP; i++) {
		CHECK(guest_state(&g, i)->errors == 0);
		vcpu_quit(&vcpus[i]);
		pthread_join(threads[i], NULL);
	}
	ring_quit(&ring);
	pthread_join(ring_thread, NULL);
	CHECK(!ring.head || dirty[FILLED / 64]);
	guest_deinit(&g);
	munmap(ram, PAGES * TOY_PAGE_BYTES);
}

/* A file cut short under its mapping: the vCPU parks, the sweep counts. */
static void test_lost_page(void)
{
	int fd = memfd_create("toyvm-driver", MFD_CLOEXEC);
	pthread_t thread;
	struct vcpu vcpu;
	struct guest g;
	void *ram;

	CHECK(fd >= 0 && ftruncate(fd, PAGES * TOY_PAGE_BYTES) == 0);
	ram = ram_map(MAP_SHARED, fd);
	guest_init(&g, ram, TOY_SEQUENTIAL);
	oracle_fill(g.layout, g.ram);
	CHECK(ftruncate(fd, 10 * TOY_PAGE_BYTES) == 0);
	CHECK(vcpu_init(&vcpu, 1, &g.views[1]) == 0);
	CHECK(!pthread_create(&thread, NULL, serve_vcpu, &vcpu));
	vcpu_go(&vcpu);
	while (__atomic_load_n(&vcpu.status, __ATOMIC_ACQUIRE) != VCPU_LOST_PAGE)
		sched_yield();
	vcpu_halt(&vcpu);
	CHECK(guest_ops(&g, 1) == 5);
	CHECK(vcpu.lost_address / TOY_PAGE_BYTES == g.ram[0] / TOY_PAGE_BYTES + 11);
	vcpu_quit(&vcpu);
	pthread_join(thread, NULL);
	CHECK(guest_sweep(&g, NULL) == FILLED - 10);
	guest_deinit(&g);
	munmap(ram, PAGES * TOY_PAGE_BYTES);
	close(fd);
}

#ifndef __SANITIZE_THREAD__
static int uffd_over(void *ram)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register reg = {
		.range = { (uint64_t)(uintptr_t)ram, PAGES * TOY_PAGE_BYTES },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1 /* user mode only */);

	if (fd < 0)
		return fd;
	CHECK(ioctl(fd, UFFDIO_API, &api) == 0 && ioctl(fd, UFFDIO_REGISTER, &reg) == 0);
	return fd;
}

static uint64_t uffd_fault(int fd)
{
	struct pollfd ready = { .fd = fd, .events = POLLIN };
	struct uffd_msg msg;

	while (read(fd, &msg, sizeof(msg)) != sizeof(msg))
		CHECK(errno == EAGAIN && poll(&ready, 1, 20000) == 1);
	return msg.arg.pagefault.address;
}

/* Stopped in a fault, over and over; in the end the operation was done once. */
static void test_kick(void)
{
	void *ram = ram_map(MAP_PRIVATE | MAP_ANONYMOUS, -1), *good;
	struct uffdio_copy copy = { .len = TOY_PAGE_BYTES };
	unsigned int round;
	pthread_t thread;
	struct vcpu vcpu;
	struct guest g;
	int fd;

	guest_init(&g, ram, TOY_SEQUENTIAL);
	oracle_fill(g.layout, g.ram);
	good = ram_map(MAP_PRIVATE | MAP_ANONYMOUS, -1);
	memcpy(good, ram, PAGES * TOY_PAGE_BYTES);
	CHECK(madvise(ram, PAGES * TOY_PAGE_BYTES, MADV_DONTNEED) == 0);
	fd = uffd_over(ram);
	CHECK(fd >= 0);
	CHECK(vcpu_init(&vcpu, 0, &g.views[0]) == 0);
	CHECK(!pthread_create(&thread, NULL, serve_vcpu, &vcpu));
	for (round = 0; round < 50; round++) {
		vcpu_go(&vcpu);
		CHECK(uffd_fault(fd) == g.ram[0]);
		vcpu_halt(&vcpu);
		CHECK(guest_ops(&g, 0) == 0);
	}
	copy.dst = g.ram[0];
	copy.src = (uint64_t)(uintptr_t)good;
	CHECK(ioctl(fd, UFFDIO_COPY, &copy) == 0);
	g.workload->stop_at = 1;
	vcpu_go(&vcpu);
	wait_ops(&g, 0, 1);
	vcpu_halt(&vcpu);
	CHECK(guest_ops(&g, 0) == 1 && guest_state(&g, 0)->errors == 0);
	vcpu_quit(&vcpu);
	pthread_join(thread, NULL);
	close(fd);
	guest_deinit(&g);
	munmap(ram, PAGES * TOY_PAGE_BYTES);
	munmap(good, PAGES * TOY_PAGE_BYTES);
}
#endif

static void test_kvm(void)
{
	void *ram = ram_map(MAP_PRIVATE | MAP_ANONYMOUS, -1);
	uint64_t pages[1] = { PAGES };
	struct kvm_state *state = malloc(sizeof(*state));
	struct kvm_vcpu vcpus[SMP];
	pthread_t threads[SMP];
	struct kvm_vm vm;
	struct guest g;
	unsigned int i, round;

	guest_init(&g, ram, TOY_RANDOM);
	oracle_fill(g.layout, g.ram);
	CHECK(state && kvm_vm_init(&vm, SMP, 1, g.ram, pages, g.aux, AUX_BYTES, 0) == 0);
	for (i = 0; i < SMP; i++) {
		CHECK(kvm_vcpu_init(&vcpus[i], &vm, i, &g.views[i], g.aux) == 0);
		CHECK(!pthread_create(&threads[i], NULL, serve_kvm, &vcpus[i]));
	}
	for (round = 1; round <= 5; round++) {
		for (i = 0; i < SMP; i++)
			kvm_vcpu_go(&vcpus[i]);
		for (i = 0; i < SMP; i++)
			wait_ops(&g, i, 2000 * round);
		for (i = 0; i < SMP; i++)
			kvm_vcpu_ask_halt(&vcpus[i]);
		for (i = 0; i < SMP; i++)
			kvm_vcpu_halt(&vcpus[i]);
		CHECK(guest_sweep(&g, NULL) == 0);
		for (i = 0; i < SMP; i++) {
			CHECK(vcpus[i].status == VCPU_READY && guest_state(&g, i)->errors == 0);
			CHECK(kvm_state_save(&vcpus[i], state) == 0);
			CHECK(kvm_state_restore(&vcpus[i], state) == 0);
		}
	}
	state->sregs.cs.dpl = 0;
	CHECK(kvm_state_restore(&vcpus[0], state) == -EINVAL);
	for (i = 0; i < SMP; i++) {
		kvm_vcpu_quit(&vcpus[i]);
		pthread_join(threads[i], NULL);
		kvm_vcpu_deinit(&vcpus[i]);
	}
	kvm_vm_deinit(&vm);
	free(state);
	guest_deinit(&g);
	munmap(ram, PAGES * TOY_PAGE_BYTES);
}

int main(void)
{
	int kind;

	CHECK(guard_install() == 0);
	test_damage();
	for (kind = 0; kind < TOY_KINDS; kind++)
		test_workload((enum toy_kind)kind);
	test_lost_page();
#ifndef __SANITIZE_THREAD__
	test_kick();
#endif
	if (access("/dev/kvm", R_OK | W_OK) == 0)
		test_kvm();
	else
		fprintf(stderr, "no /dev/kvm: its part was left out\n");
	guard_uninstall();
	return 0;
}
