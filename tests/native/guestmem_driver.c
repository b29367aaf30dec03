// SPDX-License-Identifier: MIT
/* sources: guestmem/csrc/bitmap.c guestmem/csrc/zero.c guestmem/csrc/pagescan.c uffd/csrc/uffd.c
	uffd/csrc/pagemap.c */
/*
 * The C core of guest memory on its own, for sanitizers: bitmaps against an array of bools,
 * bitmap races between threads, the zero test, and the dirty scan against a racing writer.
 *
 * Arguments: sections to run (bitmap, threads, zero, race-anon, race-memfd, race-hugetlb); all
 * without. Exit 0: passed, 1: failed, 77: every section asked for is impossible on this host.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bitmap.h"
#include "pagescan.h"
#include "uffd.h"
#include "zero.h"

enum { PASS = 0, FAIL = 1, SKIP = 77 };

#define CHECK(condition)                                                               \
	do {                                                                           \
		if (!(condition)) {                                                    \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
			exit(FAIL);                                                    \
		}                                                                      \
	} while (0)

static uint64_t random_state = 88172645463325252u;

static uint64_t random_below(uint64_t bound)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return random_state % bound;
}

/* ---- bitmap against a model ---- */

#define MODEL_BITS 517

struct model {
	uint64_t map[BITMAP_WORDS(MODEL_BITS)];
	bool bits[MODEL_BITS];
};

static void model_range(uint64_t *start, uint64_t *count)
{
	*start = random_below(MODEL_BITS + 1);
	*count = random_below(MODEL_BITS - *start + 1);
}

static uint64_t model_fill(struct model *m, uint64_t start, uint64_t count, bool value)
{
	uint64_t changed = 0;

	for (uint64_t i = start; i < start + count; i++) {
		changed += m->bits[i] != value;
		m->bits[i] = value;
	}
	return changed;
}

static void model_widen(struct model *m, uint64_t unit)
{
	for (uint64_t first = 0; first < MODEL_BITS; first += unit) {
		uint64_t end = first + unit < MODEL_BITS ? first + unit : MODEL_BITS;
		bool any = false;

		for (uint64_t i = first; i < end; i++)
			any |= m->bits[i];
		model_fill(m, first, end - first, any);
	}
}

static void model_compare(const struct model *m)
{
	uint64_t total = 0, next = bitmap_next_set(m->map, MODEL_BITS, 0);

	for (uint64_t i = 0; i < MODEL_BITS; i++) {
		CHECK(bitmap_test(m->map, i) == m->bits[i]);
		if (m->bits[i]) {
			CHECK(next == i);
			next = bitmap_next_set(m->map, MODEL_BITS, i + 1);
			total++;
		}
	}
	CHECK(next == MODEL_BITS);
	CHECK(bitmap_count(m->map, 0, MODEL_BITS) == total);
	/* Nothing beyond the end of the last word's part in use. */
	CHECK(m->map[BITMAP_WORDS(MODEL_BITS) - 1] >> (MODEL_BITS % 64) == 0);
}

static void model_step(struct model *m)
{
	uint64_t start, count, bit = random_below(MODEL_BITS);

	model_range(&start, &count);
	switch (random_below(8)) {
	case 0:
		bitmap_set(m->map, start, count);
		model_fill(m, start, count, true);
		break;
	case 1:
		bitmap_clear(m->map, start, count);
		model_fill(m, start, count, false);
		break;
	case 2:
		CHECK(bitmap_set_count(m->map, start, count) ==
		      model_fill(m, start, count, true));
		break;
	case 3:
		bitmap_clear_atomic(m->map, start, count);
		model_fill(m, start, count, false);
		break;
	case 4:
		CHECK(bitmap_test_and_set(m->map, bit) == m->bits[bit]);
		m->bits[bit] = true;
		break;
	case 5:
		CHECK(bitmap_test_and_clear(m->map, bit) == m->bits[bit]);
		m->bits[bit] = false;
		break;
	case 6:
		bitmap_complement(m->map, m->map, MODEL_BITS);
		for (uint64_t i = 0; i < MODEL_BITS; i++)
			m->bits[i] = !m->bits[i];
		break;
	default:
		count = UINT64_C(1) << random_below(8);
		bitmap_widen(m->map, MODEL_BITS, count);
		model_widen(m, count);
		break;
	}
}

static int section_bitmap(void)
{
	static struct model m;

	for (int i = 0; i < 20000; i++) {
		model_step(&m);
		model_compare(&m);
	}
	return PASS;
}

/* ---- bitmap between threads ---- */

#define SHARED_BITS 65536
#define ROUNDS 20

struct shared {
	uint64_t marks[BITMAP_WORDS(SHARED_BITS)];
	uint64_t taken[BITMAP_WORDS(SHARED_BITS)];
	uint64_t payload[SHARED_BITS];
	uint64_t claims;
	uint32_t marker_done;
};

