"""What a server is, for those of its parts that answer questions about it."""

import dataclasses
import sys
import time

from farmem.pool.directory import Directory
from farmem.pool.leases import Leases
from farmem.pool.nbdkit import Door
from farmem.pool.queuepairs import QueuePairs


@dataclasses.dataclass
class Facts:
    """One start of a server: one epoch."""

    name: str
    epoch: str
    leases: Leases
    doors: list[Door]
    is_quiet: bool = False
    queue_pairs: QueuePairs | None = None
    directory: Directory | None = None  # the registry that it keeps
    started_seconds: float = dataclasses.field(default_factory=time.time)

    def say(self, text: str) -> None:
        """A line on stderr, for whoever runs the server."""
        if not self.is_quiet:
            print(f"farmem: {text}", file=sys.stderr, flush=True)
