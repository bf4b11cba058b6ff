"""The registry that a server keeps for others, in memory: entries with a time to live.

An entry is its maker's: whoever made it has chosen a secret, and nobody else can change it.
"""

import asyncio
import contextlib
import hmac
import secrets
import time
from typing import Any, NamedTuple

from farmem.errors import FarmemError
from farmem.pool.leases import Refused
from farmem.registry import ENTRIES_MAX, Entry, Registry, entry_of

TTL_NS_MIN = 1_000_000_000
TTL_NS_MAX = 3_600_000_000_000
WAIT_NS_MAX = 60_000_000_000
WATCHERS_MAX = 512
_EXPIRY_SECONDS = 1.0  # how often those that wait look for what has expired
_NS = 1_000_000_000
_VERSION_BYTES = 8
_SECRET_CHARACTERS_MIN, _SECRET_CHARACTERS_MAX = 16, 256
_EXAMPLE = (
    'send JSON, as {"url": "tcp://rack7:7717", "name": "rack7", "epoch": "0123456789abcdef", '
    '"capacity_bytes": 8589934592, "free_bytes": 8589934592, "ttl_ns": 15000000000}'
)


class _Kept(NamedTuple):
    entry: Entry
    secret: bytes
    ends_seconds: float


class Directory:
    """Who is registered."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}
        self._watchers = 0
        self._changed = asyncio.Event()
        self._change()

    def _change(self) -> None:
        """Others are listed now.  The version means nothing to anybody but us."""
        self.version = secrets.token_hex(_VERSION_BYTES)
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, version: str, seconds: float) -> None:
        """Until others are listed than in that version, or for so long; not at all, if too many
        wait already."""
        end = time.monotonic() + seconds
        if self._watchers >= WATCHERS_MAX:
            return
        self._watchers += 1
        try:
            while True:
                self._expire(time.monotonic())
                left = end - time.monotonic()
                if version != self.version or left <= 0:
                    return
                with contextlib.suppress(TimeoutError):
                    changed = self._changed.wait()
                    await asyncio.wait_for(changed, min(left, _EXPIRY_SECONDS))
        finally:
            self._watchers -= 1

    def entries(self, now_seconds: float) -> list[Entry]:
        """Those that were renewed in time."""
        self._expire(now_seconds)
        return [kept.entry for kept in self._kept.values()]

    def put(self, number: str, secret: str, asked: dict[str, Any], now_seconds: float) -> int:
        """Register or renew; the time to live."""
        entry, ttl_ns = entry_of(number, asked), asked.get("ttl_ns")
        if entry is None:
            raise Refused(400, "this is no server that can be registered", _EXAMPLE)
        if type(ttl_ns) is not int or not TTL_NS_MIN <= ttl_ns <= TTL_NS_MAX:
            raise Refused(400, "ttl_ns must be from a second to an hour", _EXAMPLE)
        if not _SECRET_CHARACTERS_MIN <= len(secret) <= _SECRET_CHARACTERS_MAX:
            raise Refused(401, "this is no secret", "choose a random one of 64 characters")
        self._expire(now_seconds)
        self._check(number, secret)
        if number not in self._kept and len(self._kept) >= ENTRIES_MAX:
            raise Refused(507, f"{ENTRIES_MAX} servers are registered, and no more can be")
        is_new = number not in self._kept
        self._kept[number] = _Kept(entry, secret.encode(), now_seconds + ttl_ns / _NS)
        if is_new:
            self._change()
        return ttl_ns

    def withdraw(self, number: str, secret: str, now_seconds: float) -> None:
        """List it no more."""
        self._expire(now_seconds)
        if number not in self._kept:
            raise Refused(404, "there is no such server", "it may have expired")
        self._check(number, secret)
        del self._kept[number]
        self._change()

    def _check(self, number: str, secret: str) -> None:
        kept = self._kept.get(number)
        if kept and not hmac.compare_digest(kept.secret, secret.encode(errors="replace")):
            raise Refused(403, "this entry is another's", "register under an id of your own")

    def _expire(self, now_seconds: float) -> None:
        ended = [n for n, kept in self._kept.items() if kept.ends_seconds <= now_seconds]
        for number in ended:
            del self._kept[number]
        if ended:
            self._change()


class OwnRegistry(Registry):
    """A server's own registry, in which it is listed itself.  Never waits."""

    def __init__(self, directory: Directory) -> None:
        super().__init__("of its own")
        self._directory = directory
        self._secret = secrets.token_hex(32)

    def register(self, entry: Entry, ttl_seconds: float, deadline: float) -> None:
        """List the server, or renew it."""
        document = {**entry.document(), "ttl_ns": int(ttl_seconds * _NS)}
        try:
            self._directory.put(entry.id, self._secret, document, time.monotonic())
        except Refused as refusal:
            raise FarmemError(refusal.what, refusal.hint) from refusal

    def withdraw(self, entry: Entry, deadline: float) -> None:
        """List it no more."""
        with contextlib.suppress(Refused):  # it has expired
            self._directory.withdraw(entry.id, self._secret, time.monotonic())

    def entries(self, deadline: float) -> list[Entry]:
        """All that are listed."""
        return self._directory.entries(time.monotonic())
