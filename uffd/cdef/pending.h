struct pending_entry {
	uint64_t address;
	uint64_t since_ns;
	uint32_t tid;
	uint32_t reserved;
};

struct pending_faults { uint32_t count; uint64_t dropped; ...; };

void pending_init(struct pending_faults *tbl);
int pending_add(struct pending_faults *tbl, uint64_t addr, uint32_t tid);
uint32_t pending_remove_range(struct pending_faults *tbl, uint64_t addr, uint64_t len);
bool pending_oldest(const struct pending_faults *tbl, struct pending_entry *out);
uint32_t pending_list(const struct pending_faults *tbl, struct pending_entry *out, uint32_t max);
