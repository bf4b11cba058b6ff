"""The parts of `make bench` that decide what counts as a figure, with answers known in advance.

A run that read wrong bytes, that never paged or that held more than it was given must never become
a figure, and a stop must never tear a set-up in two: those are the promises here.  Real runs are in
test_bench_real.py.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
# The tools are scripts beside each other, not a package: they find each other the same way.
sys.path.insert(0, str(TOOLS))

import bench  # noqa: E402
import bench_fits as fits  # noqa: E402
import bench_machine as machine  # noqa: E402
import bench_place as place  # noqa: E402
import bench_redis as redis  # noqa: E402
import bench_run as run  # noqa: E402
import bench_state as state  # noqa: E402
import bench_swap as swap  # noqa: E402
import bench_text as text  # noqa: E402
import bench_work as work  # noqa: E402
from bench_report import Metric  # noqa: E402

MIB = 1 << 20
STATS = {
    "pages_lost": 0,
    "store_errors": 0,
    "processes": 2,
    "processes_adopted": 1,
    "pages_evicted": 100,
    "pages_fetched": 90,
    "budget_bytes": 32 * MIB,
    "peak_local_bytes": 40 * MIB,
}


# What counts.


def test_counters_are_read_from_statistics() -> None:
    counts = place.read_farmem_stats(STATS)
    assert (counts.pages_out, counts.pages_in, counts.peak_local_bytes) == (100, 90, 40 * MIB)
    with pytest.raises(run.Failed, match="2 processes, 1 taken over"):
        counts.must_have_paged(10_000)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"pages_lost": 1}, "1 pages_lost"),
        ({"store_errors": 2}, "2 store_errors"),
        ({"peak_local_bytes": 49 * MIB}, "over budget: farmem held 49 MiB of 32 MiB"),
    ],
)
def test_a_run_that_lost_or_held_too_much_does_not_count(change: dict[str, int], why: str) -> None:
    with pytest.raises(run.Failed, match=why):
        place.read_farmem_stats({**STATS, **change})


def test_a_run_that_did_not_page_does_not_count() -> None:
    place.Counts(5000, 1000).must_have_paged(10_000)
    place.Counts(0, 0).must_have_paged(place.SHORT_PAGES_MIN - 1)
    for counts in (place.Counts(4999, 1000), place.Counts(5000, 999)):
        with pytest.raises(run.Failed, match="10000 pages did not fit"):
            counts.must_have_paged(10_000)


def test_numpys_report_is_read_and_wrong_elements_do_not_count() -> None:
    good = {"times_ns": {"sum": 5}, "bad": 0}
    assert work.parse_numpy(json.dumps(good), ["sum"]) == {"sum": 5.0}
    with pytest.raises(run.Failed, match="wrong bytes: 2 elements"):
        work.parse_numpy(json.dumps({**good, "bad": 2}), ["sum"])
    for broken in ("", "[]", json.dumps({"bad": 0}), json.dumps({"times_ns": {}, "bad": 0})):
        with pytest.raises(run.Failed, match="not a report"):
            work.parse_numpy(broken, ["sum"])


def test_redis_benchmarks_rate_is_read() -> None:
    head = '"test","rps","avg_latency_ms"\n'
    assert redis.parse_rate(head + '"GET","41520.88","0.4"\n') == 41520.88
    for broken in ("", head, "Could not connect", head + '"GET","1"\n' * 2):
        with pytest.raises(run.Failed, match="not a report of redis-benchmark"):
            redis.parse_rate(broken)


class KeptValues:
    """What a server would answer to MGET."""

    def __init__(self, values: dict[bytes, bytes | None]) -> None:
        self._values = values

    def ask(self, *words: bytes) -> list[bytes | None]:
        assert words[0] == b"MGET"
        return [self._values[word] for word in words[1:]]


def test_every_key_of_redis_is_compared() -> None:
    keys, written = 1200, b"v" * redis.VALUE_BYTES
    values: dict[bytes, bytes | None] = {redis.key_of(i): redis.value_of(i) for i in range(keys)}
    server: Any = KeptValues(values)
    assert redis.count_rewritten(server, keys) == 0
    values[redis.key_of(3)] = values[redis.key_of(1100)] = written
    assert redis.count_rewritten(server, keys) == 2
    values[redis.key_of(700)] = redis.value_of(701)
    with pytest.raises(run.Failed, match="values that nobody wrote"):
        redis.count_rewritten(server, keys)
    for wrong in (None, b"", written[:-1]):
        values[redis.key_of(700)] = wrong
        with pytest.raises(run.Failed, match="wrong bytes under key:000000000700"):
            redis.count_rewritten(server, keys)


def test_sorted_lines_are_known_before_sort_runs(tmp_path: Path) -> None:
    digest = work.write_lines(tmp_path / "lines", 50)
    done = run.Child(["sort", str(tmp_path / "lines")], {"LC_ALL": "C"})
    with done as child:
        assert child.wait(30).good("sort").digest == digest
    with run.Child(["cat", str(tmp_path / "lines")]) as child:
        assert child.wait(30).good("cat").digest != digest


# The books.


class FakeWork(work.Workload):
    name = "fake"
    title = "fake"
    metrics = (Metric("x", "x", "s", 1.0),)

    def __init__(self, outcome: float | Exception) -> None:
        self._outcome = outcome

    def run(self, _place: place.Place) -> dict[str, float]:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return {"x": self._outcome}


def local_systems() -> place.Systems:
    return place.prepare_systems([], None, 0, bench.contextlib.ExitStack())


@pytest.mark.parametrize(
    "error", [run.Failed("wrong bytes"), ConnectionResetError("gone"), ValueError("bad")]
)
def test_a_failed_run_is_kept_as_a_failure_and_gives_no_figure(error: Exception) -> None:
    books = state.Bench(state.QUICK)
    books.need_bytes["fake"] = MIB
    books.measure(FakeWork(2.0), 0, place.LOCAL, local_systems(), 1)
    books.measure(FakeWork(error), 0, place.LOCAL, local_systems(), 2)
    assert [list(v) for v in books.results.samples.values()] == [[2.0]]
    assert [list(v) for v in books.results.failures.values()] == [[str(error)]]
    assert books.failed_runs() == 1 and books.runs[1]["failed"] == str(error)


def test_systems_take_turns_and_a_round_too_many_is_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[tuple[int, str, int]] = []
    books = state.Bench(state.replace(state.FULL, levels=[50], rounds=3, minutes=1.0))
    books.workloads = [FakeWork(1.0)]
    clock = iter([0.0, 20.0, 20.0, 20.0, 55.0, 55.0, 55.0, 56.0])
    monkeypatch.setattr(books, "elapsed", lambda: next(clock))

    def measure(_work: object, level: int, name: str, _systems: object, turn: int) -> None:
        order.append((turn, name, level))

    monkeypatch.setattr(books, "measure", measure)
    systems = place.Systems(dict.fromkeys((place.LOCAL, *state.SYSTEMS), lambda _: None), {})  # type: ignore[arg-type]
    bench.run_rounds(books, systems, SimpleNamespace(look=lambda: None))  # type: ignore[arg-type]
    names = [[name for turn, name, _ in order if turn == t] for t in (1, 2, 3)]
    assert names[0] == ["everything local", "zram", "loop", "farmem"]
    assert names[1] == ["everything local", "loop", "farmem", "zram"]
    assert names[2] == [] and books.rounds_done == 2


def test_pairs_are_added_until_the_median_is_known() -> None:
    order: list[str] = []

    def measure(name: str, value: float) -> float:
        order.append(name)
        return value

    pairs = fits.measure_pairs(
        lambda: measure("a", 100.0), lambda: measure("b", 101.0), seconds=60.0, least=2
    )
    assert order[:6] == ["a", "b", "a", "b", "b", "a"], "a warm-up, then in turn"
    assert set(pairs) == {(100.0, 101.0)} and len(pairs) == 6, "the fewest of 95 %"
    noisy = iter(range(1, 10_000))
    pairs = fits.measure_pairs(lambda: 100.0, lambda: 90.0 + next(noisy) % 20, seconds=60.0)
    assert len(pairs) > fits.PAIRS_MIN


def test_a_full_run_is_estimated_and_a_part_takes_less() -> None:
    whole = state.FULL.estimate_seconds()
    assert state.replace(state.FULL, levels=[50]).estimate_seconds() < whole
    assert state.replace(state.FULL, parts=["sort"]).estimate_seconds() < whole
    assert state.QUICK.estimate_seconds() < whole / 10


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--only", "grid,disk"], "no 'disk' among the parts: choose from start"),
        (["--systems", "nbd"], "no 'nbd' among the systems"),
        (["--levels", "0,50"], "between 1 and 100"),
        (["--levels", "101"], "between 1 and 100"),
        (["--rounds", "0"], "at least 1"),
        (["--mib", "32"], "at least 64"),
        (["--mib", "150", "--levels", "10"], "minimum of 16 MiB: raise --mib"),
        (["--docs", "--only", "grid"], "--docs is for whole runs"),
        (["--docs", "--quick"], "--docs is for whole runs"),
    ],
)
def test_wrong_options_are_refused_with_what_to_type(
    words: list[str],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit) as ended:
        bench.parse_arguments()
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


def test_options_choose_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--quick", "--only", "grid,sort", "--levels", "75,50", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    settings = bench.parse_arguments()
    assert (settings.parts, settings.levels, settings.rounds) == (["grid", "sort"], [75, 50], 2)
    assert (settings.mib, settings.systems, settings.docs) == (128, state.SYSTEMS, False)


# The kernel's files.


def test_cgroups_of_both_versions_are_found(tmp_path: Path) -> None:
    with pytest.raises(swap.Unavailable, match="no memory cgroup"):
        swap.group_files(tmp_path)
    (tmp_path / "cgroup.controllers").write_text("cpu io memory pids\n")
    assert swap.group_files(tmp_path).limit == "memory.max"
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("0")
    assert swap.group_files(tmp_path).limit == "memory.limit_in_bytes"
    (tmp_path / "memory" / "memory.limit_in_bytes").unlink()
    (tmp_path / "cgroup.controllers").write_text("cpu io pids\n")
    with pytest.raises(swap.Unavailable, match="no memory cgroup"):
        swap.group_files(tmp_path)


def test_the_controller_is_handed_down_and_taken_back(tmp_path: Path) -> None:
    control = tmp_path / "cgroup.subtree_control"
    files = swap.GroupFiles(2, tmp_path, "memory.max", "memory.peak", "memory.events")
    control.write_text("cpu memory\n")
    with swap.memory_for_children(files):
        assert control.read_text() == "cpu memory\n"
    control.write_text("cpu\n")
    with swap.memory_for_children(files):
        assert control.read_text() == "+memory"
    assert control.read_text() == "-memory"


def test_counts_of_the_kernel_are_read() -> None:
    vmstat = "pgfault 7\npswpin 10\npswpout 20\n"
    assert swap.parse_vmstat(vmstat) == swap.SwapCount(20, 10)
    zeros = vmstat + "swpin_zero 1\nswpout_zero 2\n"
    assert swap.parse_vmstat(zeros).since(swap.SwapCount(5, 5)) == swap.SwapCount(17, 6)
    assert swap.parse_mm_stat("4096 100 8192 0 8192 0 0 0 0\n") == swap.ZramUse(4096, 8192)
    assert swap.parse_killed("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n") == 2
    assert swap.parse_killed("low 0\nmax 3\noom_kill 1\noom_group_kill 0\n") == 1


def test_processors_time_is_read() -> None:
    #                            user nice system idle iowait irq softirq steal guest guest_nice
    seen = machine.parse_stat("cpu  10 0 20 60 5 0 1 4 3 0\ncpu0 1 1 1\n")
    assert (seen.total, seen.idle, seen.steal) == (100, 65, 4)
    assert (seen.busy_percent(), seen.steal_percent()) == (35.0, 4.0)
    assert machine.Processors(0, 0, 0).busy_percent() == 0.0


def test_a_busy_machine_is_warned_of() -> None:
    assert machine.Noise(0.2, 2.0, 0.5, [1.0, 4.0]).warnings() == []
    found = "\n".join(machine.Noise(1.5, 2.0, 3.0, [1.0, 50.0]).warnings())
    assert "1.50 before it began" in found and "3.0 %" in found and "50 % at most" in found


# The report.


def test_the_report_says_first_what_speaks_against_it() -> None:
    books = state.Bench(state.QUICK)
    books.left_out.append("zram: zram is not in this kernel")
    books.failures.append("sort, everything local: it failed")
    page = text.report(books, {"kernel": "Linux 1"}, machine.Noise(9.0), "stopped by SIGINT")
    order = ["The machine was busy", "stopped by SIGINT", "A quick run", "kernel: Linux 1"]
    order += ["left out: zram", "failed: sort", "How it was measured"]
    places = [page.index(words) for words in order]
    assert places == sorted(places)


def test_a_quiet_whole_run_warns_of_nothing() -> None:
    page = text.report(state.Bench(state.FULL), {}, machine.Noise(0.1), "")
    assert "busy" not in page and "Not finished" not in page and "quick run" not in page


# Stopping.


def test_a_stop_is_noted_and_acted_upon_where_one_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    flag = run.StopFlag()
    monkeypatch.setattr(run, "STOP", flag)
    old = signal.signal(signal.SIGUSR1, flag._note)
    try:
        with pytest.raises(run.Stopped), run.Child(["sleep", "60"]) as child:
            pid = child.pid
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            child.wait(30)
        assert not Path(f"/proc/{pid}").exists(), "what was started is ended"
        with pytest.raises(run.Stopped):
            run.pause(0)
        with pytest.raises(run.Stopped), run.Child(["true"]):
            pass
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_a_program_is_stopped_when_its_time_is_up_and_its_failure_is_told() -> None:
    with pytest.raises(run.Failed, match="stopped after 0 s"), run.Child(["sleep", "60"]) as child:
        child.wait(0.05)
    with run.Child(["sh", "-c", "echo no such thing >&2; exit 3"]) as child:
        ended = child.wait(30)
    with pytest.raises(run.Failed, match="it failed: no such thing"):
        ended.good("it")


def test_one_benchmark_at_a_time() -> None:
    with (
        bench.contextlib.closing(bench.take_lock()),
        pytest.raises(swap.Unavailable, match="another benchmark runs"),
    ):
        bench.take_lock()
    bench.take_lock().close()
