struct access_u64 {
	uint64_t value;
	int32_t result;
};
int access_install(void);
void access_uninstall(void);
int access_read(uint64_t address, void *into, uint64_t len);
int access_write(uint64_t address, const void *from, uint64_t len);
int access_fill(uint64_t address, uint8_t value, uint64_t len);
int access_move(uint64_t dst, uint64_t src, uint64_t len);
int access_is_zero(uint64_t address, uint64_t len);
struct access_u64 access_load_u64(uint64_t address);
int access_store_u64(uint64_t address, uint64_t value);
struct access_u64 access_fetch_add_u64(uint64_t address, uint64_t value);
uint64_t access_last_lost(void);
