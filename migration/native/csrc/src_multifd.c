/*
 * Pages over several channels at once, before postcopy. The migration thread collects pages of one block and hands
 * them to the next idle channel; that channel's thread sends them, straight from guest memory where no checksums
 * are on. Between channels there is no order, so a page must not be sent twice without a SYNC in between:
 * src_multifd_flush, before the guest's writes are looked for again.
 *
 * A page that is written while it is being sent is dirty again by the next look, as everywhere in a precopy.
 */
#include "src.h"

#include "zero.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

_Static_assert(MULTIFD_SLOTS + 1 <= CHAN_PIECES, "a packet is one call");

/* Pages of one block on their way to a channel. */
struct batch {
	uint32_t block, count;
	uint64_t offsets[MULTIFD_SLOTS];
	bool look_for_zero;
};

struct channel {
	struct chan *ch;
	pthread_cond_t work;
	struct batch batch;		/* the thread's while has_batch */
	bool has_batch, wants_sync, failed;
	struct multifd_packet packet;	/* the thread's */
	uint8_t header[MULTIFD_HEADER];
	struct mig_error error;
};

struct src_multifd {
	pthread_mutex_t lock;
	pthread_cond_t idle;		/* a channel finished something, or failed */
	struct batch filling;		/* migration thread */
	uint64_t taken;			/* the same: bytes */
	bool unsynced;			/* the same: something went out since the last SYNC */
	bool each_section;
	atomic_bool stopped;
	uint64_t next_number;		/* under lock */
	uint32_t count, next;
	struct channel channels[];
};

int src_multifd_init(struct src *s, uint32_t count, bool each_section)
{
	struct src_multifd *m;

	if (!count || count > MULTIFD_CHANNELS || s->multifd)
		return -EINVAL;
	m = calloc(1, sizeof(*m) + count * sizeof(struct channel));
	if (!m)
		return -ENOMEM;
	pthread_mutex_init(&m->lock, NULL);
	pthread_cond_init(&m->idle, NULL);
	for (uint32_t i = 0; i < count; i++)
		pthread_cond_init(&m->channels[i].work, NULL);
	m->count = count;
	m->each_section = each_section;
	s->multifd = m;
	return 0;
}

void src_multifd_free(struct src *s)
{
	struct src_multifd *m = s->multifd;

	if (!m)
		return;
	for (uint32_t i = 0; i < m->count; i++)
		pthread_cond_destroy(&m->channels[i].work);
	pthread_cond_destroy(&m->idle);
	pthread_mutex_destroy(&m->lock);
	free(m);
	s->multifd = NULL;
}

void src_multifd_set_channel(struct src *s, uint32_t index, struct chan *ch)
{
	s->multifd->channels[index].ch = ch;
}

const struct mig_error *src_multifd_error(const struct src *s, uint32_t index)
{
	return &s->multifd->channels[index].error;
}

void src_multifd_stop(struct src *s)
{
	struct src_multifd *m = s->multifd;

	if (!m)
		return;
	pthread_mutex_lock(&m->lock);
	atomic_store(&m->stopped, true);
	for (uint32_t i = 0; i < m->count; i++) {
		if (m->channels[i].ch && (m->channels[i].has_batch || m->channels[i].wants_sync))
			chan_abort(m->channels[i].ch);
		pthread_cond_signal(&m->channels[i].work);
	}
	pthread_cond_broadcast(&m->idle);
	pthread_mutex_unlock(&m->lock);
}

bool src_multifd_takes(const struct src *s)
{
	return !atomic_load_explicit(&s->postcopy, memory_order_relaxed) &&
	       !atomic_load_explicit(&s->multifd->stopped, memory_order_relaxed);
}

uint64_t src_multifd_taken(const struct src *s)
{
	return s->multifd->taken;
}

/* -- the migration thread -- */

static int failed(struct src *s, const struct channel *c)
{
	uint32_t index = (uint32_t)(c - s->multifd->channels);

	return mig_fail(&s->error, c->error.code, c->error.offset, "ram", "multifd channel %u: %s", index,
			c->error.message);
}

/* Under lock. What keeps the migration thread from going on, if anything does. */
static int broken(struct src *s)
{
	struct src_multifd *m = s->multifd;

	for (uint32_t i = 0; i < m->count; i++)
		if (m->channels[i].failed)
			return failed(s, &m->channels[i]);
	if (atomic_load(&m->stopped))
		return mig_fail(&s->error, ECANCELED, s->ch->wpos, "ram", "stopped");
	return 0;
}

/* Under lock: in turn, so that all are used; NULL when all are busy. */
static struct channel *next_idle(struct src_multifd *m)
{
	for (uint32_t tried = 0; tried < m->count; tried++) {
		struct channel *c = &m->channels[m->next];

		m->next = (m->next + 1) % m->count;
		if (!c->has_batch)
			return c;
	}
	return NULL;
}

static int hand_out(struct src *s)
{
	struct src_multifd *m = s->multifd;
	struct channel *c = NULL;
	int ret;

	if (!m->filling.count)
		return 0;
	m->filling.look_for_zero = atomic_load_explicit(&s->zero, memory_order_relaxed) == SRC_ZERO_MULTIFD;
	pthread_mutex_lock(&m->lock);
	while (!(ret = broken(s)) && !(c = next_idle(m)))
		pthread_cond_wait(&m->idle, &m->lock);
	if (c) {
		c->batch = m->filling;
		c->has_batch = true;
		pthread_cond_signal(&c->work);
	}
	pthread_mutex_unlock(&m->lock);
	m->filling.count = 0;
	return ret;
}

