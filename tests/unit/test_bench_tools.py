"""The parts of tools/ that turn measurements into text, and kernel files into numbers.

What a benchmark prints is believed, so a wrong median or a ratio the wrong way round is worse than
no benchmark.  Nothing is measured here and nothing is set up: answers are known in advance.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
# The tools are scripts beside each other, not a package: they find each other the same way.
sys.path.insert(0, str(TOOLS))

import bench_report as report  # noqa: E402
import bench_swap as swap  # noqa: E402
import bench_work as work  # noqa: E402
import demo  # noqa: E402
import demo_watch  # noqa: E402

GOOD = {"pattern": "random-read", "accesses": 4, "fill_ns": 10, "timed_ns": 20, "bad": 0}


def test_summary_is_median_and_extremes() -> None:
    assert report.summarise([5.0, 1.0, 9.0]) == report.Summary(5.0, 1.0, 9.0, 3)
    assert report.summarise([1.0, 2.0]).median == 1.5


def test_no_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        report.summarise([])


def test_grid_line_is_read() -> None:
    run = report.parse_grid(json.dumps(GOOD))
    assert (run.pattern, run.accesses, run.access_ns) == ("random-read", 4, 5.0)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a report"),
        ("[]", "not a report"),
        ('{"pattern": "x"}', "not a report"),
        (json.dumps({**GOOD, "bad": 3}), "3 wrong pages"),
        (json.dumps({**GOOD, "accesses": 0}), "0 accesses"),
    ],
)
def test_grid_line_that_is_no_clean_run_is_an_error(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        report.parse_grid(text)


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1234")]
)
def test_numbers_have_three_figures(value: float, text: str) -> None:
    assert report.number(value) == text


def test_ratios_say_how_many_times_the_second_fits_in_the_first() -> None:
    slow, fast = report.summarise([20.0]), report.summarise([5.0])
    assert report.ratio(slow, fast) == "4.00x"
    assert report.ratio(fast, slow) == "0.250x"
    assert report.ratio(None, slow) == "-"
    assert report.ratio(slow, report.summarise([0.0])) == "-"


def test_table_lines_up() -> None:
    lines = report.markdown_table(["a", "long"], [["xyz", "1"], ["b", "12345"]]).splitlines()
    assert lines == ["| a   |  long |", "| --- | ----: |", "| xyz |     1 |", "| b   | 12345 |"]


def test_table_refuses_a_short_row() -> None:
    with pytest.raises(ValueError, match="1 cells under a header of 2"):
        report.markdown_table(["a", "b"], [["x"]])


def test_quartiles_enclose_the_middle_half() -> None:
    assert report.middle_half([1.0, 2.0, 3.0, 4.0, 100.0]) == report.Summary(3.0, 2.0, 4.0, 5)
    assert report.middle_half([7.0]) == report.Summary(7.0, 7.0, 7.0, 1)


@pytest.mark.parametrize(
    ("count", "low", "high", "confidence"),
    # From tables of the sign test: ranks 2 and 9 of 10, 6 and 15 of 20, 14 and 27 of 40.
    [(10, 2, 9, 0.9785), (20, 6, 15, 0.9586), (40, 14, 27, 0.9615)],
)
def test_a_median_lies_between_the_ranks_of_the_sign_test(
    count: int, low: int, high: int, confidence: float
) -> None:
    interval = report.median_interval([float(i) for i in range(count, 0, -1)])
    assert (interval.low, interval.high) == (low, high)
    assert interval.confidence == pytest.approx(confidence, abs=1e-4)


def test_few_samples_admit_that_they_are_few() -> None:
    interval = report.median_interval([1.0, 2.0, 3.0])
    assert (interval.low, interval.high, interval.confidence) == (1.0, 3.0, 0.75)
    assert report.median_interval([4.0]).confidence == 0.0
    assert "not decided" in report.verdict(interval, 100.0)


def test_a_verdict_needs_the_whole_interval() -> None:
    interval = report.Interval(2.0, 1.0, 3.0, 0.96)
    assert report.verdict(interval, 3.0) == "met"
    assert report.verdict(interval, 0.9) == "missed"
    assert "not decided" in report.verdict(interval, 2.5)


def test_ratios_are_of_times_for_rates_too() -> None:
    slow, fast = report.summarise([10.0]), report.summarise([40.0])
    assert report.time_ratio(slow, fast, more_is_better=False) == "0.250x"
    assert report.time_ratio(slow, fast, more_is_better=True) == "4.00x"
    assert report.time_ratio(None, fast, more_is_better=True) == "-"


TIME = report.Metric("p", "pattern", "us", 1000.0)
RATE = report.Metric("get", "GET", "requests/s", 1.0, more_is_better=True)
METRICS = [("grid p/p", TIME), ("redis/get", RATE)]


def some_results() -> report.Results:
    results = report.Results()
    for metric, level, system, values in [
        ("grid p/p", 0, "everything local", [100.0]),
        ("grid p/p", 50, "farmem", [3000.0, 4000.0, 2000.0]),
        ("grid p/p", 50, "zram", [12000.0]),
        ("redis/get", 50, "farmem", [500.0]),
        ("redis/get", 50, "zram", [250.0]),
    ]:
        results.samples[report.Key(metric, level, system)] = values
    results.failures[report.Key("grid p/p", 50, "zram")] = ["it was killed", "it was killed"]
    results.failures[report.Key("redis/get", 50, "loop")] = ["redis: wrong bytes"]
    return results


def cells_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_a_workloads_table_shows_figures_failures_and_gaps() -> None:
    systems = ["everything local", "farmem", "zram", "loop"]
    table = report.workload_table(some_results(), METRICS, [50], systems, systems[0], "farmem")
    rows = cells_of(table)
    assert rows[0][2:] == [*systems, "farmem : zram", "farmem : loop"]
    assert rows[2] == [
        "pattern, us", "50 %", "0.100 (0.100-0.100)", "3.00 (2.00-4.00)",
        "12.0 (12.0-12.0), 2 of 3 failed", "-", "0.250x", "-",
    ]  # fmt: skip
    assert rows[3][2:] == ["-", "500 (500-500)", "250 (250-250)", "failed (1 of 1)", "0.500x", "-"]


def test_without_farmem_nothing_is_claimed_of_it() -> None:
    systems = ["everything local", "zram"]
    table = report.workload_table(some_results(), METRICS, [50], systems, systems[0], "farmem")
    assert "farmem" not in table


def test_the_overview_has_a_row_for_each_metric() -> None:
    rows = cells_of(report.overview_table(some_results(), METRICS, [50, 25], "farmem", "zram"))
    assert rows[0] == ["farmem : zram", "50 % local", "25 % local"]
    assert rows[2:] == [["grid: pattern", "0.250x", "-"], ["redis: GET", "0.500x", "-"]]


def test_reasons_for_failures_are_told_once() -> None:
    assert report.failure_lines(some_results()) == [
        "- grid p, zram, 50 % local: it was killed (2 times)",
        "- redis, loop, 50 % local: redis: wrong bytes",
    ]


def test_lz4_is_a_word_of_its_own() -> None:
    assert swap.lz4_listed("lzo-rle lzo [lz4]\n")
    assert not swap.lz4_listed("[lzo-rle] lzo lz4hc\n")


def test_a_failing_tool_is_quoted() -> None:
    with pytest.raises(swap.Unavailable, match="failed: no such"):
        swap.run_tool("sh", "-c", "echo no such thing >&2; exit 3")
    with pytest.raises(swap.Unavailable, match="not-a-command is not installed"):
        swap.run_tool("not-a-command")


def test_without_root_swap_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(swap.Unavailable, match="root"), swap.zram_device(1 << 20):
        pass
    with pytest.raises(swap.Unavailable, match="root"), swap.loop_device(1 << 20):
        pass


def test_anonymous_memory_is_read_from_a_status() -> None:
    assert demo_watch.parse_anonymous("VmRSS:\t 9 kB\nRssAnon:\t    1234 kB\n") == 1234 * 1024
    assert demo_watch.parse_anonymous("Name:\tkthreadd\n") == 0


def make_run(output: str, evicted: int = 5, fetched: int = 5) -> demo.Run:
    return demo.Run("farmem", output, 1.0, 1 << 20, evicted, fetched)


def test_demo_accepts_equal_outputs_and_shows_them() -> None:
    runs = [make_run("x", 0, 0), make_run("x")]
    demo.judge(runs)
    assert "the same" in demo.table(runs)


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (make_run("y"), "output differs"),
        (make_run("x", evicted=0), "nothing was shown"),
        (make_run("x", fetched=0), "nothing was shown"),
    ],
)
def test_demo_fails_when_it_would_be_a_lie(second: demo.Run, why: str) -> None:
    with pytest.raises(demo.DemoError, match=why):
        demo.judge([make_run("x", 0, 0), second])


def test_grid_verifies_what_it_reads_and_writes(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed: run tools/setup.sh build")
    program = work.build_grid(tmp_path)
    for pattern in work.PATTERNS:
        done = subprocess.run(
            [str(program), pattern, "8"], capture_output=True, text=True, check=True
        )
        assert report.parse_grid(done.stdout).accesses == 2048
    wrong = subprocess.run([str(program), "zigzag", "8"], capture_output=True, check=False)
    assert wrong.returncode == 2 and b"sequential-read" in wrong.stderr
