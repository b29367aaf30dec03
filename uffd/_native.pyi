"""Types of the compiled module, written by hand; ``csrc/*.h`` says what each function does."""

from typing import Any, Literal, overload

import _cffi_backend

class _CData(_cffi_backend._CDataBase):
    """A C pointer, struct or array; ``x[i]`` and struct fields."""

    def __getattr__(self, name: str) -> Any: ...
    def __getitem__(self, index: int) -> Any: ...

class _FFI:
    NULL: Any
    def new(self, cdecl: str, init: object = ...) -> Any: ...
