"""What farmem says when it can't do what was asked: one sentence, and what to type instead.

A FarmemError is a mistake or a missing means, never a bug: it is printed without a
traceback.  The exit statuses are those of env(1) and timeout(1), so that a caller
can tell farmem's failure from the command's.
"""

EXIT_FARMEM = 125
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127


class FarmemError(Exception):
    """An error for the person at the terminal: what was wrong, and what to do about it."""

    def __init__(self, what: str, hint: str = "", status: int = EXIT_FARMEM) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.status = status

    def __str__(self) -> str:
        return f"{self.what}\n  {self.hint}" if self.hint else self.what


class PageLost(FarmemError):
    """Bytes of a region can't be had from the pool any more: touching them is SIGBUS.

    `offset` is that of the first lost page in the region.
    """

    def __init__(self, what: str, hint: str, offset: int) -> None:
        super().__init__(what, hint)
        self.offset = offset


class RegionInUse(FarmemError, BufferError):
    """A region was to be closed while views of it are alive; it was left open."""
