struct bench_fault_config {
	uint32_t backing;
	uint32_t region_pages;
	uint32_t warmup;
	uint32_t touches;
	int32_t toucher_cpu;
	int32_t handler_cpu;
	uint32_t handler_spins;
	uint32_t transport;
	int32_t listen_cpu;
	int32_t peer_cpu;
};

struct bench_fault_counts {
	uint64_t touches;
	uint64_t messages;
	uint64_t reads;
	uint64_t placed;
	uint64_t wrong;
};

struct bench_scan_times {
	uint64_t clean_ns;
	uint64_t dirty_get_ns;
	uint64_t dirty_protect_ns;
	uint64_t write_ns;
	uint64_t dirty_pages;
	uint64_t clean_pages;
};

uint64_t bench_clock_cost_ps(uint32_t rounds);
int64_t bench_wake_rtt(int32_t cpu_a, int32_t cpu_b, uint32_t warmup, uint32_t rounds,
		       uint64_t budget_ns, uint64_t *samples_ns);
int64_t bench_fault_rtt(const struct bench_fault_config *config, uint64_t *samples_ns,
			struct bench_fault_counts *counts);
int64_t bench_socket_rtt(uint32_t transport, uint32_t request_bytes, uint32_t reply_bytes,
			 int32_t client_cpu, int32_t server_cpu, uint32_t warmup, uint32_t rounds,
			 uint64_t *samples_ns);
int bench_socket_bulk(uint32_t transport, uint32_t write_bytes, uint64_t pass_bytes, uint32_t passes,
		      int32_t sender_cpu, int32_t receiver_cpu, uint64_t *passes_ns);
int bench_place(uint32_t backing, uint32_t op, uint64_t batch, uint64_t length, uint32_t passes,
		int32_t cpu, uint64_t *passes_ns);
int bench_pagemap_scan(uint32_t backing, uint64_t length, int32_t cpu, struct bench_scan_times *out);
int64_t bench_remote_fault(const struct bench_fault_config *config, int32_t peer_fd,
			   uint64_t *samples_ns, struct bench_fault_counts *counts);
int64_t bench_remote_serve(int32_t fd, uint32_t page_bytes, uint32_t pages, int32_t cpu);
int bench_push(uint32_t transport, uint32_t backing, uint64_t length, uint32_t passes,
	       int32_t sender_cpu, int32_t receiver_cpu, uint64_t *passes_ns);
