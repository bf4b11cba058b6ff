"""The RDMA part of `make bench-net`: a page read by farmem, beside what perftest reads.

In a guest with a Soft-RoCE device (tools/guest.sh --rdma), because nothing more is needed there
than software.  Everything is emulated there and many times slower than on a real device: only
ratios of one boot mean anything.  Taken in turn, so that a slow moment falls on all alike:

1. one page: random pages of a farmem.Region in a `farmem serve`, one after the other, against
   `ib_read_lat -s 4096`.  A *fetch* is what the pool's filter `stats` sees: from the backend's
   submit, by way of the agent and the device, until the page's bytes are there.  A *fault* is what
   the program waits: the fetch, and what the kernel and the engine do to notice the touch and to
   put the page in its place.  `ib_read_lat` reads in the thread that wants to know, so nobody is
   woken; a fetch wakes the agent, and the agent the engine.  What two wakes cost there a bare TCP
   ping-pong of the same bytes tells (`net ping`);
2. windows of 32 pages, many under way: Region.willneed() against `ib_read_bw -s 131072`.

With --inside it is the program that runs in the guest: a line of JSON for each figure.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_machine import NoiseMeter, describe
from bench_report import Summary, markdown_table, ratio, summarise, with_spread
from bench_run import Child, Failed, Stopped
from bench_windows import page_ns

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "bench-rdma.md"
FARMEM = Path(sys.executable).with_name("farmem")
SUITE = "bookworm"
MIB = 1 << 20
PAGE_BYTES = 4096
WINDOW_BYTES = 32 * PAGE_BYTES
REGION_BYTES, BROUGHT_BYTES = 32 * MIB, 16 * MIB
LOCAL_BYTES = 24 * MIB
TOUCHES, PINGS = 400, 400
READS, WINDOWS = 1000, 200
SETUP_S, START_S = 300.0, 120.0
BOOT_S, ROUND_S = 300, 120
PERFTEST_PORT = 18515

READ, PING = "ib_read_lat", "bare TCP ping-pong"
FETCH, FAULT = "farmem, fetch", "farmem, whole fault"
READS_AT_ONCE, BROUGHT = "ib_read_bw", "farmem, Region.willneed()"
SLEEPS = "agent's sleeps per fetch"
# What each figure is held against.
BARE = {PING: READ, FETCH: READ, FAULT: READ, BROUGHT: READS_AT_ONCE}

Samples = dict[str, list[float]]


# ---- inside the guest


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[int]:
    """The port of a server that lends by RDMA."""
    command = [str(FARMEM), "serve", "--capacity", "128M", "--listen", "127.0.0.1:0"]
    log = folder / "log"
    with (
        log.open("wb") as out,
        subprocess.Popen(
            [*command, "--rdma", "require", "--drain-timeout", "0s"], stdout=out, stderr=out
        ) as process,
    ):
        try:
            end = time.monotonic() + START_S
            while not (found := re.search(r"tcp://127\.0\.0\.1:(\d+)", log.read_text())):
                if process.poll() is not None or time.monotonic() > end:
                    raise Failed(f"the server does not start: {log.read_text()}")
                time.sleep(0.05)
            yield int(found[1])
        finally:
            process.terminate()
            process.wait(START_S)


def perftest(program: str, *options: str) -> list[float]:
    """The figures of its last line."""
    command = [program, "-d", "rxe0", "-x", "1", "-F", "-p", str(PERFTEST_PORT), *options]
    with Child(command) as server:
        end = time.monotonic() + START_S
        while not _is_listening(PERFTEST_PORT):
            if not server.is_running() or time.monotonic() > end:
                server.wait(0.1).good(program)
                raise Failed(f"{program} does not listen")
            time.sleep(0.05)
        with Child([*command, "127.0.0.1"]) as client:
            text = client.wait(ROUND_S).good(program).stdout.decode()
        server.wait(START_S).good(program)
    figures = re.findall(r"^ (\d+(?:\s+[\d.]+)+)\s*$", text, re.MULTILINE)
    if not figures:
        raise Failed(f"{program} says nothing of use: {text[-500:]}")
    return [float(word) for word in figures[-1].split()]


def _is_listening(port: int) -> bool:
    rows = "".join(Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6"))
    return re.search(rf":{port:04X} [0-9A-F]+:0000 0A ", rows) is not None


def switches_of_agent() -> int:
    """How often the agent has slept so far."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "comm").read_text().strip() == "farmem-rdma":
                found = re.search(
                    r"^voluntary_ctxt_switches:\s+(\d+)", (entry / "status").read_text(), re.M
                )
                return int(found[1]) if found else 0
    raise Failed("there is no agent")


def tell(who: str, value: float) -> None:
    print(json.dumps({"who": who, "value": value}), flush=True)


