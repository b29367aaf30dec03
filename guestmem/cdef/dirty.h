int64_t pagescan_collect(int pagemap_fd, uint64_t start, uint64_t length, uint64_t *map,
			 uint64_t nbits, uint32_t page_bits);
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
