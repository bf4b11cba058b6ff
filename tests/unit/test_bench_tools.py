"""The parts of tools/ that turn measurements into text, and kernel files into numbers.

What a benchmark prints is believed, so a wrong median or a ratio the wrong way round is worse than
no benchmark.  Nothing is measured here and nothing is set up: answers are known in advance.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
# The tools are scripts beside each other, not a package: they find each other the same way.
sys.path.insert(0, str(TOOLS))

import bench  # noqa: E402
import bench_report as report  # noqa: E402
import bench_swap as swap  # noqa: E402
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


def test_percent_more() -> None:
    assert report.percent_more(report.summarise([101.0]), report.summarise([100.0])) == "+1.00 %"
    assert report.percent_more(report.summarise([98.0]), report.summarise([100.0])) == "-2.00 %"


def test_table_lines_up() -> None:
    lines = report.markdown_table(["a", "long"], [["xyz", "1"], ["b", "12345"]]).splitlines()
    assert lines == ["| a   |  long |", "| --- | ----: |", "| xyz |     1 |", "| b   | 12345 |"]


def test_table_refuses_a_short_row() -> None:
    with pytest.raises(ValueError, match="1 cells under a header of 2"):
        report.markdown_table(["a", "b"], [["x"]])


def test_grid_tables_show_times_ratios_and_gaps() -> None:
    cells = {
        ("everything local", "p"): report.summarise([100.0]),
        ("farmem run", "p"): report.summarise([3000.0]),
        ("zram", "p"): report.summarise([12000.0]),
    }
    text = report.grid_tables(["p"], ["everything local", "farmem run", "loop", "zram"], cells)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["farmem run", "3.00 (3.00-3.00)"] in rows
    assert ["loop", "-"] in rows
    assert ["farmem run / zram", "0.250x"] in rows
    assert ["farmem run / everything local", "30.0x"] in rows
    assert ["farmem run / loop", "-"] in rows


def test_grid_tables_without_farmem_claim_nothing_of_it() -> None:
    cells = {("everything local", "p"): report.summarise([100.0])}
    assert "farmem" not in report.grid_tables(["p"], ["everything local"], cells)


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


def test_measures_alternate_and_the_warm_up_is_not_counted() -> None:
    order: list[str] = []

    def measure(name: str) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return float(len(order))

        return run

    samples = bench.alternate({"a": measure("a"), "b": measure("b")}, 2, "test")
    assert order == ["a", "b"] * 3
    assert samples == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_wrong_sizes_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--local-percent", "100"])
    with pytest.raises(SystemExit) as ended:
        bench.parse_arguments()
    assert ended.value.code == 2
    assert "between 1 and 99" in capsys.readouterr().err


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
    program = bench.build_grid(tmp_path)
    for pattern in bench.PATTERNS:
        done = subprocess.run(
            [str(program), pattern, "8"], capture_output=True, text=True, check=True
        )
        assert report.parse_grid(done.stdout).accesses == 2048
    wrong = subprocess.run([str(program), "zigzag", "8"], capture_output=True, check=False)
    assert wrong.returncode == 2 and b"sequential-read" in wrong.stderr
