/*
 * Pages over several channels at once, before postcopy: a thread for each channel reads packets and stores their
 * pages. Between channels there is no order but this: at a SYNC a channel stops until the main stream has come to
 * the place where all of them meet (dst_multifd_sync), and the main stream waits there until all channels stand.
 *
 * The loops end before anything is discarded or placed: from there on nobody but the main stream stores pages.
 */
#include "dst.h"

#include "bitmap.h"
#include "multifd.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum state { READING, AT_SYNC, OVER };

struct channel {
	struct dst_rx rx;		/* what is read, its error and counters */
	uint64_t packets;
	enum state state;		/* under lock */
	struct multifd_packet packet;
};

struct dst_multifd {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	atomic_bool stopped;
	bool each_section;
	uint32_t count;
	struct channel channels[];
};

int dst_multifd_init(struct dst *d, uint32_t count, bool each_section)
{
	struct dst_multifd *m;

	if (!count || count > MULTIFD_CHANNELS || d->multifd)
		return -EINVAL;
	m = calloc(1, sizeof(*m) + count * sizeof(struct channel));
	if (!m)
		return -ENOMEM;
	pthread_mutex_init(&m->lock, NULL);
	pthread_cond_init(&m->changed, NULL);
	m->count = count;
	m->each_section = each_section;
	for (uint32_t i = 0; i < count; i++) {
		m->channels[i].rx.d = d;
		m->channels[i].rx.last_block = m->channels[i].rx.hp_block = DST_NO_BLOCK;
	}
	d->multifd = m;
	return 0;
}

void dst_multifd_free(struct dst *d)
{
	struct dst_multifd *m = d->multifd;

	if (!m)
		return;
	pthread_cond_destroy(&m->changed);
	pthread_mutex_destroy(&m->lock);
	free(m);
	d->multifd = NULL;
}

void dst_multifd_set_channel(struct dst *d, uint32_t index, struct chan *ch)
{
	d->multifd->channels[index].rx.ch = ch;
}

const struct mig_error *dst_multifd_error(const struct dst *d, uint32_t index)
{
	return &d->multifd->channels[index].rx.error;
}

void dst_multifd_add_stats(const struct dst *d, void (*add)(struct dst_stats *, const struct dst_stats *),
			   struct dst_stats *out)
{
	for (uint32_t i = 0; d->multifd && i < d->multifd->count; i++)
		add(out, &d->multifd->channels[i].rx.stats);
}

void dst_multifd_stop(struct dst *d)
{
	struct dst_multifd *m = d->multifd;

	if (!m)
		return;
	pthread_mutex_lock(&m->lock);
	atomic_store(&m->stopped, true);
	for (uint32_t i = 0; i < m->count; i++)
		if (m->channels[i].rx.ch && m->channels[i].state != OVER)
			chan_abort(m->channels[i].rx.ch);
	pthread_cond_broadcast(&m->changed);
	pthread_mutex_unlock(&m->lock);
}

/* -- the channels' threads -- */

/* Names channel and packet. */
__attribute__((format(printf, 4, 5)))
static int fail(const struct dst_multifd *m, struct channel *c, int code, const char *fmt, ...)
{
	char section[32], words[224];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(words, sizeof(words), fmt, ap);
	va_end(ap);
	snprintf(section, sizeof(section), "multifd channel %u", (uint32_t)(c - m->channels));
	return mig_fail(&c->rx.error, code, c->rx.ch->rpos, section, "packet %llu: %s",
			(unsigned long long)c->packets, words);
}

static int cut(const struct dst_multifd *m, struct channel *c, int ret)
{
	if (c->rx.ch->rerror.code)
		return fail(m, c, c->rx.ch->rerror.code, "%s", c->rx.ch->rerror.message);
	if (ret == -ENODATA)
		return fail(m, c, EPIPE, "the connection closed inside it");
	return fail(m, c, -ret, "%s", ret == -ECANCELED ? "stopped" : strerror(-ret));
}

static int check_pages(const struct dst_multifd *m, struct channel *c, const struct dst_block *b)
{
	for (uint32_t i = 0; i < c->packet.normal + c->packet.zero; i++) {
		uint64_t offset = c->packet.offsets[i];

		if (offset % RAM_PAGE_BYTES)
			return fail(m, c, EBADMSG, "a page that is not aligned (block %s, %#llx)", b->idstr,
				    (unsigned long long)offset);
		if (offset >= b->used_length)
			return fail(m, c, EBADMSG, "a page beyond the end of its block (block %s, %#llx)",
				    b->idstr, (unsigned long long)offset);
	}
	return 0;
}

static int store(struct channel *c, struct dst_block *b, uint64_t offset, const uint8_t *data)
{
	int ret = dst_store_run(&c->rx, b, offset, data, RAM_PAGE_BYTES);

	if (ret < 0)
		return ret;
	bitmap_set_atomic(b->received, offset >> RAM_PAGE_BITS, 1);
	dst_count(data ? &c->rx.stats.pages_normal : &c->rx.stats.pages_zero, 1);
	dst_count(&c->rx.stats.precopy_pages, 1);
	return 0;
}

