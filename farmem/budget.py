"""The budget of a running job, as the supervisor changes and remembers it.

It is a word of the control segment.  An engine looks at it every few milliseconds and turns
it into its own limit, so a change needs no message.  What is remembered here is for the
statistics: a budget that was changed, by whomever, must not look as if it had been so from
the start.
"""

from typing import Any

from farmem import _native

ffi, lib = _native.ffi, _native.lib


class Budget:
    """The budget now, and what it has been."""

    def __init__(self, control: Any) -> None:
        self._word = ffi.addressof(control, "budget_bytes")
        self.size_bytes: int = lib.fm_word_read(self._word)
        self.peak_bytes = self.size_bytes
        self.changes = 0

    def look(self) -> None:
        """Note what it is now: a process of the job may have changed it as well."""
        size_bytes: int = lib.fm_word_read(self._word)
        if size_bytes != self.size_bytes:
            self.changes += 1
        self.size_bytes = size_bytes
        self.peak_bytes = max(self.peak_bytes, size_bytes)

    def change(self, size_bytes: int) -> int:
        """Set another budget, which must have been checked; the one before."""
        self.look()
        before_bytes = self.size_bytes
        lib.fm_word_write(self._word, size_bytes)
        self.look()
        return before_bytes

    def statistics(self) -> dict[str, int]:
        """What the statistics say of it."""
        self.look()
        return {
            "budget_bytes": self.size_bytes,
            "budget_peak_bytes": self.peak_bytes,
            "budget_changes": self.changes,
        }
