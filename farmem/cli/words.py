"""What the words on the command line can be: for the shells' completion alone.

Nothing here is asked of a running job or of another host: a Tab is answered at once.
"""

import os
import re
from collections.abc import Iterable, Mapping

from click.shell_completion import CompletionItem

from farmem import filters, pools

_ENTRIES_MAX = 1000


def verbs(known: Mapping[str, str], incomplete: str) -> list[CompletionItem]:
    """The verbs that begin so."""
    return [
        CompletionItem(name, help=text)
        for name, text in known.items()
        if name.startswith(incomplete)
    ]


def complete(kind: str, incomplete: str) -> list[CompletionItem]:
    """The values of an option of this kind (its type's name) that begin so."""
    if kind == "path":
        return [CompletionItem(incomplete, type="file")]
    completer = {"size": _sizes, "pool": _pools, "filter": _filters}.get(kind)
    return completer(incomplete) if completer else []


def _beginning(words: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def _sizes(incomplete: str) -> list[CompletionItem]:
    """A number gets its units; nothing typed gets sizes that this host has."""
    if re.fullmatch(r"\d+(\.\d+)?", incomplete):
        return _beginning((incomplete + unit for unit in "MGT"), incomplete)
    host_bytes = pools.host_memory_bytes()
    sizes = {f"{1 << bit}M": 1 << (bit + 20) for bit in (6, 7, 8, 9)}
    sizes |= {f"{1 << bit}G": 1 << (bit + 30) for bit in range(10)}
    return _beginning((word for word, size in sizes.items() if size <= host_bytes), incomplete)


def _pools(incomplete: str) -> list[CompletionItem]:
    """The schemes, and behind them what each takes."""
    scheme, colon, rest = incomplete.partition(":")
    if not colon:
        ends = dict.fromkeys(pools.SCHEMES, ":") | dict.fromkeys(pools.SERVER_SCHEMES, "://")
        return [
            CompletionItem(f"{name}{ends[name]}", help=text)
            for name, text in (pools.SCHEMES | pools.SERVER_SCHEMES).items()
            if name.startswith(scheme)
        ]
    if scheme == "unix" and rest.startswith("//"):
        return [CompletionItem(f"unix://{item.value}") for item in _files(rest[2:] or "/")]
    if scheme not in pools.SCHEMES:
        return []
    known = _file_pools(rest) if scheme == "file" else [item.value for item in _sizes(rest)]
    return [CompletionItem(f"{scheme}:{word}") for word in known]


def _file_pools(rest: str) -> list[str]:
    """PATH or SIZE:PATH, the path from the root or from here."""
    size, colon, path = rest.partition(":")
    if not colon or "/" in size:
        size, colon, path = "", "", rest
    known = [item.value for item in _files(path)] if "/" in path else ["/", "./"]
    return [f"{size}{colon}{word}" for word in known]


def _filters(incomplete: str) -> list[CompletionItem]:
    """The names, and behind one its parameters that are not given yet."""
    name, colon, rest = incomplete.partition(":")
    if not colon:
        words = (f"{word}:" if keys else word for word, keys in filters.parameters().items())
        return _beginning(words, incomplete)
    *given, last = rest.split(",")
    if "=" in last:
        return []
    head = incomplete.removesuffix(last)
    taken = {pair.partition("=")[0] for pair in given}
    keys = [key for key in filters.parameters().get(name, ()) if key not in taken]
    return _beginning((f"{head}{key}=" for key in keys), incomplete)


def _files(incomplete: str) -> list[CompletionItem]:
    """Files and folders, for words that hold more than a path."""
    folder, name = os.path.split(incomplete)
    try:
        with os.scandir(folder or os.curdir) as entries:
            found = sorted(
                os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "")
                for entry, _ in zip(entries, range(_ENTRIES_MAX), strict=False)
                if entry.name.startswith(name)
                and entry.name.startswith(".") <= name.startswith(".")
            )
    except OSError:
        return []
    return [CompletionItem(path) for path in found]
