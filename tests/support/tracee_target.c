/*
 * A program to be changed from outside. Its threads never stop checking: each owns every fourth cache line
 * of the memory, expects there what it wrote in the round before, and writes the next. One lost write, one
 * zero, one register put back wrongly, and it ends with a message. The main thread sleeps in nanosleep(2)
 * as most of the world does, which must never fail for us, and counts in floating point meanwhile. At SIGUSR1 it forks; the child looks at all of the memory once.
 *
 * usage: tracee_target BYTES      prints the address of its memory once all of it was touched, then "." now and then,
 *                                "c" when a child has found no zero in it, "b" when SIGBUS ended one
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { THREADS = 4, WORDS_PER_LINE = 8 };

static uint64_t *memory;
static size_t words;
static pthread_barrier_t touched;

static void fail(const char *what, size_t where, uint64_t found, uint64_t wanted)
{
	printf("FAIL %s at %#zx: %#lx, not %#lx\n", what, where * sizeof(*memory), found, wanted);
	fflush(stdout);
	_exit(3);
}

static void *check(void *argument)
{
	size_t first = (size_t)argument * WORDS_PER_LINE;

	for (uint64_t round = 0;; round++) {
		for (size_t i = first; i < words; i += THREADS * WORDS_PER_LINE) {
			volatile uint64_t *word = memory + i;

			if (*word != round)
				fail("memory", i, *word, round);
			*word = round + 1;
		}
		if (round == 0)
			pthread_barrier_wait(&touched);
	}
	return NULL;
}

static void fork_when_told(const sigset_t *told)
{
	static const struct timespec now;
	int status;

	while (waitpid(-1, &status, WNOHANG) > 0)
		if (WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS && write(1, "b", 1) != 1)
			_exit(3);
	if (sigtimedwait(told, NULL, &now) != SIGUSR1 || fork())
		return;
	for (size_t i = 0; i < words; i++)
		if (i % WORDS_PER_LINE == 0 && !((volatile uint64_t *)memory)[i])
			fail("a child's memory", i, 0, 1);
	_exit(write(1, "c", 1) != 1);
}

int main(int argc, char **argv)
{
	pthread_t thread;
	sigset_t told;
	double sum = 0;

	sigemptyset(&told);
	sigaddset(&told, SIGUSR1);
	sigprocmask(SIG_BLOCK, &told, NULL);

	words = strtoull(argc > 1 ? argv[1] : "8388608", NULL, 0) / sizeof(*memory);
	memory = mmap(NULL, words * sizeof(*memory), PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return 2;
	pthread_barrier_init(&touched, NULL, THREADS + 1);
	for (size_t i = 0; i < THREADS; i++)
		if (pthread_create(&thread, NULL, check, (void *)i))
			return 2;
	pthread_barrier_wait(&touched);
	printf("%p\n", (void *)memory);
	fflush(stdout);
	for (uint64_t n = 1;; n++) {
		struct timespec moment = { .tv_nsec = 2000000 };

		if (nanosleep(&moment, NULL))
			fail("nanosleep", n, 1, 0);
		sum += 0.5;
		if (sum != 0.5 * (double)n)
			fail("floating point", n, 0, 0);
		fork_when_told(&told);
		if (n % 50 == 0) {
			putchar('.');
			fflush(stdout);
		}
	}
}
