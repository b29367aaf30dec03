// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "access.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>

#include "zero.h"

/* One access under way; lives on the stack of the function that does it. */
struct window {
	sigjmp_buf out;
	uint64_t start, length;
};

/* Initial-exec: the handler must not be the first to touch a thread's copy, because that may allocate. */
#define HANDLER_LOCAL __thread __attribute__((tls_model("initial-exec")))

static HANDLER_LOCAL struct window *volatile current;
static HANDLER_LOCAL uint64_t last_lost;

static pthread_mutex_t install_lock = PTHREAD_MUTEX_INITIALIZER;
static uint32_t users;
static struct sigaction before;

/* Not ours: what would have happened without us. */
static void pass_on(int number, siginfo_t *info, void *context)
{
	struct sigaction standard = { .sa_handler = SIG_DFL };

	if (before.sa_flags & SA_SIGINFO) {
		before.sa_sigaction(number, info, context);
	} else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
		before.sa_handler(number);
	} else {
		/* A faulting instruction runs again and meets the default; a sent signal would be over. */
		sigaction(number, &standard, NULL);
		if (info->si_code <= 0)
			raise(number);
	}
}

static void on_bus(int number, siginfo_t *info, void *context)
{
	struct window *w = current;
	uint64_t at = (uintptr_t)info->si_addr;

	if (!w || info->si_code <= 0 || at - w->start >= w->length) {
		pass_on(number, info, context);
		return;
	}
	last_lost = at;
	siglongjmp(w->out, 1);
}

int access_install(void)
{
	/* A guard of vCPU threads may call us from its own handler: whoever is entered first owns the stack. */
	struct sigaction ours = { .sa_sigaction = on_bus, .sa_flags = SA_SIGINFO | SA_ONSTACK };
	struct sigaction now;
	int ret = 0;

	pthread_mutex_lock(&install_lock);
	if (users++ == 0) {
		if (sigaction(SIGBUS, NULL, &now) < 0)
			ret = -errno;
		else if (!(now.sa_flags & SA_SIGINFO) || now.sa_sigaction != on_bus) {
			before = now;
			if (sigaction(SIGBUS, &ours, NULL) < 0)
				ret = -errno;
		}
		if (ret < 0)
			users--;
	}
	pthread_mutex_unlock(&install_lock);
	return ret;
}

void access_uninstall(void)
{
	struct sigaction now;

	pthread_mutex_lock(&install_lock);
	/* Whoever came after us still passes on to us: then we stay. */
	if (users && --users == 0 && sigaction(SIGBUS, NULL, &now) == 0 &&
	    (now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_bus)
		sigaction(SIGBUS, &before, NULL);
	pthread_mutex_unlock(&install_lock);
}

/* The compiler must not move the access out of the window; the CPU's order means nothing to a handler on
 * the same thread. */
static inline void open_window(struct window *w, uint64_t start, uint64_t length)
{
	w->start = start;
	w->length = length;
	current = w;
	__asm__ volatile("" ::: "memory");
}

static inline void close_window(void)
{
	__asm__ volatile("" ::: "memory");
	current = NULL;
}

/* After the jump. The mask was not saved, which keeps system calls off the fast path: it is mended here. */
static int lost(void)
{
	sigset_t bus;

	current = NULL;
	sigemptyset(&bus);
	sigaddset(&bus, SIGBUS);
	pthread_sigmask(SIG_UNBLOCK, &bus, NULL);
	return -EFAULT;
}

uint64_t access_last_lost(void)
{
	return last_lost;
}

int access_read(uint64_t address, void *into, uint64_t len)
{
	struct window w;

	if (sigsetjmp(w.out, 0))
		return lost();
	open_window(&w, address, len);
	memcpy(into, (const void *)(uintptr_t)address, len);
	close_window();
	return 0;
}

int access_write(uint64_t address, const void *from, uint64_t len)
{
	struct window w;

	if (sigsetjmp(w.out, 0))
		return lost();
	open_window(&w, address, len);
	memcpy((void *)(uintptr_t)address, from, len);
	close_window();
	return 0;
}

int access_fill(uint64_t address, uint8_t value, uint64_t len)
{
	struct window w;

	if (sigsetjmp(w.out, 0))
		return lost();
	open_window(&w, address, len);
	memset((void *)(uintptr_t)address, value, len);
	close_window();
	return 0;
}

int access_move(uint64_t dst, uint64_t src, uint64_t len)
{
	uint64_t low = dst < src ? dst : src, high = dst < src ? src : dst;
	struct window w;

	if (sigsetjmp(w.out, 0))
		return lost();
	open_window(&w, low, high - low + len);
	memmove((void *)(uintptr_t)dst, (const void *)(uintptr_t)src, len);
	close_window();
	return 0;
}

int access_is_zero(uint64_t address, uint64_t len)
{
	struct window w;
	int is_zero;

	if (sigsetjmp(w.out, 0))
		return lost();
	open_window(&w, address, len);
	is_zero = buffer_is_zero((const void *)(uintptr_t)address, len);
	close_window();
	return is_zero;
}

struct access_u64 access_load_u64(uint64_t address)
{
	struct access_u64 out = { 0 };
	struct window w;

	if (sigsetjmp(w.out, 0))
		return (struct access_u64){ .result = lost() };
	open_window(&w, address, sizeof(uint64_t));
	out.value = __atomic_load_n((const uint64_t *)(uintptr_t)address, __ATOMIC_ACQUIRE);
	close_window();
	return out;
}

int access_store_u64(uint64_t address, uint64_t value)
{
	struct window w;

	if (sigsetjmp(w.out, 0))
		return lost();
	open_window(&w, address, sizeof(uint64_t));
	__atomic_store_n((uint64_t *)(uintptr_t)address, value, __ATOMIC_RELEASE);
	close_window();
	return 0;
}

struct access_u64 access_fetch_add_u64(uint64_t address, uint64_t value)
{
	struct access_u64 out = { 0 };
	struct window w;

	if (sigsetjmp(w.out, 0))
		return (struct access_u64){ .result = lost() };
	open_window(&w, address, sizeof(uint64_t));
	out.value = __atomic_fetch_add((uint64_t *)(uintptr_t)address, value, __ATOMIC_SEQ_CST);
	close_window();
	return out;
}
