struct prealloc_job *prealloc_new(uint64_t start, uint64_t length, uint64_t page_size);
void prealloc_free(struct prealloc_job *job);
int64_t prealloc_work(struct prealloc_job *job);
void prealloc_stop(struct prealloc_job *job);
uint64_t prealloc_done(const struct prealloc_job *job);
struct prealloc_job { ...; };
