struct pagemap_region {
	uint64_t start;
	uint64_t end;
	uint64_t categories;
};

struct pagemap_scan_args {
	uint64_t flags;
	uint64_t start;
	uint64_t end;
	uint64_t max_pages;
	uint64_t category_inverted;
	uint64_t category_mask;
	uint64_t category_anyof_mask;
	uint64_t return_mask;
};

struct procmap_info {
	uint64_t start;
	uint64_t end;
	uint64_t flags;
	uint64_t page_size;
	uint64_t offset;
	uint64_t inode;
	uint32_t dev_major;
	uint32_t dev_minor;
};

int64_t pagemap_read(int fd, uint64_t address, uint64_t page_size, uint64_t *entries,
		     uint32_t count);

int64_t pagemap_scan(int fd, const struct pagemap_scan_args *args, struct pagemap_region *regions,
		     uint64_t max_regions, uint64_t *walk_end);

int procmap_query(int fd, uint64_t address, uint64_t query_flags, char *name, uint32_t name_size,
		  struct procmap_info *info);