/* Sets a payload, then its bit: whoever sees the bit must see the payload. */
static void *marker(void *argument)
{
	struct shared *s = argument;

	for (uint64_t bit = 0; bit < SHARED_BITS; bit++) {
		s->payload[bit] = bit + 1;
		bitmap_set_atomic(s->marks, bit, 1);
	}
	__atomic_store_n(&s->marker_done, 1, __ATOMIC_RELEASE);
	return NULL;
}

static void *claimer(void *argument)
{
	struct shared *s = argument;
	uint64_t claims = 0;

	for (uint64_t bit = 0; bit < SHARED_BITS; bit++) {
		while (!bitmap_test_acquire(s->marks, bit))
			sched_yield();
		CHECK(s->payload[bit] == bit + 1);
		claims += !bitmap_test_and_set(s->taken, bit);
	}
	__atomic_fetch_add(&s->claims, claims, __ATOMIC_RELAXED);
	return NULL;
}

static void *mover(void *argument)
{
	struct shared *s = argument;
	uint64_t moved = 0;
	bool done;

	do {
		done = __atomic_load_n(&s->marker_done, __ATOMIC_ACQUIRE);
		moved += bitmap_take(s->taken, s->marks, SHARED_BITS);
	} while (!done);
	CHECK(moved == SHARED_BITS);
	return NULL;
}

static void run_threads(void *(*first)(void *), void *(*second)(void *), void *(*third)(void *),
			struct shared *s)
{
	void *(*const bodies[3])(void *) = { first, second, third };
	pthread_t threads[3];

	for (int i = 0; i < 3; i++)
		if (bodies[i])
			CHECK(pthread_create(&threads[i], NULL, bodies[i], s) == 0);
	for (int i = 0; i < 3; i++)
		if (bodies[i])
			CHECK(pthread_join(threads[i], NULL) == 0);
}

static int section_threads(void)
{
	struct shared *s = malloc(sizeof(*s));

	CHECK(s);
	for (int round = 0; round < ROUNDS; round++) {
		memset(s, 0, sizeof(*s));
		run_threads(marker, claimer, claimer, s);
		CHECK(s->claims == SHARED_BITS);	/* each bit was claimed once */
		memset(s, 0, sizeof(*s));
		run_threads(marker, mover, NULL, s);
		CHECK(bitmap_count(s->taken, 0, SHARED_BITS) == SHARED_BITS);
		CHECK(bitmap_count(s->marks, 0, SHARED_BITS) == 0);
	}
	free(s);
	return PASS;
}

/* ---- zero test ---- */

static int section_zero(void)
{
	long page = sysconf(_SC_PAGESIZE);
	/* Data ends where an unreadable page begins: reading too far is a crash. */
	unsigned char *p = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(p != MAP_FAILED);
	CHECK(mprotect(p + page, page, PROT_NONE) == 0);
	for (size_t length = 0; length <= 400; length++) {
		unsigned char *start = p + page - length;

		memset(p, 0xff, page - length);
		memset(start, 0, length);
		CHECK(buffer_is_zero(start, length));
		for (size_t i = 0; i < length; i++) {
			start[i] = 1u << (i % 8);
			CHECK(!buffer_is_zero(start, length));
			start[i] = 0;
		}
	}
	munmap(p, 2 * page);
	return PASS;
}

/* ---- the dirty scan against a racing writer ---- */

#define RACE_PAGES 8
#define RACE_ROUNDS 300
#define FEATURE_WP_UNPOPULATED (1u << 13)
#define FEATURE_WP_ASYNC (1u << 15)
#define USER_MODE_ONLY 1

struct race {
	uint64_t host, page, length;
	uint32_t page_bits;
	uint32_t stop;
	int uffd, pagemap;
	uint64_t copies[RACE_PAGES];
	uint64_t dirty[64];
};

static uint64_t *counter_of(const struct race *r, uint64_t index)
{
	return (uint64_t *)(uintptr_t)(r->host + index * r->page);
}

static void *race_writer(void *argument)
{
	struct race *r = argument;
	uint64_t state = 1, writes = 0;

	while (!__atomic_load_n(&r->stop, __ATOMIC_ACQUIRE)) {
		state = state * UINT64_C(6364136223846793005) + 1;
		__atomic_store_n(counter_of(r, (state >> 33) % RACE_PAGES), ++writes,
				 __ATOMIC_RELEASE);
	}
	return NULL;
}

