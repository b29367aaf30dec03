#include "src.h"

#include "be.h"
#include "bitmap.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

struct src *src_new(struct chan *ch, uint32_t block_count, int *err)
{
	struct src *s = calloc(1, sizeof(*s));
	pthread_condattr_t attr;

	*err = -ENOMEM;
	if (!s)
		return NULL;
	s->ch = s->main.ch = ch;
	atomic_store(&s->scan_hint, SRC_NO_HINT);
	atomic_store(&s->zero, SRC_ZERO_RECORD);
	s->block_count = block_count;
	s->blocks = calloc(block_count ? block_count : 1, sizeof(*s->blocks));
	s->main.last_block = s->urgent.last_block = s->last_requested_block = SRC_NO_BLOCK;
	pthread_mutex_init(&s->pong_lock, NULL);
	pthread_mutex_init(&s->ring_lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&s->pong_cond, &attr);
	pthread_condattr_destroy(&attr);
	s->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	s->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (!s->blocks || s->kick_fd < 0 || s->stop_fd < 0) {
		if (s->blocks)
			*err = -errno;
		src_free(s);
		return NULL;
	}
	*err = 0;
	return s;
}

void src_free(struct src *s)
{
	if (!s)
		return;
	if (s->kick_fd >= 0)
		close(s->kick_fd);
	if (s->stop_fd >= 0)
		close(s->stop_fd);
	pthread_cond_destroy(&s->pong_cond);
	pthread_mutex_destroy(&s->pong_lock);
	pthread_mutex_destroy(&s->ring_lock);
	src_multifd_free(s);
	src_xbzrle_free(s);
	free(s->blocks);
	free(s);
}

int src_set_block(struct src *s, uint32_t index, const char *idstr, uint64_t host, uint64_t used_length,
		  uint64_t page_size, uint64_t dirty)
{
	size_t id_len = strlen(idstr);
	struct src_block *b;

	if (index >= s->block_count || !id_len || id_len > 255)
		return -EINVAL;
	if (page_size < RAM_PAGE_BYTES || page_size & (page_size - 1) || used_length % page_size)
		return -EINVAL;
	b = &s->blocks[index];
	memcpy(b->idstr, idstr, id_len + 1);
	b->id_len = (uint8_t)id_len;
	b->host = (const uint8_t *)(uintptr_t)host;
	b->used_length = used_length;
	b->page_size = page_size;
	b->dirty = (uint64_t *)(uintptr_t)dirty;
	b->scan = b->dirty;
	b->fd = -1;
	return 0;
}

void src_set_ram_section(struct src *s, uint32_t section_id)
{
	s->ram_section_id = section_id;
}

void src_set_channel(struct src *s, struct chan *ch)
{
	uint64_t drained;
	ssize_t ignored = read(s->stop_fd, &drained, sizeof(drained));

	(void)ignored;
	s->ch = s->main.ch = ch;
	s->main.last_block = s->last_requested_block = SRC_NO_BLOCK;
	src_set_urgent_channel(s, NULL);
	atomic_store(&s->ended, false);
	atomic_store(&s->stream_ended, false);
	s->scan_block = 0;
	s->scan_page = 0;
	atomic_store(&s->ring_head, atomic_load(&s->ring_tail));
	memset(&s->error, 0, sizeof(s->error));
	memset(&s->urgent_error, 0, sizeof(s->urgent_error));
	memset(&s->rp_error, 0, sizeof(s->rp_error));
	pthread_mutex_lock(&s->pong_lock);
	s->pong_count = 0;
	s->rp_ended = false;
	/* Its PONG may be lost with the old channel. Who takes a new connection has loaded the devices: a stock
	 * peer does both in one thread. */
	s->loading = false;
	pthread_cond_broadcast(&s->pong_cond);
	pthread_mutex_unlock(&s->pong_lock);
}

void src_await_loaded(struct src *s)
{
	pthread_mutex_lock(&s->pong_lock);
	s->loading = true;
	pthread_mutex_unlock(&s->pong_lock);
}

/* Whoever said SHUT needs nothing any more, whatever it left out. */
bool src_is_loading(struct src *s)
{
	bool is_loading;

	pthread_mutex_lock(&s->pong_lock);
	is_loading = s->loading && !s->rp_ended;
	pthread_mutex_unlock(&s->pong_lock);
	return is_loading;
}

int src_wait_loaded(struct src *s)
{
	int ret;

	pthread_mutex_lock(&s->pong_lock);
	while (s->loading && !s->rp_ended)
		pthread_cond_wait(&s->pong_cond, &s->pong_lock);
	ret = s->loading ? -EPIPE : 0;
	pthread_mutex_unlock(&s->pong_lock);
	return ret;
}

