#define KVM_STATE_MSRS 32
#define GUEST_STACK_BYTES ...

enum kvm_slot { SLOT_RAM, ... };

struct kvmring { ...; };

struct guest_shared {
	struct toy_view view;
	...;
};

struct kvm_vm {
	int32_t fd;
	uint64_t ram_gpa[8];
	...;
};

struct kvm_vcpu {
	struct guest_shared *shared;
	uint64_t ticks_per_s;
	int32_t fd;
	uint32_t index;
	uint32_t status;
	uint32_t exit_reason;
	int32_t error;
	uint64_t lost_address;
	uint64_t last_op_ns;
	uint64_t last_op_realtime_ns;
	...;
};

struct kvm_regs { ...; };
struct kvm_sregs { ...; };
struct kvm_debugregs { ...; };
struct kvm_xcrs { ...; };
struct kvm_vcpu_events { ...; };
struct kvm_xsave { ...; };

struct kvm_state_msr {
	uint64_t index;
	uint64_t value;
};

struct kvm_state {
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_debugregs debugregs;
	struct kvm_xcrs xcrs;
	struct kvm_vcpu_events events;
	struct kvm_xsave xsave;
	uint64_t mp_state;
	uint64_t msr_count;
	struct kvm_state_msr msrs[32];
	uint8_t stack[...];
	...;
};

int kvm_vm_init(struct kvm_vm *vm, uint32_t smp, uint32_t blocks, const uint64_t *base,
		const uint64_t *pages, uint64_t aux, uint64_t aux_bytes, uint32_t ring_entries);
struct kvmring *kvm_vm_ring(struct kvm_vm *vm);
void kvm_vm_deinit(struct kvm_vm *vm);
uint64_t kvm_vm_code_bytes(void);
uint64_t kvm_vm_code(const struct kvm_vm *vm);
int kvm_vm_set_received(struct kvm_vm *vm, uint32_t number, uint64_t host, uint64_t bytes,
			uint64_t *guest_out);
int kvm_vcpu_init(struct kvm_vcpu *vcpu, struct kvm_vm *vm, uint32_t index,
		  const struct toy_view *host, uint64_t aux);
void kvm_vcpu_deinit(struct kvm_vcpu *vcpu);
int kvm_vcpu_serve(struct kvm_vcpu *vcpu);
void kvm_vcpu_go(struct kvm_vcpu *vcpu);
void kvm_vcpu_ask_halt(struct kvm_vcpu *vcpu);
void kvm_vcpu_halt(struct kvm_vcpu *vcpu);
void kvm_vcpu_quit(struct kvm_vcpu *vcpu);
bool kvm_vcpu_is_running(const struct kvm_vcpu *vcpu);
uint64_t kvm_vcpu_tick_ns(const struct kvm_vcpu *vcpu, uint64_t ticks);
int kvm_state_reset(struct kvm_vcpu *vcpu);
int kvm_state_save(struct kvm_vcpu *vcpu, struct kvm_state *out);
int kvm_state_restore(struct kvm_vcpu *vcpu, const struct kvm_state *state);
