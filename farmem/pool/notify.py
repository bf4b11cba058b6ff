"""What systemd wants to know of a service of Type=notify: sd_notify(3), without libsystemd."""

import contextlib
import os
import socket


def notify(*words: str) -> None:
    """Tell systemd READY=1, STOPPING=1, WATCHDOG=1 or STATUS=...; silent where nobody asked."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = f"\0{path[1:]}" if path.startswith("@") else path
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as sender:
        sender.sendto("\n".join(words).encode(), address)


def watchdog_seconds() -> float:
    """How often WATCHDOG=1 is to be sent: half of what systemd waits; 0: not at all."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 2e6 if microseconds.isdigit() else 0
