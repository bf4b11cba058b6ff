"""What is run in the guest: programs of tests/safety and tests/survive, with smaller sizes.

Everything is many times slower there, so each case is just long enough to have its pages
evicted and fetched a few thousand times.  Only what makes sense without UFFDIO_MOVE:
nothing that pins memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests import harness
from tests.survive.programs import compile_here

VOUCHED = ("--no-pinned-io",)
WORDS_MIB = 64
WORDS_PERCENT = (50, 25)


@dataclass(frozen=True)
class Case:
    """A program of tests/safety under `farmem run`; its sizes are divided by `shrink`."""

    name: str
    command: str
    shrink: int = 4
    options: tuple[str, ...] = VOUCHED
    filters: tuple[str, ...] = ()
    timeout: float = 300

    def program(self) -> Path:
        """The compiled program: the host compiles it, and the guest finds it there."""
        flags = [f"-DSHRINK={self.shrink}", "-DBALLAST_MIB=20"]
        return harness.compile_c(self.command.split()[0], flags=flags)


LOCAL = "16M"
# Right bytes, and pages that went out and came back.
SAFETY = [
    Case("verify", "verify 1 32 1"),
    Case("verify_threads", "verify 4 48 4"),
    Case("verify_failing_stores", "verify 4 48 3", filters=("error:store=0.5,seed=2",)),
    Case("discards_dontneed", "discards dontneed 16"),
    Case("discards_free", "discards free 2"),
    Case("unmap_reuse", "unmap_reuse 10"),
    Case("remap_grow", "remap grow 1"),
    Case("remap_move", "remap move 1"),
    Case("remap_dontunmap", "remap dontunmap 1"),
    Case("remap_storm", "remap storm 1"),
    Case("drop_race_move", "drop_race move 8"),
    Case("drop_race_over", "drop_race over 4"),
    Case("protect", "protect 1"),
    Case("forks_child", "forks child 1"),
    Case("forks_grand", "forks grand 1"),
    Case("forks_many", "forks many 4"),
    Case("forks_malloc", "forks malloc 2"),
    Case("forks_thread", "forks thread 1"),
    Case("rawfork", "rawfork _Fork 1"),
    Case("spawns", "spawns 1"),
    Case("thread_exit", "thread_exit 40 1"),
    Case("signals", "signals"),
    Case("closefrom", "closefrom range late"),
    Case("death", "death_writes pipe kill 3", shrink=2),
]
REFUSED = Case("refused", "verify 1 24 1", options=())
LOST = Case("lost", "lost {armed}", shrink=2, filters=("error:corrupt=1,file={armed}",))


def words_program() -> Path:
    """Where tests/survive/words.c is compiled to, for host and guest alike."""
    return harness.BUILD / "words"


def compile_all() -> None:
    """Compile on the host what the guest will run: there it would take minutes."""
    for case in (*SAFETY, REFUSED, LOST):
        case.program()
    harness.compile_c("measure")
    compile_here("words", harness.BUILD)
