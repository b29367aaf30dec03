"""Types of the compiled module, written by hand; ``csrc/bench.h`` says what each function does."""

from typing import Any

class _FFI:
    NULL: Any
    def new(self, cdecl: str, init: object = ...) -> Any: ...
    def unpack(self, cdata: Any, length: int) -> list[int]: ...

class _Lib:
    def bench_clock_cost_ps(self, rounds: int) -> int: ...
    def bench_wake_rtt(
        self, cpu_a: int, cpu_b: int, warmup: int, rounds: int, budget_ns: int, samples_ns: Any
    ) -> int: ...
    def bench_fault_rtt(self, config: Any, samples_ns: Any, counts: Any) -> int: ...
    def bench_socket_rtt(
        self,
        transport: int,
        request_bytes: int,
        reply_bytes: int,
        client_cpu: int,
        server_cpu: int,
        warmup: int,
        rounds: int,
        samples_ns: Any,
    ) -> int: ...
    def bench_socket_bulk(
        self,
        transport: int,
        write_bytes: int,
        pass_bytes: int,
        passes: int,
        sender_cpu: int,
        receiver_cpu: int,
        passes_ns: Any,
    ) -> int: ...
    def bench_place(
        self,
        backing: int,
        op: int,
        batch: int,
        length: int,
        passes: int,
        cpu: int,
        passes_ns: Any,
    ) -> int: ...
    def bench_pagemap_scan(self, backing: int, length: int, cpu: int, out: Any) -> int: ...
    def bench_remote_fault(
        self, config: Any, peer_fd: int, samples_ns: Any, counts: Any
    ) -> int: ...
    def bench_remote_serve(self, fd: int, page_bytes: int, pages: int, cpu: int) -> int: ...
    def bench_push(
        self,
        transport: int,
        backing: int,
        length: int,
        passes: int,
        sender_cpu: int,
        receiver_cpu: int,
        passes_ns: Any,
    ) -> int: ...

ffi: _FFI
lib: _Lib
