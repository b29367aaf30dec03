struct collapse_stats {
	uint64_t tried;
	uint64_t done;
	uint64_t busy;
	uint64_t no_memory;
	uint64_t refused;
	int32_t last_error;
};
struct collapse { ...; };
int collapse_range(struct collapse *c, uint64_t start, uint64_t length, uint64_t huge);
void collapse_stop(struct collapse *c);
void collapse_get(const struct collapse *c, struct collapse_stats *out);
