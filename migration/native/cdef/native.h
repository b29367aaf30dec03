struct mig_error { int32_t code; uint64_t offset; char section[96]; char message[320]; };

uint32_t crc32c(uint32_t crc, const void *data, size_t len);
uint32_t crc32c_portable(uint32_t crc, const void *data, size_t len);

struct ramrec {
	uint64_t offset;
	uint32_t kind, has_id, id_at, id_len, head_len, payload_len, fill;
};
int ramrec_decode(const uint8_t *buf, size_t len, struct ramrec *out);
size_t ramrec_encode(uint8_t *buf, uint64_t offset, uint32_t kind, const char *id, uint8_t id_len);

struct chan { struct mig_error rerror; int werror; size_t raw_head, raw_tail, win_len; ...; };
struct chan *chan_new(int rfd, int wfd, bool is_socket, int *err);
void chan_free(struct chan *c);
void chan_abort(struct chan *c);
void chan_set_read_framed(struct chan *c);
int chan_set_write_framed(struct chan *c);
int chan_read(struct chan *c, void *buf, size_t n);
int64_t chan_peek(struct chan *c, void *buf, size_t n);
int chan_write(struct chan *c, const void *data, size_t n);
int chan_flush(struct chan *c);
uint64_t chan_read_position(const struct chan *c);
uint64_t chan_write_position(const struct chan *c);
uint64_t chan_bytes_received(const struct chan *c);
uint64_t chan_bytes_sent(const struct chan *c);

struct dst_stats {
	uint64_t pages_normal, pages_zero, precopy_pages, host_pages_placed, requests, faults,
		duplicate_faults, resolved_locally, minor_faults, requests_by_main, pings,
		latency_ns_sum, latency_count, latency_dist[24];
};
struct dst_rx { struct mig_error error; ...; };
struct dst { struct dst_rx main, urgent; struct mig_error fault_error; ...; };
void dst_set_urgent_channel(struct dst *d, struct chan *ch);
int dst_urgent_loop(struct dst *d);
struct dst *dst_new(struct chan *ch, uint32_t block_count, uint64_t max_page_size, int *err);
void dst_free(struct dst *d);
int dst_set_block(struct dst *d, uint32_t index, const char *idstr, uint64_t host, uint64_t used_length,
		  uint64_t page_size, uint64_t received, uint64_t requested, int fd, int is_shared,
		  int is_hugetlb);
void dst_seal(struct dst *d);
void dst_set_ram_section(struct dst *d, uint32_t section_id);
void dst_set_channel(struct dst *d, struct chan *ch);
void dst_start_postcopy(struct dst *d, int uffd, int stop_fd, int run_fd, int32_t main_tid,
			uint64_t pending, uint64_t watchdog);
void dst_set_running(struct dst *d);
void dst_get_stats(const struct dst *d, struct dst_stats *out);
int dst_load_ram(struct dst *d);
int dst_listen_loop(struct dst *d);
int dst_await_loops(struct dst *d, uint32_t count, uint32_t timeout_s);
int dst_fault_loop(struct dst *d);
int64_t dst_request_again(struct dst *d);
int64_t dst_poison_missing(struct dst *d);
uint64_t dst_missing_pages(const struct dst *d);
int dst_pong(struct dst *d, uint32_t value);

struct src_stats {
	uint64_t pages_normal, pages_zero, postcopy_pages, requests, requested_pages,
		duplicate_requests, advised_pages, served_direct, precopy_bytes, downtime_bytes, postcopy_bytes,
		xbzrle_pages, xbzrle_bytes, xbzrle_misses, xbzrle_overflows, xbzrle_same, released_pages, run_sent_ns;
};
struct src { struct mig_error error; struct mig_error rp_error; ...; };
struct src *src_new(struct chan *ch, uint32_t block_count, int *err);
void src_free(struct src *s);
int src_set_block(struct src *s, uint32_t index, const char *idstr, uint64_t host, uint64_t used_length,
		  uint64_t page_size, uint64_t dirty);
