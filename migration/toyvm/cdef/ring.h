#define RING_PER_PAGE ...

struct ring {
	uint64_t base;
	uint64_t slots;
	uint64_t head;
	uint64_t seed;
	uint64_t rate;
	uint64_t dirty;
	uint64_t first_page;
	uint32_t status;
	uint64_t lost_address;
	...;
};

void ring_init(struct ring *ring, uint64_t base, uint64_t pages, uint64_t seed, uint64_t rate,
	       uint64_t dirty, uint64_t first_page);
void ring_fill(struct ring *ring);
int ring_serve(struct ring *ring);
void ring_go(struct ring *ring);
void ring_halt(struct ring *ring);
void ring_quit(struct ring *ring);
uint64_t ring_verify(const struct ring *ring, const void *bytes, uint64_t first, uint64_t count);
int64_t ring_sweep(struct ring *ring, uint32_t block, struct toy_bad *bad, uint32_t bad_room);
