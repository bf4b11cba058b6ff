"""An engine in Python, for testing the supervisor without the data plane.

Run as a module it is a job's launcher: it starts a supervisor as `farmem run` does, but
execs Python with a script that plays the engine (no LD_PRELOAD).  The script uses Engine.
A pipe's write end plays the userfaultfd: its reader learns when the last copy has gone.
"""

import json
import mmap
import os
import socket
import sys
from typing import Any

from farmem import _native
from farmem.job import Job, Request, inherited_environment, launch
from farmem.pools import parse_pool

ffi, lib = _native.ffi, _native.lib
WIRE_BYTES = ffi.sizeof("struct fm_wire")


class Engine:
    """One connection to the supervisor, and the job's memory once welcomed."""

    def __init__(self) -> None:
        name, token = os.environ["FARMEM_JOB"].split(":")
        self.token = bytes.fromhex(token)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect("\0" + name)  # waits while many come at once, as a real engine does
        self.sock.settimeout(20)
        self.slot = -1
        self.control: Any = None

    def send(
        self, kind: int, slot: int = 0xFFFFFFFF, fds: tuple[int, ...] = (), **fields: Any
    ) -> None:
        """Send a message; fields override what a good one holds."""
        wire = ffi.new("struct fm_wire *")
        wire.magic, wire.version = lib.FM_CONTROL_MAGIC, lib.FM_CONTROL_VERSION
        wire.kind, wire.pid, wire.slot, wire.token = kind, os.getpid(), slot, self.token
        for name, value in fields.items():
            setattr(wire, name, value)
        socket.send_fds(self.sock, [bytes(ffi.buffer(wire))], list(fds))

    def receive(self) -> tuple[Any, list[int]]:
        """The answer, and its descriptors; None: cut off."""
        data, fds, _, _ = socket.recv_fds(self.sock, WIRE_BYTES, 8)
        return (ffi.from_buffer("struct fm_wire *", data) if data else None), fds

    def hello(self, slot: int = 0xFFFFFFFF) -> "Engine":
        """Say hello, be welcomed, and map the control segment."""
        self.send(lib.FM_WIRE_HELLO, slot)
        wire, fds = self.receive()
        assert wire.kind == lib.FM_WIRE_WELCOME, wire.kind
        assert len(fds) == 3
        self.slot = wire.slot
        self.map = mmap.mmap(fds[0], ffi.sizeof("struct fm_control"))
        self.control = ffi.cast("struct fm_control *", ffi.from_buffer(self.map))
        for fd in fds:
            os.close(fd)
        return self

    @property
    def proc(self) -> Any:
        """This process's slot."""
        return self.control.procs[self.slot]

    def adopt(self) -> int:
        """Hand over a pipe's write end; the read end, which ends with the last copy."""
        self.proc.adopted = 1
        read_end, write_end = os.pipe()
        self.send(lib.FM_WIRE_HOLD, self.slot, (write_end,))
        os.close(write_end)
        return read_end

    def say(self, text: str, level: int) -> None:
        """Put a message into the ring."""
        ticket = self.control.message_next
        self.control.message_next = ticket + 1
        message = self.control.messages[ticket % lib.FM_MESSAGES_MAX]
        message.pid, message.level, message.text = os.getpid(), level, text.encode()
        message.seq = ticket + 1


def main(options: dict[str, Any], script: str, arguments: list[str]) -> None:
    """Start a job whose command is Python with the script."""
    prologue = "import os, sys, time\nfrom tests.unit.fake_engine import Engine, lib\n"
    command = (sys.executable, "-c", prologue + script, *arguments)
    request = Request(
        command=tuple(options.pop("command", command)),
        budget_bytes=64 << 20,
        pool=parse_pool("mem:64M"),
        filters=[],
        stats_path=options.pop("stats_path", ""),
        quiet=options.pop("quiet", False),
        no_pinned_io=False,
        userfaultfd_way=lib.FM_UFFD_SYSCALL,
        **options,
    )
    job = Job(request)
    environment = job.environment(inherited_environment(), "libfarmem.so")
    del environment[b"LD_PRELOAD"]
    launch(job, request.command[0], environment)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:])
