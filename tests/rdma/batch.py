"""Runs in the guest: every case in turn, one JSON object per line as each ends.

A case that fails says why; the host (test_soft_roce.py) shows it.  Names of cases as arguments
choose some.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

from tests.pools.serving import Server, serving
from tests.rdma import run, serve
from tests.rdma.cases import CASES, REQUIRED

assert serve.case is run.case  # both have put theirs into CASES


@contextlib.contextmanager
def told(name: str) -> Iterator[dict[str, Any]]:
    """The line of a case."""
    found: dict[str, Any] = {"name": name}
    begin = time.monotonic()
    try:
        yield found
    except BaseException:
        found["failed"] = traceback.format_exc()
    found["seconds"] = round(time.monotonic() - begin, 1)
    print(json.dumps(found), flush=True)


def main(names: list[str]) -> None:
    wanted = [name for name in CASES if not names or name in names]
    with contextlib.ExitStack() as stack:
        shared: list[Server] = []
        for name in wanted:
            with told(name) as found:
                arguments: list[Server] = []
                if "server" in CASES[name].__annotations__:
                    if not shared:
                        shared.append(
                            stack.enter_context(serving(*REQUIRED, capacity=run.CAPACITY))
                        )
                    arguments = shared
                found.update(CASES[name](*arguments) or {})
    with told("everything"):
        pass


main(sys.argv[1:])