int src_set_scan(struct src *s, uint32_t index, uint64_t scan)
{
	if (index >= s->block_count)
		return -EINVAL;
	s->blocks[index].scan = (uint64_t *)(uintptr_t)scan;
	return 0;
}

int src_set_wanted(struct src *s, uint32_t index, uint64_t wanted)
{
	if (index >= s->block_count)
		return -EINVAL;
	s->blocks[index].wanted = (uint64_t *)(uintptr_t)wanted;
	return 0;
}

void src_set_upstream(struct src *s, struct dst *upstream)
{
	s->upstream = upstream;
}

void src_set_more_coming(struct src *s, bool more)
{
	atomic_store(&s->more_coming, more);
	src_kick(s);
}

void src_set_log(struct src *s, uint64_t entries, uint64_t capacity)
{
	s->log = (struct src_log_entry *)(uintptr_t)entries;
	s->log_capacity = capacity;
	atomic_store(&s->log_count, 0);
}

uint64_t src_log_count(const struct src *s)
{
	return atomic_load(&s->log_count);
}

void src_set_prefetch(struct src *s, uint64_t requests, uint64_t count)
{
	s->prefetch = (const struct src_request *)(uintptr_t)requests;
	s->prefetch_count = count;
	s->prefetch_at = 0;
}

void src_set_urgent_channel(struct src *s, struct chan *ch)
{
	s->urgent.ch = ch;
	s->urgent.last_block = SRC_NO_BLOCK;
}

void src_get_stats(const struct src *s, struct src_stats *out)
{
	/* A struct of counters and nothing else, which move meanwhile. */
	const uint64_t *from = (const uint64_t *)&s->stats;
	uint64_t *to = (uint64_t *)out;

	for (size_t i = 0; i < sizeof(*out) / sizeof(uint64_t); i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}

static void signal_fd(int fd)
{
	uint64_t one = 1;
	ssize_t ignored = write(fd, &one, sizeof(one));

	(void)ignored;
}

void src_kick(struct src *s)
{
	signal_fd(s->kick_fd);
}

void src_stop(struct src *s)
{
	signal_fd(s->stop_fd);
	chan_abort(s->ch);
	if (s->urgent.ch)
		chan_abort(s->urgent.ch);
	src_multifd_stop(s);
	pthread_mutex_lock(&s->pong_lock);
	s->rp_ended = true;
	pthread_cond_broadcast(&s->pong_cond);
	pthread_mutex_unlock(&s->pong_lock);
}

void src_set_hold(struct src *s, bool hold)
{
	atomic_store(&s->hold_background, hold);
	src_kick(s);
}

void src_set_rate(struct src *s, uint64_t bytes_per_second)
{
	atomic_store(&s->bytes_per_second, bytes_per_second);
	src_kick(s);
}

void src_set_zero_detection(struct src *s, int zero)
{
	atomic_store(&s->zero, zero);
}

uint64_t src_dirty_pages(const struct src *s)
{
	uint64_t n = 0;

	for (uint32_t i = 0; i < s->block_count; i++)
		n += bitmap_count(s->blocks[i].dirty, 0, s->blocks[i].used_length >> RAM_PAGE_BITS);
	return n;
}

bool src_run_sent(const struct src *s)
{
	return atomic_load(&s->run_sent);
}

uint32_t src_shut_value(const struct src *s)
{
	return s->shut_value;
}

void src_set_frame_after_pong(struct src *s, uint32_t value)
{
	atomic_store(&s->frame_after_pong, value);
}

static bool find_pong(const struct src *s, uint32_t value, uint32_t mask, uint32_t *out)
{
	for (uint32_t i = 0; i < s->pong_count && i < SRC_PONGS; i++) {
		if ((s->pongs[i] & mask) == value) {
			if (out)
				*out = s->pongs[i];
			return true;
		}
	}
	return false;
}

bool src_has_pong(struct src *s, uint32_t value)
{
	bool found;

	pthread_mutex_lock(&s->pong_lock);
	found = find_pong(s, value, UINT32_MAX, NULL);
	pthread_mutex_unlock(&s->pong_lock);
	return found;
}

int src_wait_pong(struct src *s, uint32_t value, uint32_t mask, int32_t timeout_ms, uint32_t *out)
{
	struct timespec until;
	int ret = 0;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += timeout_ms / 1000;
	until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_nsec -= 1000000000;
		until.tv_sec++;
	}
	pthread_mutex_lock(&s->pong_lock);
	while (!find_pong(s, value, mask, out)) {
		if (s->rp_ended) {
			ret = -EPIPE;
			break;
		}
		if (ret == -ETIMEDOUT)
			break;
		ret = -pthread_cond_timedwait(&s->pong_cond, &s->pong_lock, &until);
	}
	if (ret == -ETIMEDOUT && find_pong(s, value, mask, out))
		ret = 0;
	pthread_mutex_unlock(&s->pong_lock);
	return ret;
}
