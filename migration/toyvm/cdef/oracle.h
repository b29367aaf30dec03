struct oracle_range {
	uint32_t block;
	uint64_t first;
	uint64_t count;
	...;
};

struct oracle_sweep {
	const struct toy_layout *layout;
	const uint64_t *base;
	const uint64_t *logs;
	const uint64_t *populated;
	const struct oracle_range *skip;
	uint32_t skip_count;
	uint32_t bad_room;
	struct toy_bad *bad;
	uint64_t pages_checked;
	uint64_t errors;
	...;
};

void oracle_fill(const struct toy_layout *layout, const uint64_t *base);
int64_t oracle_sweep(struct oracle_sweep *sweep);
int oracle_judge(const struct toy_layout *layout, uint32_t block, uint64_t page, const void *bytes,
		 uint32_t expected);