void src_set_ram_section(struct src *s, uint32_t section_id);
void src_set_channel(struct src *s, struct chan *ch);
void src_get_stats(const struct src *s, struct src_stats *out);
void src_stop(struct src *s);
void src_set_hold(struct src *s, bool hold);
void src_set_rate(struct src *s, uint64_t bytes_per_second);
uint64_t src_dirty_pages(const struct src *s);
int64_t src_send_part(struct src *s, uint8_t type, uint64_t max_bytes);
int src_send_package(struct src *s, const void *stream, uint64_t length, bool run_alone);
void src_await_loaded(struct src *s);
int src_wait_loaded(struct src *s);
int src_postcopy_loop(struct src *s);
int src_rp_loop(struct src *s);
void src_set_frame_after_pong(struct src *s, uint32_t value);
int src_wait_pong(struct src *s, uint32_t value, uint32_t mask, int32_t timeout_ms, uint32_t *out);
bool src_has_pong(struct src *s, uint32_t value);
bool src_run_sent(const struct src *s);
uint32_t src_shut_value(const struct src *s);

struct src_log_entry { uint32_t block, count; uint64_t first, ns; };
struct src_request { uint32_t block; uint64_t first, count; };
int src_set_scan(struct src *s, uint32_t index, uint64_t scan);
void src_set_log(struct src *s, uint64_t entries, uint64_t capacity);
uint64_t src_log_count(const struct src *s);
int src_advise(struct src *s, uint32_t block, uint64_t first, uint64_t count);
void src_set_prefetch(struct src *s, uint64_t requests, uint64_t count);
void src_set_upstream(struct src *s, struct dst *upstream);
int src_set_wanted(struct src *s, uint32_t index, uint64_t wanted);
void src_set_more_coming(struct src *s, bool more);
int src_pages_came(struct src *s, uint32_t index, uint64_t offset, uint64_t length, bool is_zero);
void dst_set_sink(struct dst *d, struct src *relay_to);
void dst_set_arrival_fd(struct dst *d, int fd);
int dst_ask(struct dst *d, uint32_t index, uint64_t offset, uint32_t length);
int64_t chan_read_some(struct chan *c, void *buf, size_t n);

int xbzrle_decode(const uint8_t *in, size_t len, uint8_t *page, size_t page_len);
int xbzrle_encode(const uint8_t *old, const uint8_t *new_, size_t page_len, uint8_t *out, size_t cap);
uint32_t crc32c_pages(const void *base, uint64_t start, uint64_t end, uint32_t crc);
void src_set_urgent_channel(struct src *s, struct chan *ch);
int src_end_urgent(struct src *s, bool with_eos);

int64_t mapped_write(int fd, uint64_t host, uint64_t pages_offset, uint64_t first, uint64_t count,
		     uint64_t *present);
int64_t mapped_read(int fd, uint64_t host, uint64_t pages_offset, uint64_t first, uint64_t count,
		    const uint64_t *present);
void dst_set_vcpus(struct dst *d, const int32_t *tids, uint32_t count);
void dst_get_blocktime(struct dst *d, uint64_t *all_ns, uint64_t *vcpu_ns, uint64_t *vcpu_faults,
		       uint64_t *other_ns, uint64_t *other_faults);
int src_set_release(struct src *s, uint32_t index, int fd);
int src_xbzrle_init(struct src *s, uint64_t cache_bytes);
void src_xbzrle_activate(struct src *s);

int src_multifd_init(struct src *s, uint32_t count, bool each_section);
void src_multifd_set_channel(struct src *s, uint32_t index, struct chan *ch);
int src_multifd_loop(struct src *s, uint32_t index);
int src_multifd_sync(struct src *s);
int src_multifd_flush(struct src *s);
void src_multifd_stop(struct src *s);
const struct mig_error *src_multifd_error(const struct src *s, uint32_t index);
void src_set_zero_detection(struct src *s, int zero);
int dst_multifd_init(struct dst *d, uint32_t count, bool each_section);
void dst_multifd_set_channel(struct dst *d, uint32_t index, struct chan *ch);
int dst_multifd_loop(struct dst *d, uint32_t index);
int dst_multifd_sync(struct dst *d);
void dst_multifd_stop(struct dst *d);
const struct mig_error *dst_multifd_error(const struct dst *d, uint32_t index);