/* Maps host pages of the kind; 0, or SKIP when the host has none. */
static int race_map(struct race *r, const char *kind)
{
	bool huge = !strcmp(kind, "hugetlb");
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | (huge ? MAP_HUGETLB | 21 << 26 : 0), fd = -1;
	void *p;

	r->page = huge ? UINT64_C(2) << 20 : (uint64_t)sysconf(_SC_PAGESIZE);
	r->page_bits = (uint32_t)__builtin_ctzll((uint64_t)sysconf(_SC_PAGESIZE));
	r->length = RACE_PAGES * r->page;
	if (!strcmp(kind, "memfd")) {
		fd = memfd_create("driver", MFD_CLOEXEC);
		CHECK(fd >= 0 && ftruncate(fd, (off_t)r->length) == 0);
		flags = MAP_SHARED;
	}
	p = mmap(NULL, r->length, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (fd >= 0)
		close(fd);
	if (p == MAP_FAILED && huge)
		return SKIP;
	CHECK(p != MAP_FAILED);
	r->host = (uintptr_t)p;
	return 0;
}

static int race_open(struct race *r)
{
	uint64_t out;

	r->uffd = uffd_open_syscall(O_CLOEXEC | O_NONBLOCK | USER_MODE_ONLY);
	if (r->uffd < 0)
		return SKIP;
	if (uffd_api(r->uffd, FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED, &out, &out) < 0) {
		close(r->uffd);
		return SKIP;
	}
	CHECK(uffd_register(r->uffd, r->host, r->length, 2, &out) == 0);
	CHECK(uffd_writeprotect(r->uffd, r->host, r->length, 1) == 0);
	r->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	CHECK(r->pagemap >= 0);
	return 0;
}

/* One round of precopy: find and protect, then copy what was found. */
static int64_t race_round(struct race *r)
{
	uint64_t nbits = r->length >> r->page_bits, per_page = r->page >> r->page_bits, bit = 0;
	int64_t fresh = pagescan_collect(r->pagemap, r->host, r->host, r->length, r->dirty, nbits,
					 r->page_bits, false);

	CHECK(fresh >= 0);
	CHECK((uint64_t)fresh == bitmap_count(r->dirty, 0, nbits));
	while ((bit = bitmap_next_set(r->dirty, nbits, bit)) < nbits) {
		CHECK(bitmap_count(r->dirty, bit, per_page) == per_page);
		r->copies[bit / per_page] =
			__atomic_load_n(counter_of(r, bit / per_page), __ATOMIC_ACQUIRE);
		bit += per_page;
	}
	bitmap_clear(r->dirty, 0, nbits);
	return fresh;
}

static int section_race(const char *kind)
{
	struct race *r = calloc(1, sizeof(*r));
	pthread_t writer;
	int rc;

	CHECK(r);
	rc = race_map(r, kind);
	if (rc == 0)
		rc = race_open(r);
	if (rc != 0) {
		if (r->host)
			munmap((void *)(uintptr_t)r->host, r->length);
		free(r);
		return rc;
	}
	r->dirty[0] = 0;
	CHECK(r->length >> r->page_bits <= 64 * 64);
	CHECK(race_round(r) == 0);
	CHECK(pthread_create(&writer, NULL, race_writer, r) == 0);
	for (int busy = 0; busy < RACE_ROUNDS;)
		busy += race_round(r) > 0;
	__atomic_store_n(&r->stop, 1, __ATOMIC_RELEASE);
	CHECK(pthread_join(writer, NULL) == 0);
	race_round(r);
	CHECK(race_round(r) == 0);
	for (uint64_t i = 0; i < RACE_PAGES; i++)
		CHECK(r->copies[i] == *counter_of(r, i));
	close(r->uffd);
	close(r->pagemap);
	munmap((void *)(uintptr_t)r->host, r->length);
	free(r);
	return PASS;
}

static int section_race_anon(void)
{
	return section_race("anon");
}

static int section_race_memfd(void)
{
	return section_race("memfd");
}

static int section_race_hugetlb(void)
{
	return section_race("hugetlb");
}

static const struct {
	const char *name;
	int (*run)(void);
} sections[] = {
	{ "bitmap", section_bitmap },
	{ "threads", section_threads },
	{ "zero", section_zero },
	{ "race-anon", section_race_anon },
	{ "race-memfd", section_race_memfd },
	{ "race-hugetlb", section_race_hugetlb },
};

static bool wanted(const char *name, int argc, char **argv)
{
	for (int i = 1; i < argc; i++)
		if (!strcmp(argv[i], name))
			return true;
	return argc < 2;
}

int main(int argc, char **argv)
{
	int passed = 0, skipped = 0;

	for (size_t i = 0; i < sizeof(sections) / sizeof(sections[0]); i++) {
		if (!wanted(sections[i].name, argc, argv))
			continue;
		if (sections[i].run() == SKIP) {
			printf("skip %s: no WP_ASYNC (Linux 6.7), or no 8 free huge pages; remedy: "
			       "python -m guestmem.hugepages reserve 8\n", sections[i].name);
			skipped++;
		} else {
			printf("pass %s\n", sections[i].name);
			passed++;
		}
	}
	if (!passed && !skipped) {
		fprintf(stderr, "no such section\n");
		return FAIL;
	}
	return passed ? PASS : SKIP;
}
