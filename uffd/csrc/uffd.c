// SPDX-License-Identifier: MIT
#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "uffd_abi.h"

int uffd_open_syscall(int flags)
{
	long fd = syscall(SYS_userfaultfd, flags);

	return fd >= 0 ? (int)fd : -errno;
}

/*
 * The device asks neither the sysctl nor capabilities, only the file mode. The new fd's flags travel
 * by value in the ioctl argument.
 */
int uffd_open_dev(int flags)
{
	int dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	int fd;

	if (dev < 0)
		return -errno;
	fd = ioctl(dev, USERFAULTFD_IOC_NEW, (unsigned long)flags);
	if (fd < 0)
		fd = -errno;
	close(dev);
	return fd;
}

int uffd_api(int fd, uint64_t features, uint64_t *features_out, uint64_t *ioctls_out)
{
	struct uffdio_api op = { .api = UFFD_API, .features = features };

	if (ioctl(fd, UFFDIO_API, &op) < 0)
		return -errno;
	*features_out = op.features;
	*ioctls_out = op.ioctls;
	return 0;
}

int uffd_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls_out)
{
	struct uffdio_register op = { .range = { .start = start, .len = len }, .mode = mode };

	if (ioctl(fd, UFFDIO_REGISTER, &op) < 0)
		return -errno;
	*ioctls_out = op.ioctls;
	return 0;
}

int uffd_unregister(int fd, uint64_t start, uint64_t len)
{
	struct uffdio_range op = { .start = start, .len = len };

	return ioctl(fd, UFFDIO_UNREGISTER, &op) < 0 ? -errno : 0;
}

/*
 * The result field is preset to 0 because the kernel leaves it alone on errors it finds early
 * (alignment, mode, a process that is gone). On failure a positive field is progress made before the
 * obstacle; a negative one repeats the error.
 */
static int64_t transfer(int fd, unsigned long request, uint64_t dst, uint64_t src, uint64_t len,
			uint64_t mode)
{
	struct uffd_abi_transfer_op op = { .dst = dst, .src = src, .len = len, .mode = mode };

	if (ioctl(fd, request, &op) == 0 || op.result > 0)
		return op.result;
	return -errno;
}

static int64_t range_op(int fd, unsigned long request, uint64_t start, uint64_t len, uint64_t mode)
{
	struct uffd_abi_range_op op = { .start = start, .len = len, .mode = mode };

	if (ioctl(fd, request, &op) == 0 || op.result > 0)
		return op.result;
	return -errno;
}

static int protect_op(int fd, unsigned long request, uint64_t start, uint64_t len, uint64_t mode)
{
	struct uffd_abi_protect_op op = { .start = start, .len = len, .mode = mode };

	return ioctl(fd, request, &op) < 0 ? -errno : 0;
}

int64_t uffd_copy(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode)
{
	return transfer(fd, UFFD_ABI_COPY, dst, src, len, mode);
}

int64_t uffd_move(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode)
{
	return transfer(fd, UFFD_ABI_MOVE, dst, src, len, mode);
}

int64_t uffd_zeropage(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	return range_op(fd, UFFD_ABI_ZEROPAGE, start, len, mode);
}

int64_t uffd_continue(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	return range_op(fd, UFFD_ABI_CONTINUE, start, len, mode);
}

int64_t uffd_poison(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	return range_op(fd, UFFD_ABI_POISON, start, len, mode);
}

int uffd_writeprotect(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	return protect_op(fd, UFFD_ABI_WRITEPROTECT, start, len, mode);
}

int uffd_rwprotect(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	return protect_op(fd, UFFD_ABI_RWPROTECT, start, len, mode);
}

int uffd_set_mode(int fd, uint64_t enable, uint64_t disable)
{
	struct uffd_abi_set_mode op = { .enable = enable, .disable = disable };

	return ioctl(fd, UFFD_ABI_SET_MODE, &op) < 0 ? -errno : 0;
}

int uffd_wake(int fd, uint64_t start, uint64_t len)
{
	struct uffdio_range op = { .start = start, .len = len };

	return ioctl(fd, UFFDIO_WAKE, &op) < 0 ? -errno : 0;
}

int64_t uffd_read(int fd, struct uffd_msg *msgs, uint32_t max_msgs)
{
	ssize_t got = read(fd, msgs, (size_t)max_msgs * sizeof(*msgs));

	if (got >= 0)
		return got / (ssize_t)sizeof(*msgs);
	return errno == EAGAIN ? 0 : -errno;
}
