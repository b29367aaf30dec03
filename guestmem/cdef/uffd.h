/* What we use of the room below (uffd/csrc). */
int mem_map(uint64_t hint, uint64_t len, int prot, int flags, int fd, uint64_t offset,
	    uint64_t *address_out);
int mem_unmap(uint64_t start, uint64_t len);
int mem_madvise(uint64_t start, uint64_t len, int advice);
int mem_memfd_create(const char *name, uint32_t flags);
int mem_fallocate(int fd, int mode, uint64_t offset, uint64_t len);

int uffd_open_syscall(int flags);
int uffd_api(int fd, uint64_t features, uint64_t *features_out, uint64_t *ioctls_out);
int uffd_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls_out);
int uffd_writeprotect(int fd, uint64_t start, uint64_t len, uint64_t mode);
