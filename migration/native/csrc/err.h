/* One error, the first one, with its place in the stream. Filled by the loops, read by Python after they returned. */
#ifndef MIG_ERR_H
#define MIG_ERR_H

#include <stdint.h>

struct mig_error {
	int32_t code;		/* errno, 0 = none */
	uint64_t offset;	/* stream offset of the first byte that was not accepted */
	char section[96];	/* section or phase, "" between sections */
	char message[320];
};

/* Keep the first error; returns -code so that callers can return the call. */
int mig_fail(struct mig_error *e, int code, uint64_t offset, const char *section,
	     const char *fmt, ...) __attribute__((format(printf, 5, 6)));

#endif
