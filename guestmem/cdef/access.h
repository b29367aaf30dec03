uint64_t access_fetch_add_u64(uint64_t address, uint64_t value);
void access_move(uint64_t dst, uint64_t src, uint64_t len);