def touch(region: Any, view: memoryview, source: random.Random) -> None:
    """Random pages, all of which are in the pool, one after the other."""
    region.evict()
    pages = source.sample(range(REGION_BYTES // PAGE_BYTES), TOUCHES)
    before, slept = region.budget.stats().counters, switches_of_agent()
    begin_ns, wrong = time.monotonic_ns(), 0
    for page in pages:
        wrong += view[page * PAGE_BYTES] != page % 251 + 1
    taken_ns = time.monotonic_ns() - begin_ns
    after = region.budget.stats().counters
    count = {name: after[name] - before[name] for name in after}
    if wrong or not count["pages_fetched"] == count["pool_fetches"] == TOUCHES:
        raise Failed(f"{wrong} wrong pages, and these counters: {count}")
    tell(FETCH, count["pool_fetch_ns"] / TOUCHES)
    tell(FAULT, taken_ns / TOUCHES)
    tell(SLEEPS, (switches_of_agent() - slept) / TOUCHES)


def inside(program: str, rounds: int) -> None:
    import bench_net  # which imports this file

    import farmem

    with (
        tempfile.TemporaryDirectory(prefix="farmem-bench-rdma-") as name,
        serve(Path(name)) as port,
        bench_net.bare_server(Path(program)) as ping_port,
    ):
        pool = f"rdma://127.0.0.1:{port}?size=64M"
        budget = farmem.Budget(LOCAL_BYTES, pool=pool, filters=["stats"], no_pinned_io=True)
        region = farmem.Region(REGION_BYTES, budget=budget)
        region.advise("random")
        view = region.view()
        for page in range(REGION_BYTES // PAGE_BYTES):
            view[page * PAGE_BYTES] = page % 251 + 1
        source = random.Random(1)
        for _ in range(rounds):
            pages = ["-s", str(PAGE_BYTES), "-n", str(READS)]
            tell(READ, perftest("ib_read_lat", *pages)[5] * 1000)
            ping = [program, "ping", ping_port, str(PAGE_BYTES), str(PINGS)]
            tell(PING, bench_net.run(ping)["ns"])
            touch(region, view, source)
            mib_per_s = perftest("ib_read_bw", "-s", str(WINDOW_BYTES), "-n", str(WINDOWS))[3]
            tell(READS_AT_ONCE, PAGE_BYTES * 1e9 / (mib_per_s * MIB))
            tell(BROUGHT, page_ns(region, BROUGHT_BYTES))


# ---- on the host


def measure(program: Path, rounds: int, noise: NoiseMeter) -> Samples:
    """Nanoseconds per page, by who needed them."""
    guest = [str(ROOT / "tools" / "guest.sh"), "--suite", SUITE, "--rdma"]
    with Child([*guest, "--setup"]) as child:
        child.wait(SETUP_S).good("guest.sh --setup")
    noise.look()
    limit_s = BOOT_S + rounds * 2 * ROUND_S
    command = [*guest, "--timeout", str(limit_s), "--", sys.executable, __file__, "--inside"]
    with Child([*command, str(program), str(rounds)]) as child:
        text = child.wait(limit_s + SETUP_S).good("the guest").stdout.decode()
    samples: Samples = {}
    for line in text.splitlines():
        found = json.loads(line)
        samples.setdefault(found["who"], []).append(found["value"])
    return samples


def report(samples: Samples, rounds: int, noise: NoiseMeter) -> str:
    table = {who: summarise(values) for who, values in samples.items()}
    rows = [
        _row(who, mine, table) for who, mine in table.items() if who in BARE or who in BARE.values()
    ]
    measured = noise.finish()
    facts = [f"{key}: {value}" for key, value in {**describe(), **measured.facts()}.items()]
    lines = [
        "# Pools by RDMA: figures",
        "",
        "Written by `make bench-net ARGS='--rdma --docs'`; how: tools/bench_rdma.py.",
        "Soft-RoCE in an emulated guest: of these figures ratios alone mean anything.",
        f"{rounds} rounds in turn in one boot, medians with the lowest and the highest. "
        "Server and program share two emulated processors.",
        "",
        *(f"**{warning}**" for warning in measured.warnings()),
        markdown_table(["", "µs per page", "rate", "time : perftest"], rows),
        "",
        f"- {with_spread(table[SLEEPS], 1.0)} times per fetch the agent slept and was woken",
        *(f"- {fact}" for fact in facts),
    ]
    return "\n".join(lines) + "\n"


def _row(who: str, mine: Summary, table: dict[str, Summary]) -> list[str]:
    what = "windows" if who in (READS_AT_ONCE, BROUGHT) else "one page"
    rate = f"{PAGE_BYTES * 1e9 / mine.median / MIB:.1f} MiB/s"
    bare = table[BARE.get(who, who)]
    return [f"{what}: {who}", with_spread(mine, 1000.0), rate, ratio(mine, bare)]


def run(program: Path, rounds: int, writes_docs: bool, noise: NoiseMeter) -> int:
    try:
        text = report(measure(program, rounds, noise), rounds, noise)
    except (Failed, Stopped) as error:
        print(f"bench-net: {error}", file=sys.stderr)
        return 1
    print(text)
    if writes_docs:
        DOCS.write_text(text)
    return 0


if __name__ == "__main__":
    assert os.environ.get("FARMEM_GUEST") and sys.argv[1:2] == ["--inside"], __doc__
    inside(sys.argv[2], int(sys.argv[3]))
