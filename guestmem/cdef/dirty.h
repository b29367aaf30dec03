int64_t pagescan_collect(int pagemap_fd, uint64_t base, uint64_t start, uint64_t length,
			 uint64_t *map, uint64_t nbits, uint32_t page_bits, bool skip_absent);
int64_t pagescan_populated(int pagemap_fd, uint64_t start, uint64_t length, uint64_t *map,
			   uint64_t nbits, uint32_t page_bits);

struct kvmlog_slot {
	uint32_t slot;
	uint32_t flags;
	uint64_t guest_address;
	uint64_t length;
	uint64_t host;
};
int kvmlog_enable_manual_protect(int vm_fd);
int kvmlog_set_logging(int vm_fd, const struct kvmlog_slot *slot, bool enabled);
int64_t kvmlog_collect(int vm_fd, uint32_t slot, bool manual, uint64_t *scratch, uint64_t npages,
		       uint64_t *map, uint64_t first_bit);

struct wpsync_range {
	uint64_t start;
	uint64_t length;
	uint64_t page_size;
	uint64_t *written;
	uint64_t nbits;
	bool populate;
};
struct wpsync { ...; };
int wpsync_init(struct wpsync *w, int uffd, int stop_fd, struct wpsync_range *ranges, uint32_t count,
		uint32_t page_bits);
void wpsync_deinit(struct wpsync *w);
int wpsync_run(struct wpsync *w);
void wpsync_await_run(struct wpsync *w);
int wpsync_protect(struct wpsync *w, uint32_t index);
int64_t wpsync_take(struct wpsync *w, uint32_t first, uint32_t count, uint64_t *noted, uint64_t *into);
uint64_t wpsync_faults(struct wpsync *w);

struct kvmring_range {
	uint32_t slot;
	uint64_t npages;
	uint64_t first_bit;
	uint64_t *map;
};
struct kvmring { ...; };
int64_t kvmring_most_entries(int vm_fd);
int kvmring_set_ranges(struct kvmring *r, const struct kvmring_range *ranges, uint32_t count);
int64_t kvmring_collect(struct kvmring *r);
uint64_t kvmring_take(struct kvmring *r, uint64_t *map, uint64_t nbits, uint64_t *into);
uint64_t kvmring_full_exits(struct kvmring *r);
int kvmring_enable(int vm_fd, uint32_t entries);
int kvmring_init(struct kvmring *r, int vm_fd, uint32_t entries, uint32_t max_vcpus);
int kvmring_add_vcpu(struct kvmring *r, int vcpu_fd);
int64_t kvmring_full(struct kvmring *r);
void kvmring_deinit(struct kvmring *r);
