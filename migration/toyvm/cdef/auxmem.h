int64_t aux_map(uint64_t bytes);
int aux_unmap(uint64_t address, uint64_t bytes);
