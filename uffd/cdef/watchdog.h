struct watchdog { ...; };

int watchdog_init(struct watchdog *w, int stop_fd, int report_fd, uint32_t stale_ms,
		  int traceback_signal, int exit_status);
void watchdog_deinit(struct watchdog *w);

int watchdog_watch(struct watchdog *w, const struct pending_faults *table, int uffd);
void watchdog_unwatch(struct watchdog *w, int index);

void watchdog_beat(struct watchdog *w);
void watchdog_set_action(struct watchdog *w, uint32_t action);
uint64_t watchdog_reports(const struct watchdog *w);

int watchdog_run(struct watchdog *w);
