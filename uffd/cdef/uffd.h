int uffd_open_syscall(int flags);
int uffd_open_dev(int flags);
int uffd_api(int fd, uint64_t features, uint64_t *features_out, uint64_t *ioctls_out);
int uffd_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls_out);
int uffd_unregister(int fd, uint64_t start, uint64_t len);
int64_t uffd_copy(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode);
int64_t uffd_zeropage(int fd, uint64_t start, uint64_t len, uint64_t mode);
int64_t uffd_continue(int fd, uint64_t start, uint64_t len, uint64_t mode);
int64_t uffd_poison(int fd, uint64_t start, uint64_t len, uint64_t mode);
int64_t uffd_move(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode);
int uffd_writeprotect(int fd, uint64_t start, uint64_t len, uint64_t mode);
int uffd_rwprotect(int fd, uint64_t start, uint64_t len, uint64_t mode);
int uffd_set_mode(int fd, uint64_t enable, uint64_t disable);
int uffd_wake(int fd, uint64_t start, uint64_t len);

/* Messages are read into plain bytes and taken apart by struct, so that unknown events survive. */
int64_t uffd_read(int fd, struct uffd_msg *msgs, uint32_t max_msgs);
struct uffd_msg { ...; };
