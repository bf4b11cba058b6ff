"""Types of the cffi extension: what it holds comes from the C headers."""

from typing import Any

ffi: Any
lib: Any
