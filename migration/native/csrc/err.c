#include "err.h"

#include <stdarg.h>
#include <stdio.h>

int mig_fail(struct mig_error *e, int code, uint64_t offset, const char *section,
	     const char *fmt, ...)
{
	va_list ap;

	if (e->code)
		return -code;
	e->code = code;
	e->offset = offset;
	snprintf(e->section, sizeof(e->section), "%s", section ? section : "");
	va_start(ap, fmt);
	vsnprintf(e->message, sizeof(e->message), fmt, ap);
	va_end(ap);
	return -code;
}
