enum fault_source {
	FAULT_SOURCE_COPY = 1,
	FAULT_SOURCE_PAGE_CACHE = 2,
	FAULT_SOURCE_ZERO = 3,
	FAULT_SOURCE_FETCH = 4,
};

struct fault_range {
	uint64_t start;
	uint64_t len;
	uint64_t page_size;
	uint64_t unit;
	uint64_t source;
	uint64_t source_len;
	uint32_t kind;
	uint32_t reserved;
	uint64_t first_bit;
	uint64_t *removed;
};

typedef int (*fault_fetch_fn)(void *context, uint64_t offset, void *into, uint64_t len);

struct fault_stats {
	uint64_t missing;
	uint64_t minor;
	uint64_t duplicates;
	uint64_t placed_bytes;
	uint64_t zero_bytes;
	uint64_t already_present;
	uint64_t retries;
	uint64_t vanished;
	uint64_t removes;
	uint64_t remaps;
	uint64_t unmaps;
	uint64_t forks;
	uint64_t passed_on;
	uint64_t events_dropped;
	uint64_t serve_ns_total;
	uint64_t serve_ns_max;
	uint64_t latency[40];
};

struct fault_handler {
	fault_fetch_fn fetch;
	void *context;
	struct pending_faults *pending;
	uint64_t failed_address;
	...;
};

int fault_handler_init(struct fault_handler *h, int uffd, int stop_fd, int notify_fd,
		       const struct fault_range *ranges, uint32_t count, uint32_t flags);
void fault_handler_deinit(struct fault_handler *h);

int fault_handler_run(struct fault_handler *h);
void fault_handler_await_run(struct fault_handler *h);

void fault_handler_stats(const struct fault_handler *h, struct fault_stats *out);

uint32_t fault_handler_take_events(struct fault_handler *h, struct uffd_msg *out, uint32_t max);

extern "Python" int uffd_fetch_from_python(void *context, uint64_t offset, void *into, uint64_t len);
