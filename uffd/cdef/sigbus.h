struct sigbus_report {
	int32_t signal;
	int32_t code;
	uint64_t address;
	uint32_t hits;
	int32_t error;
};

struct sigbus_fix {
	int32_t uffd;
	int32_t reserved;
	uint64_t page_size;
	uint64_t source;
};

int sigbus_install(void);
void sigbus_uninstall(void);

int sigbus_load_u8(uint64_t address, const struct sigbus_fix *fix, struct sigbus_report *report);

int sigbus_store_u8(uint64_t address, uint8_t value, const struct sigbus_fix *fix,
		    struct sigbus_report *report);
