/* The listen thread: everything the main stream carries between LISTEN and the EOF byte. */
#include "dst.h"

#include "be.h"

#include <errno.h>
#include <unistd.h>

enum { TYPE_EOF = 0, TYPE_PART = 2, TYPE_END = 3, TYPE_COMMAND = 8, TYPE_FOOTER = 0x7e };
enum { CMD_PING = 2, CMD_RUN = 5 };

static int cut(struct dst *d, int ret, const char *where)
{
	if (d->ch->rerror.code) {
		d->error = d->ch->rerror;
		return ret;
	}
	if (ret == -ENODATA)
		return mig_fail(&d->error, EPIPE, d->ch->rpos, where,
				"the connection closed before the end of the stream");
	return mig_fail(&d->error, -ret, d->ch->rpos, where, "reading the channel: %s", strerror(-ret));
}

static int ram_section(struct dst *d)
{
	int ret;

	chan_skip(d->ch, 5);
	ret = dst_records(d, true);
	if (ret < 0)
		return ret;
	ret = chan_need(d->ch, 5);
	if (ret < 0)
		return cut(d, ret, "ram");
	if (d->ch->win[0] != TYPE_FOOTER || get_be32(d->ch->win + 1) != d->ram_section_id)
		return mig_fail(&d->error, EBADMSG, d->ch->rpos, "ram",
				"no footer of section %u after its records (byte %#x)", d->ram_section_id,
				d->ch->win[0]);
	chan_skip(d->ch, 5);
	return 0;
}

/* 0: handled; DST_COMMAND: Python's. */
static int command(struct dst *d)
{
	uint16_t number, length;
	uint32_t value;
	uint64_t one = 1;
	int ret = chan_need(d->ch, 5);

	if (ret < 0)
		return cut(d, ret, "command");
	number = get_be16(d->ch->win + 1);
	length = get_be16(d->ch->win + 3);
	if (number == CMD_RUN && length == 0 && atomic_exchange(&d->expect_run, false)) {
		chan_skip(d->ch, 5);
		return write(d->run_fd, &one, sizeof(one)) == sizeof(one) ? 0 :
			mig_fail(&d->error, errno, d->ch->rpos, "RUN", "waking the main thread");
	}
	if (number != CMD_PING || length != 4)
		return DST_COMMAND;
	ret = chan_need(d->ch, 9);
	if (ret < 0)
		return cut(d, ret, "PING");
	value = get_be32(d->ch->win + 5);
	chan_skip(d->ch, 9);
	d->stats.pings++;
	ret = dst_pong(d, value);
	if (ret < 0)
		return mig_fail(&d->error, -ret, d->ch->rpos, "PING",
				"answering on the return path: %s", strerror(-ret));
	return 0;
}

static int listen(struct dst *d)
{
	for (;;) {
		int ret = chan_need(d->ch, 1);

		if (ret < 0)
			return cut(d, ret, "");
		switch (d->ch->win[0]) {
		case TYPE_EOF:
			chan_skip(d->ch, 1);
			return DST_EOF;
		case TYPE_PART:
		case TYPE_END:
			ret = chan_need(d->ch, 5);
			if (ret < 0)
				return cut(d, ret, "section");
			if (get_be32(d->ch->win + 1) != d->ram_section_id)
				return DST_SECTION;
			ret = ram_section(d);
			break;
		case TYPE_COMMAND:
			ret = command(d);
			break;
		default:
			return DST_SECTION;
		}
		if (ret)
			return ret;
	}
}

int dst_listen_loop(struct dst *d)
{
	int ret = listen(d);

	/* Nobody brings pages now, and Python may be asleep on one with the interpreter lock held: so this is
	 * the place to tell. */
	if (ret < 0 && d->watchdog)
		__atomic_store_n(&d->watchdog->action, WATCHDOG_END, __ATOMIC_RELAXED);
	return ret;
}
