uint8_t touch_load_u8(uint64_t address);
void touch_store_u8(uint64_t address, uint8_t value);
uint64_t touch_load_u64(uint64_t address);
void touch_store_u64(uint64_t address, uint64_t value);
void touch_read(uint64_t address, void *into, uint64_t len);
void touch_write(uint64_t address, const void *from, uint64_t len);
void touch_fill(uint64_t address, uint8_t value, uint64_t len);