int src_multifd_put(struct src *s, uint32_t index, uint64_t page)
{
	struct src_multifd *m = s->multifd;
	int ret = 0;

	if (m->filling.count && (m->filling.block != index || m->filling.count == MULTIFD_SLOTS))
		ret = hand_out(s);
	if (ret < 0)
		return ret;
	m->filling.block = index;
	m->filling.offsets[m->filling.count++] = page << RAM_PAGE_BITS;
	m->taken += RAM_PAGE_BYTES;
	m->unsynced = true;
	return 0;
}

int src_multifd_sync(struct src *s)
{
	struct src_multifd *m = s->multifd;
	int ret = hand_out(s);

	if (ret < 0)
		return ret;
	pthread_mutex_lock(&m->lock);
	for (uint32_t i = 0; i < m->count; i++) {
		m->channels[i].wants_sync = true;
		pthread_cond_signal(&m->channels[i].work);
	}
	for (uint32_t i = 0; i < m->count;) {
		ret = broken(s);
		if (ret < 0)
			break;
		if (m->channels[i].wants_sync)
			pthread_cond_wait(&m->idle, &m->lock);
		else
			i++;
	}
	pthread_mutex_unlock(&m->lock);
	m->unsynced = false;
	return ret;
}

int src_multifd_end_section(struct src *s, bool is_meeting, bool *flush)
{
	struct src_multifd *m = s->multifd;

	if (!src_multifd_takes(s) || !(is_meeting || m->each_section))
		return 0;
	*flush = !m->each_section;
	return src_multifd_sync(s);
}

int src_multifd_flush(struct src *s)
{
	if (!s->multifd || !src_multifd_takes(s) || !s->multifd->unsynced)
		return 0;
	return (int)src_send_part(s, 2, 0);
}

/* -- the channels' threads -- */

static int write_failed(struct channel *c, int ret)
{
	return mig_fail(&c->error, -ret, c->ch->wpos, "multifd", "writing the channel: %s",
			ret == -ECANCELED ? "stopped" : strerror(-ret));
}

static uint64_t new_number(struct src_multifd *m)
{
	uint64_t number;

	pthread_mutex_lock(&m->lock);
	number = m->next_number++;
	pthread_mutex_unlock(&m->lock);
	return number;
}

static int send_packet(struct channel *c, struct iovec *pieces, int count)
{
	int ret;

	multifd_encode(c->header, &c->packet);
	pieces[0] = (struct iovec){ c->header, sizeof(c->header) };
	chan_lock(c->ch);
	ret = chan_send_pieces_locked(c->ch, pieces, count);
	chan_unlock(c->ch);
	return ret < 0 ? write_failed(c, ret) : 0;
}

/* Normal pages in front, zero pages behind them; each in the order they were handed out. */
static void sort_pages(const struct src_block *b, const struct batch *batch, struct multifd_packet *p)
{
	uint64_t zeros[MULTIFD_SLOTS];

	for (uint32_t i = 0; i < batch->count; i++) {
		uint64_t offset = batch->offsets[i];

		if (batch->look_for_zero && buffer_is_zero(b->host + offset, RAM_PAGE_BYTES))
			zeros[p->zero++] = offset;
		else
			p->offsets[p->normal++] = offset;
	}
	memcpy(p->offsets + p->normal, zeros, p->zero * sizeof(*zeros));
}

static int send_batch(struct src *s, struct channel *c)
{
	const struct src_block *b = &s->blocks[c->batch.block];
	struct multifd_packet *p = &c->packet;
	struct iovec pieces[CHAN_PIECES];
	int count = 1, ret;

	p->flags = p->normal = p->zero = 0;
	p->slots = MULTIFD_SLOTS;
	p->number = new_number(s->multifd);
	memcpy(p->idstr, b->idstr, sizeof(p->idstr));
	sort_pages(b, &c->batch, p);
	for (uint32_t i = 0; i < p->normal; i++) {
		uint8_t *page = (uint8_t *)b->host + p->offsets[i];
		struct iovec *last = &pieces[count - 1];

		if (count > 1 && (uint8_t *)last->iov_base + last->iov_len == page)
			last->iov_len += RAM_PAGE_BYTES;
		else
			pieces[count++] = (struct iovec){ page, RAM_PAGE_BYTES };
	}
	ret = send_packet(c, pieces, count);
	if (ret < 0)
		return ret;
	__atomic_fetch_add(&s->stats.pages_normal, p->normal, __ATOMIC_RELAXED);
	__atomic_fetch_add(&s->stats.pages_zero, p->zero, __ATOMIC_RELAXED);
	return 0;
}

static int send_sync(struct src *s, struct channel *c)
{
	struct iovec piece;

	memset(&c->packet, 0, sizeof(c->packet));
	c->packet.flags = MULTIFD_SYNC;
	c->packet.slots = s->multifd->each_section ? MULTIFD_SLOTS : 0;
	c->packet.number = new_number(s->multifd);
	return send_packet(c, &piece, 1);
}

int src_multifd_loop(struct src *s, uint32_t index)
{
	struct src_multifd *m = s->multifd;
	struct channel *c = &m->channels[index];
	int ret = 0;

	pthread_mutex_lock(&m->lock);
	while (!ret) {
		bool is_batch;

		while (!c->has_batch && !c->wants_sync && !atomic_load(&m->stopped))
			pthread_cond_wait(&c->work, &m->lock);
		if (atomic_load(&m->stopped))
			break;
		is_batch = c->has_batch;
		pthread_mutex_unlock(&m->lock);
		ret = is_batch ? send_batch(s, c) : send_sync(s, c);
		pthread_mutex_lock(&m->lock);
		if (is_batch)
			c->has_batch = false;
		else
			c->wants_sync = false;
		c->failed = ret < 0;
		pthread_cond_broadcast(&m->idle);
	}
	pthread_mutex_unlock(&m->lock);
	return ret;
}
