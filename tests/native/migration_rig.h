// SPDX-License-Identifier: MIT
/*
 * Both ends of a migration in one process, over a socket pair, with a real userfaultfd and threads that
 * touch the destination's memory as vCPUs do. What Python does in between (headers, commands, devices)
 * is reduced to its bytes: sections before the package, a package that carries the discards, SHUT.
 */
#ifndef MIGRATION_RIG_H
#define MIGRATION_RIG_H

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "dst.h"
#include "pending.h"
#include "src.h"

#define CHECK(condition) \
	do { \
		if (!(condition)) { \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
			abort(); \
		} \
	} while (0)

#define PAGE RAM_PAGE_BYTES
#define RIG_BLOCKS 2u
#define RIG_TOUCHERS 3u
#define RIG_SECTION 0x10000u
#define RIG_HUGE (2u << 20)

enum rig_memory { RIG_ANON, RIG_MEMFD, RIG_HUGETLB, RIG_MEMORIES };

struct rig_options {
	enum rig_memory memory;
	bool framed;
	bool run_alone;		/* RUN after the package was acknowledged */
	bool urgent;		/* a channel of its own for requested pages */
	bool hold;		/* background push off to begin with */
	uint64_t rate;		/* of the scan, bytes a second; 0: none */
	uint64_t precopy_bytes;	/* sent before the package */
	uint32_t touches;	/* by each toucher */
	bool touch_in_device_load;
	bool no_package;	/* postcopy from the first byte on (the source's side alone) */
	bool release;		/* the source drops what is sent, once the guest cannot come back */
	bool keep_clean;	/* the guest writes nothing between precopy and package */
	const struct rig_tamper *tamper;
};

/* What happens to the bytes from source to destination, by a thread in between. */
struct rig_tamper {
	uint64_t at;		/* stream offset of the byte that is flipped */
	uint8_t mask;
	bool cut;		/* end the connection there instead */
};

struct rig_block {
	const char *id;
	uint64_t bytes, pages, page_size;
	int fd;				/* of dst, -1 for anonymous */
	uint8_t *src, *dst;
	uint64_t *dirty, *received, *requested;
	uint32_t *version;		/* what the destination must read; 0: zeros */
};

struct rig;

struct rig_toucher {
	struct rig *rig;
	uint32_t index;
	pthread_t thread;
};

struct rig {
	struct rig_options o;
	struct rig_block blocks[RIG_BLOCKS];
	int fds[4], urgent_fds[2];	/* source end, destination end; with a tamper its two ends */
	struct chan *src_ch, *dst_ch, *src_urgent, *dst_urgent;
	struct src *src;
	struct dst *dst;
	struct pending_faults pending;
	int uffd, stop_fd, run_fd;
	pthread_t migration, return_path, listen, urgent, fault, main, pump, monitor;
	struct rig_toucher touchers[RIG_TOUCHERS];
	int migration_ret, return_path_ret, listen_ret, urgent_ret, fault_ret, main_ret;
	bool listening;			/* set by main, read after its join */
	bool has_monitor, has_pump;
	atomic_bool go;			/* the guest runs */
	atomic_bool cancelled;		/* touchers: no further touch */
	_Atomic uint32_t lost;		/* touches that ended in SIGBUS */
	_Atomic uint32_t touched;
	atomic_bool monitor_stop;
};

/* NULL when this host can do it, else why not, with a remedy. */
const char *rig_missing(enum rig_memory memory);

void rig_init(struct rig *r, const struct rig_options *o);
void rig_deinit(struct rig *r);

/* All threads of both sides; or only the source's two. */
void rig_start(struct rig *r);
void rig_start_source(struct rig *r);
void rig_join_source(struct rig *r);
void rig_join_listen(struct rig *r);	/* and the urgent channel's; a clean end is answered by SHUT */
void rig_start_touchers(struct rig *r);
void rig_join_touchers(struct rig *r);
void rig_start_fault(struct rig *r);
void rig_stop_fault(struct rig *r);
/* After both sides lost the connection: a new one, and then all that has not come. */
void rig_reconnect(struct rig *r);
void rig_resume(struct rig *r);

/* Every page of every block is what the touchers left there. */
void rig_check_all(const struct rig *r);
/* Every page that is marked received is. */
void rig_check_received(const struct rig *r);

/* 1: as expected; 0: not; -1: the page is lost (SIGBUS). */
int rig_touch(const struct rig *r, uint32_t block, uint64_t page);
void rig_fill(const struct rig *r, uint8_t *to, uint32_t block, uint64_t page, uint32_t version);

int rig_uffd(void);		/* a context with what this file needs, or -errno */
void rig_register(struct rig *r);
void *rig_alloc(size_t n);	/* zeroed */
uint64_t *rig_bits(uint64_t pages);
void rig_catch_sigbus(void);

/* Internal between the rig's files. */
void rig_block_init(struct rig *r, uint32_t index);
void rig_block_deinit(struct rig_block *b);
void rig_discard(const struct rig_block *b, uint64_t first, uint64_t count);
void *rig_migration_thread(void *rig);
void *rig_resume_thread(void *rig);
void *rig_return_path_thread(void *rig);
void *rig_main_thread(void *rig);
void *rig_listen_thread(void *rig);
void *rig_monitor_thread(void *rig);
void *rig_pump_thread(void *rig);

/* The answer of a kernel before 6.6. */
static inline bool rig_has_no_poison(int64_t ret)
{
	return ret == -ENOTTY;
}

uint64_t rig_random(void);	/* the same in every run */
void rig_noise(uint8_t *to, size_t n);

/* What needs no userfaultfd: codecs, and the channel. */
void codecs_run(void);
void channel_run(void);
/* migration_streams.c: streams made by hand, and a relay. */
void streams_run(void);
/* migration_multifd.c: pages over several channels. */
void multifd_run(void);

#endif
