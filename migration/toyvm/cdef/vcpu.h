enum vcpu_status { VCPU_READY, VCPU_LOST_PAGE, VCPU_FAILED, ... };

struct vcpu {
	struct toy_view view;
	uint32_t index;
	uint32_t status;
	uint64_t lost_address;
	uint64_t last_op_ns;
	uint64_t last_op_realtime_ns;
	int32_t error;
	...;
};

int guard_install(void);
void guard_uninstall(void);
int guard_kick_signal(void);

int vcpu_init(struct vcpu *vcpu, uint32_t index, const struct toy_view *view);
int vcpu_serve(struct vcpu *vcpu);
void vcpu_go(struct vcpu *vcpu);
void vcpu_ask_halt(struct vcpu *vcpu);
void vcpu_halt(struct vcpu *vcpu);
void vcpu_quit(struct vcpu *vcpu);
bool vcpu_is_running(const struct vcpu *vcpu);
void vcpu_set_received(struct vcpu *vcpu, const uint64_t *maps);