static int take_pages(const struct dst_multifd *m, struct channel *c)
{
	const struct multifd_packet *p = &c->packet;
	struct dst *d = c->rx.d;
	int index = dst_find_block(&c->rx, p->idstr, (uint32_t)strlen(p->idstr));
	int ret;

	if (index < 0)
		return fail(m, c, EBADMSG, "pages of unknown RAM block '%s'", p->idstr);
	c->rx.last_block = (uint32_t)index;
	ret = check_pages(m, c, &d->blocks[index]);
	for (uint32_t i = 0; !ret && i < p->normal; i++) {
		ret = chan_need(c->rx.ch, RAM_PAGE_BYTES);
		if (ret < 0)
			return cut(m, c, ret);
		ret = store(c, &d->blocks[index], p->offsets[i], c->rx.ch->win);
		chan_skip(c->rx.ch, RAM_PAGE_BYTES);
	}
	for (uint32_t i = p->normal; !ret && i < p->normal + p->zero; i++)
		ret = store(c, &d->blocks[index], p->offsets[i], NULL);
	return ret;
}

/* 1: it carries SYNC; 0: it does not; -ENODATA: the channel ended where a packet would begin. */
static int one_packet(const struct dst_multifd *m, struct channel *c)
{
	const char *wrong;
	int ret = chan_need(c->rx.ch, MULTIFD_HEADER);

	if (ret == -ENODATA && !c->rx.ch->win_len && !c->rx.ch->rerror.code)
		return ret;
	if (ret < 0)
		return cut(m, c, ret);
	wrong = multifd_decode(c->rx.ch->win, &c->packet);
	if (wrong)
		return fail(m, c, EBADMSG, "%s", wrong);
	chan_skip(c->rx.ch, MULTIFD_HEADER);
	/* Without pages the block's name may be a leftover, as the size is. */
	ret = c->packet.normal || c->packet.zero ? take_pages(m, c) : 0;
	if (ret < 0)
		return ret;
	c->packets++;
	return !!(c->packet.flags & MULTIFD_SYNC);
}

/* Under lock, until the main stream was here too. */
static int meet(struct dst_multifd *m, struct channel *c)
{
	c->state = AT_SYNC;
	pthread_cond_broadcast(&m->changed);
	while (c->state == AT_SYNC && !m->stopped)
		pthread_cond_wait(&m->changed, &m->lock);
	return m->stopped ? -ECANCELED : 0;
}

int dst_multifd_loop(struct dst *d, uint32_t index)
{
	struct dst_multifd *m = d->multifd;
	struct channel *c = &m->channels[index];
	int ret;

	do {
		ret = one_packet(m, c);
		if (ret > 0) {
			pthread_mutex_lock(&m->lock);
			ret = meet(m, c);
			pthread_mutex_unlock(&m->lock);
		}
	} while (!ret);
	pthread_mutex_lock(&m->lock);
	/* Before whoever waits is told: nobody stops a channel that is over, its descriptor may be gone. */
	c->state = OVER;
	pthread_cond_broadcast(&m->changed);
	ret = ret == -ENODATA || m->stopped ? 0 : ret;
	pthread_mutex_unlock(&m->lock);
	return ret;
}

/* -- the main thread -- */

/* Under lock: this channel stands at a SYNC; or why it never will. */
static int await_channel(struct dst *d, struct channel *c)
{
	struct dst_multifd *m = d->multifd;
	struct dst_rx *main = &d->main;
	uint32_t index = (uint32_t)(c - m->channels);

	while (c->state == READING && !m->stopped)
		pthread_cond_wait(&m->changed, &m->lock);
	if (c->state == AT_SYNC && !m->stopped)
		return 0;
	if (c->state == OVER && c->rx.error.code && c->rx.error.code != ECANCELED) {
		main->error = c->rx.error;
		return -c->rx.error.code;
	}
	if (m->stopped)
		return mig_fail(&main->error, ECANCELED, main->ch->rpos, "ram", "stopped");
	return mig_fail(&main->error, EPIPE, main->ch->rpos, "ram",
			"multifd channel %u ended after %llu packets, before the SYNC that the main stream waits for",
			index, (unsigned long long)c->packets);
}

int dst_multifd_sync(struct dst *d)
{
	struct dst_multifd *m = d->multifd;
	int ret = 0;

	pthread_mutex_lock(&m->lock);
	for (uint32_t i = 0; !ret && i < m->count; i++)
		ret = await_channel(d, &m->channels[i]);
	for (uint32_t i = 0; !ret && i < m->count; i++)
		m->channels[i].state = READING;
	pthread_cond_broadcast(&m->changed);
	pthread_mutex_unlock(&m->lock);
	return ret;
}

int dst_multifd_at_flush(struct dst *d)
{
	return d->multifd && !d->multifd->stopped && !d->multifd->each_section ? dst_multifd_sync(d) : 0;
}

int dst_multifd_at_eos(struct dst *d)
{
	return d->multifd && !d->multifd->stopped && d->multifd->each_section ? dst_multifd_sync(d) : 0;
}
