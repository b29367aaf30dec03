#define TOY_PAGE_BYTES ...
#define TOY_MAX_BLOCKS 8
#define TOY_MAX_SMP 64
#define TOY_MAX_BAD 8
#define HISTOGRAM_SUB_BITS ...
#define HISTOGRAM_BUCKETS 1184

enum toy_kind { TOY_SEQUENTIAL, TOY_RANDOM, TOY_ZIPF, TOY_CHASE, ... };
enum toy_phase { PHASE_IDLE, PHASE_PROBE, PHASE_MODIFY, ... };
enum toy_damage {
	DAMAGE_NONE, DAMAGE_ZEROED, DAMAGE_MISPLACED, DAMAGE_IDENTITY, DAMAGE_CHECK, DAMAGE_TORN, DAMAGE_STALE,
	DAMAGE_FUTURE, DAMAGE_LINK, DAMAGE_BODY, DAMAGE_NOT_ZERO, DAMAGE_LOST, DAMAGE_RING, DAMAGE_KINDS, ...
};

struct toy_layout {
	uint64_t seed;
	uint64_t working_set;
	uint32_t smp;
	uint32_t block_count;
	uint64_t page_count[8];
	uint64_t filled[8];
	uint64_t first[9];
	...;
};

struct toy_view {
	uint64_t base[8];
	uint64_t received[8];
	uint64_t log;
	uint64_t state;
	uint64_t layout;
	uint64_t workload;
	...;
};

struct toy_workload {
	uint32_t kind;
	uint32_t write_share;
	uint64_t rate;
	uint64_t stop_at;
	...;
};

struct toy_bad {
	uint32_t damage;
	uint32_t block;
	uint64_t page;
	uint64_t expected;
	uint64_t found;
	...;
};

struct toy_histogram {
	uint64_t count;
	uint64_t sum_ns;
	uint64_t max_ns;
	uint32_t bucket[1184];
	...;
};

struct toy_state {
	uint64_t rng;
	uint64_t position;
	uint64_t ops;
	uint64_t writes;
	uint64_t hits;
	uint64_t misses;
	uint64_t errors;
	uint64_t bad_count;
	struct toy_bad bad[8];
	struct toy_histogram latency;
	uint64_t phase;
	uint64_t probe_clock;
	uint64_t first_clock;
	...;
};

uint64_t toy_slots_of(const struct toy_layout *layout, uint32_t owner);
uint32_t toy_bucket_of(uint64_t ns);
