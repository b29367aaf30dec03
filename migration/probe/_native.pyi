"""Types of the compiled module, written by hand; ``csrc/*.h`` says what each function does."""

from typing import Any

class _FFI:
    def new(self, cdecl: str, init: object = ...) -> Any: ...

class _Lib:
    GUEST_SPIN: int
    GUEST_LOAD: int
    GUEST_STORE: int
    GUEST_STORE_VALUE: int
    GUEST_SPIN_INSTRUCTIONS: int
    GUEST_STEP_OPEN: int
    GUEST_STEP_VM: int
    GUEST_STEP_RING: int
    GUEST_STEP_MEMORY: int
    GUEST_STEP_VCPU: int

    def guest_init(
        self, g: Any, ram: int, ram_bytes: int, ring_bytes: int, step_out: Any
    ) -> int: ...
    def guest_deinit(self, g: Any) -> None: ...
    def guest_run(self, g: Any, program: int, cpl: int, argument: int, out: Any) -> int: ...
    def guest_dirty_pages(self, g: Any, pages: Any, max: int) -> int: ...
    def host_keep_proc(self) -> int: ...
    def host_die_with_parent(self, parent: int) -> int: ...
    def host_can_lock(self, len: int) -> int: ...

ffi: _FFI
lib: _Lib
