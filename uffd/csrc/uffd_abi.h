/* SPDX-License-Identifier: MIT */
/*
 * The kernel's userfaultfd numbers and layouts that the build host's headers may not have yet
 * (everything after 6.1: POISON, MOVE, RWP, SET_MODE). Numbers are kernel interface; the running
 * kernel is asked at run time whether it knows them. Layouts have names of our own so that they
 * never clash with a newer <linux/userfaultfd.h>.
 */
#ifndef UFFD_ABI_H
#define UFFD_ABI_H

#include <linux/types.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

/* One shape serves every "range, mode, result" request: ZEROPAGE, CONTINUE, POISON. */
struct uffd_abi_range_op {
	__u64 start;
	__u64 len;
	__u64 mode;
	__s64 result;
};

/* COPY and MOVE. */
struct uffd_abi_transfer_op {
	__u64 dst;
	__u64 src;
	__u64 len;
	__u64 mode;
	__s64 result;
};

/* WRITEPROTECT and RWPROTECT. */
struct uffd_abi_protect_op {
	__u64 start;
	__u64 len;
	__u64 mode;
};

struct uffd_abi_set_mode {
	__u64 enable;
	__u64 disable;
};

#define UFFD_ABI_ZEROPAGE	_IOWR(0xAA, 0x04, struct uffd_abi_range_op)
#define UFFD_ABI_CONTINUE	_IOWR(0xAA, 0x07, struct uffd_abi_range_op)
#define UFFD_ABI_POISON		_IOWR(0xAA, 0x08, struct uffd_abi_range_op)
#define UFFD_ABI_COPY		_IOWR(0xAA, 0x03, struct uffd_abi_transfer_op)
#define UFFD_ABI_MOVE		_IOWR(0xAA, 0x05, struct uffd_abi_transfer_op)
#define UFFD_ABI_WRITEPROTECT	_IOWR(0xAA, 0x06, struct uffd_abi_protect_op)
#define UFFD_ABI_RWPROTECT	_IOWR(0xAA, 0x09, struct uffd_abi_protect_op)
#define UFFD_ABI_SET_MODE	_IOW(0xAA, 0x0A, struct uffd_abi_set_mode)

#define UFFD_ABI_FAULT_WRITE	1u
#define UFFD_ABI_FAULT_WP	2u
#define UFFD_ABI_FAULT_MINOR	4u
#define UFFD_ABI_FAULT_RWP	8u

_Static_assert(sizeof(struct uffd_msg) == 32, "uffd_msg is 32 bytes");
_Static_assert(sizeof(struct uffdio_api) == 24, "uffdio_api is 24 bytes");
_Static_assert(sizeof(struct uffdio_register) == 32, "uffdio_register is 32 bytes");
_Static_assert(sizeof(struct uffdio_range) == 16, "uffdio_range is 16 bytes");
_Static_assert(UFFD_ABI_COPY == 0xC028AA03, "UFFDIO_COPY");
_Static_assert(UFFD_ABI_ZEROPAGE == 0xC020AA04, "UFFDIO_ZEROPAGE");
_Static_assert(UFFD_ABI_MOVE == 0xC028AA05, "UFFDIO_MOVE");
_Static_assert(UFFD_ABI_WRITEPROTECT == 0xC018AA06, "UFFDIO_WRITEPROTECT");
_Static_assert(UFFD_ABI_CONTINUE == 0xC020AA07, "UFFDIO_CONTINUE");
_Static_assert(UFFD_ABI_POISON == 0xC020AA08, "UFFDIO_POISON");
_Static_assert(UFFD_ABI_RWPROTECT == 0xC018AA09, "UFFDIO_RWPROTECT");
_Static_assert(UFFD_ABI_SET_MODE == 0x4010AA0A, "UFFDIO_SET_MODE");

#endif
