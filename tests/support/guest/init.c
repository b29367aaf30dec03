/*
 * The first and only process of a Linux guest: fills memory, checks and renews it for ever, and says how
 * it goes. Static, so that an initramfs of this one file is enough.
 *
 * On the console, after each round: "R round monotonic-ms bad-words". Each word is made of round, page
 * and place, as in checker.S; here it is Linux that moves pages, schedules and keeps time meanwhile.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define WORDS_PER_PAGE 512u

static uint64_t word_of(uint64_t round, uint64_t page, uint64_t i)
{
	return (round * 0x9e3779b97f4a7c15u) ^ (page * 0xbf58476d1ce4e5b9u) ^ (i * 0x94d049bb133111ebu);
}

static uint64_t check_and_renew(uint64_t *memory, uint64_t pages, uint64_t round)
{
	uint64_t bad = 0;

	for (uint64_t page = 0; page < pages; page++) {
		uint64_t *words = memory + page * WORDS_PER_PAGE;

		for (uint64_t i = 0; i < WORDS_PER_PAGE; i++) {
			bad += round > 1 && words[i] != word_of(round - 1, page, i);
			words[i] = word_of(round, page, i);
		}
	}
	return bad;
}

/* The clock must go on, never back; and the file system must still be there. */
static uint64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

int main(void)
{
	uint64_t pages = 24u << 8, round = 0, before = 0, *memory;
	int console;

	mkdir("/dev", 0755);
	mkdir("/proc", 0755);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	mount("proc", "/proc", "proc", 0, NULL);
	console = open("/dev/console", O_RDWR);
	dup2(console, 0);
	dup2(console, 1);
	dup2(console, 2);
	memory = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (;;) {
		uint64_t bad = check_and_renew(memory, pages, ++round), now = now_ms();
		int meminfo = open("/proc/meminfo", O_RDONLY);

		if (now < before || meminfo < 0)
			bad++;
		close(meminfo);
		before = now;
		printf("R %llu %llu %llu\n", (unsigned long long)round, (unsigned long long)now,
		       (unsigned long long)bad);
		fflush(stdout);
		usleep(2000);
	}
}
