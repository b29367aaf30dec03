struct guest {
	int32_t system, vm, vcpu;
	uint32_t ring_entries;
	...;
};

struct guest_answer {
	uint64_t value;
	uint64_t ns;
	uint32_t exit_reason;
	uint32_t reserved;
};

#define GUEST_SPIN ...
#define GUEST_LOAD ...
#define GUEST_STORE ...
#define GUEST_STORE_VALUE ...
#define GUEST_SPIN_INSTRUCTIONS ...
#define GUEST_STEP_OPEN ...
#define GUEST_STEP_VM ...
#define GUEST_STEP_RING ...
#define GUEST_STEP_MEMORY ...
#define GUEST_STEP_VCPU ...

int guest_init(struct guest *g, uint64_t ram, uint64_t ram_bytes, uint32_t ring_bytes,
	       uint32_t *step_out);
void guest_deinit(struct guest *g);
int guest_run(struct guest *g, uint32_t program, uint32_t cpl, uint64_t argument,
	      struct guest_answer *out);
int guest_dirty_pages(struct guest *g, uint64_t *pages, uint32_t max);

int host_keep_proc(void);
int host_die_with_parent(int parent);
int host_can_lock(uint64_t len);
