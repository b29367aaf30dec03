/* The listen thread: everything the main stream carries between LISTEN and the EOF byte. */
#include "dst.h"

#include "be.h"

#include <errno.h>
#include <unistd.h>

enum { TYPE_EOF = 0, TYPE_PART = 2, TYPE_END = 3, TYPE_COMMAND = 8, TYPE_FOOTER = 0x7e };
enum { CMD_PING = 2, CMD_RUN = 5 };

static int cut(struct dst_rx *rx, int ret, const char *where)
{
	if (rx->ch->rerror.code) {
		rx->error = rx->ch->rerror;
		return ret;
	}
	if (ret == -ENODATA)
		return mig_fail(&rx->error, EPIPE, rx->ch->rpos, where,
				"the connection closed before the end of the stream");
	return mig_fail(&rx->error, -ret, rx->ch->rpos, where, "reading the channel: %s", strerror(-ret));
}

static int ram_section(struct dst_rx *rx)
{
	int ret;

	chan_skip(rx->ch, 5);
	ret = dst_records(rx, true);
	if (ret < 0)
		return ret;
	ret = chan_need(rx->ch, 5);
	if (ret < 0)
		return cut(rx, ret, "ram");
	if (rx->ch->win[0] != TYPE_FOOTER || get_be32(rx->ch->win + 1) != rx->d->ram_section_id)
		return mig_fail(&rx->error, EBADMSG, rx->ch->rpos, "ram",
				"no footer of section %u after its records (byte %#x)", rx->d->ram_section_id,
				rx->ch->win[0]);
	chan_skip(rx->ch, 5);
	return 0;
}

/* 0: handled; DST_COMMAND: Python's. */
static int command(struct dst_rx *rx)
{
	uint16_t number, length;
	uint32_t value;
	uint64_t one = 1;
	int ret = chan_need(rx->ch, 5);

	if (ret < 0)
		return cut(rx, ret, "command");
	number = get_be16(rx->ch->win + 1);
	length = get_be16(rx->ch->win + 3);
	if (number == CMD_RUN && length == 0 && atomic_exchange(&rx->d->expect_run, false)) {
		chan_skip(rx->ch, 5);
		return write(rx->d->run_fd, &one, sizeof(one)) == sizeof(one) ? 0 :
			mig_fail(&rx->error, errno, rx->ch->rpos, "RUN", "waking the main thread");
	}
	if (number != CMD_PING || length != 4)
		return DST_COMMAND;
	ret = chan_need(rx->ch, 9);
	if (ret < 0)
		return cut(rx, ret, "PING");
	value = get_be32(rx->ch->win + 5);
	chan_skip(rx->ch, 9);
	dst_count(&rx->stats.pings, 1);
	ret = dst_pong(rx->d, value);
	if (ret < 0)
		return mig_fail(&rx->error, -ret, rx->ch->rpos, "PING",
				"answering on the return path: %s", strerror(-ret));
	return 0;
}

static int listen(struct dst_rx *rx)
{
	for (;;) {
		int ret = chan_need(rx->ch, 1);

		if (ret < 0)
			return cut(rx, ret, "");
		switch (rx->ch->win[0]) {
		case TYPE_EOF:
			chan_skip(rx->ch, 1);
			return DST_EOF;
		case TYPE_PART:
		case TYPE_END:
			ret = chan_need(rx->ch, 5);
			if (ret < 0)
				return cut(rx, ret, "section");
			if (get_be32(rx->ch->win + 1) != rx->d->ram_section_id)
				return DST_SECTION;
			ret = ram_section(rx);
			break;
		case TYPE_COMMAND:
			ret = command(rx);
			break;
		default:
			return DST_SECTION;
		}
		if (ret)
			return ret;
	}
}

/* Nobody brings pages now, and Python may be asleep on one with the interpreter lock held: so this is the
 * place to tell the watchdog. */
static int told(struct dst *d, int ret)
{
	if (ret < 0)
		atomic_store(&d->rp_broken, true);
	if (ret < 0 && d->watchdog)
		__atomic_store_n(&d->watchdog->action, WATCHDOG_END, __ATOMIC_RELAXED);
	return ret;
}

int dst_listen_loop(struct dst *d)
{
	sem_post(&d->loops_begun);
	return told(d, listen(&d->main));
}

/* The preempt channel: records alone, no sections. It ends with an EOS or by being closed. */
int dst_urgent_loop(struct dst *d)
{
	struct dst_rx *rx = &d->urgent;
	int ret, next;

	sem_post(&d->loops_begun);
	do {
		ret = dst_records(rx, true);
		/* A source of 7.2 ends with an EOS; others have one after no record at all: see the next byte. */
		next = ret ? ret : chan_need(rx->ch, 1);
	} while (!next);
	if (!ret && next != -ENODATA)
		ret = cut(rx, next, "preempt channel");
	if (ret < 0 && rx->ended_cleanly)
		return 0;
	return told(d, ret);
}
