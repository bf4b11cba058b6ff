"""`make bench-net`: a page from a server on this host, beside the least that TCP can do.

Four questions, each answered by runs in turn, so that a slow moment falls on all alike:

1. one fetch: random reads of memory most of which is in the pool (`net touch random`); how long the
   engine waited for each page, from asking to having it (the filter `stats`), against a bare TCP
   ping-pong of the same bytes (`net ping`);
2. one fault: the same run as the program sees it, time per page that was fetched;
3. windows: pages brought without a fault, by Region.willneed() (bench_windows.py), against a bare
   TCP stream (`net stream`);
4. in order: a sequential read, which also faults and evicts, against the same.

The pool is a `farmem serve` of its own, over TCP and over a Unix socket; `mem:` stands beside them,
so that what the wire costs can be told from what a fault costs.  Nothing is left behind.
With --rdma the same is asked of RDMA, in a guest: see bench_rdma.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import bench_rdma
from bench_machine import NoiseMeter, describe
from bench_report import Summary, markdown_table, ratio, summarise, with_spread
from bench_run import STOP, Child, Failed, Stopped

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "bench-net.md"
FARMEM = Path(sys.executable).with_name("farmem")
MIB = 1 << 20
LIMIT_S = 300.0
LOCAL_PERCENT = 10
PAGE_BYTES = 4096
PINGS = 20_000
START_S = 20.0
PING, STREAM = "bare TCP ping-pong", "bare TCP stream"
FETCH, FAULT, WINDOWS, ORDER = "one fetch", "one fault", "windows", "in order"
POOLS = ("tcp", "unix", "mem")

Samples = dict[tuple[str, str], list[float]]


def build(folder: Path) -> Path:
    program = folder / "net"
    command = ["cc", "-O2", "-pthread", "-Wall", "-Wextra", "-Werror", "-o", str(program)]
    subprocess.run([*command, str(HERE / "net.c")], check=True)
    return program


@contextlib.contextmanager
def bare_server(program: Path) -> Iterator[str]:
    """The port of a bare server."""
    command = [str(program), "serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout.readline().decode().strip()
        assert process.stdin is not None
        process.stdin.close()


@contextlib.contextmanager
def serve(folder: Path, mib: int) -> Iterator[dict[str, str]]:
    """A server that lends enough, and the words for --pool by what it goes over."""
    path, log = folder / "pool", folder / "serve.log"
    command = [str(FARMEM), "serve", "--capacity", f"{mib}M", "--drain-timeout", "0s"]
    command += ["--listen", "127.0.0.1:0", "--listen", f"unix:{path}"]
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            end = time.monotonic() + START_S
            while not (found := re.search(r"tcp://127\.0\.0\.1:\d+", log.read_text())):
                if process.poll() is not None or time.monotonic() > end:
                    raise Failed(f"the server does not start: {log.read_text()}")
                time.sleep(0.05)
            yield {"tcp": found[0], "unix": f"unix://{path}", "mem": "mem:"}
        finally:
            process.terminate()
            process.wait(START_S)


def run(command: Sequence[str]) -> dict[str, float]:
    """What a program says in its one line of JSON."""
    with Child(list(command)) as child:
        text = child.wait(LIMIT_S).good(command[0]).stdout.decode()
    found = json.loads(text)
    assert isinstance(found, dict)
    return found


class Touched(NamedTuple):
    """Nanoseconds for each page that was fetched, and for each fetch (of one page or several)."""

    page_ns: float
    fetch_ns: float


def touch(program: Path, order: str, pool: str, mib: int, passes: int, folder: Path) -> Touched:
    stats = folder / "stats.json"
    stats.unlink(missing_ok=True)
    local = mib * MIB * LOCAL_PERCENT // 100
    command = [str(FARMEM), "run", "-q", "-m", str(local), "--pool", pool]
    command += ["--filter", "stats", "--stats", str(stats)]
    pages = mib * MIB // PAGE_BYTES
    found = run([*command, "--", str(program), "touch", order, str(mib), str(passes * pages)])
    end = time.monotonic() + START_S
    while not stats.exists():
        if time.monotonic() > end:
            raise Failed("no statistics were written")
        time.sleep(0.01)
    counted = json.loads(stats.read_text())
    fetched = counted["pages_fetched"]
    if fetched < passes * pages // 2:
        raise Failed(f"only {fetched} pages of {passes * pages} were fetched: not a measurement")
    return Touched(found["ns"] / fetched, counted["pool_fetch_ns"] / counted["pool_fetches"])


def measure(
    program: Path, urls: dict[str, str], given: argparse.Namespace, folder: Path, noise: NoiseMeter
) -> Samples:
    samples: Samples = {}

    def take(what: str, who: str, value: float) -> None:
        samples.setdefault((what, who), []).append(value)

    mib = given.mib
    with bare_server(program) as port:
        for _ in range(given.rounds):
            noise.look()
            ping = [str(program), "ping", port, str(PAGE_BYTES), str(PINGS)]
            ping_ns = run(ping)["ns"]
            take(FETCH, PING, ping_ns)
            take(FAULT, PING, ping_ns)
            stream = [str(program), "stream", port, str(mib * MIB * 4)]
            stream_ns = PAGE_BYTES * 1e9 / run(stream)["bytes_per_s"]
            take(WINDOWS, STREAM, stream_ns)
            take(ORDER, STREAM, stream_ns)
            for pool in POOLS:
                one = touch(program, "random", urls[pool], mib, 1, folder)
                take(FETCH, f"farmem, {pool}", one.fetch_ns)
                take(FAULT, f"farmem, {pool}", one.page_ns)
                many = touch(program, "sequential", urls[pool], mib, 3, folder)
                take(ORDER, f"farmem, {pool}", many.page_ns)
                bring = [sys.executable, str(HERE / "bench_windows.py"), urls[pool], str(mib)]
                take(WINDOWS, f"farmem, {pool}", run(bring)["ns"])
    return samples


def report(samples: Samples, mib: int, rounds: int, noise: NoiseMeter) -> str:
    rows = []
    for (what, who), values in samples.items():
        bare: Summary = summarise(samples[what, STREAM if what in (WINDOWS, ORDER) else PING])
        mine = summarise(values)
        rate = f"{PAGE_BYTES * 1e9 / mine.median / MIB:.0f} MiB/s"
        rows.append([f"{what}: {who}", with_spread(mine, 1000.0), rate, ratio(mine, bare)])
    table = markdown_table(
        ["", "µs per page", "rate", "time : bare TCP"], sorted(rows, reverse=True)
    )
    measured = noise.finish()
    facts = [f"{key}: {value}" for key, value in {**describe(), **measured.facts()}.items()]
    lines = [
        "# Pools over the network: figures",
        "",
        "Written by `make bench-net ARGS=--docs`; how: tools/bench_net.py and tools/net.c.",
        f"{mib} MiB with {LOCAL_PERCENT} % local, every page checked; {rounds} rounds in turn, "
        "medians with the lowest and the highest. Server and program share this host's processors.",
        "",
        *(f"**{warning}**" for warning in measured.warnings()),
        table,
        "",
        *(f"- {fact}" for fact in facts),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench-net", description="See tools/bench_net.py")
    parser.add_argument("--mib", type=int, default=256, help="memory of the program (default 256)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--docs", action="store_true", help="write docs/bench-net.md as well")
    parser.add_argument("--rdma", action="store_true", help="RDMA instead of TCP, in a guest")
    given = parser.parse_args()
    if given.mib < 200 or given.rounds < 1:
        parser.error(
            "give --mib of at least 200 (less than 20 MiB local is too little) and a round"
        )
    STOP.install()
    noise = NoiseMeter()
    if given.rdma:
        with tempfile.TemporaryDirectory(prefix="farmem-bench-net-") as name:
            return bench_rdma.run(build(Path(name)), given.rounds, given.docs, noise)
    try:
        with tempfile.TemporaryDirectory(prefix="farmem-bench-net-") as name:
            folder = Path(name)
            program = build(folder)
            with serve(folder, 2 * given.mib) as urls:
                samples = measure(program, urls, given, folder, noise)
    except (Failed, Stopped) as error:
        print(f"bench-net: {error}", file=sys.stderr)
        return 1
    text = report(samples, given.mib, given.rounds, noise)
    print(text)
    if given.docs:
        DOCS.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
