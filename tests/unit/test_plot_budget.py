"""What tools/plot_budget.py makes of samples: figures and a picture, known in advance."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import plot_budget as plot

MIB = 1 << 20
LOCAL = ((0.0, 100), (1.0, 100), (1.5, 60), (2.0, 50), (2.5, 52), (3.0, 51), (4.0, 90))
SAMPLES = plot.Samples(
    local=[(at, mib * MIB) for at, mib in LOCAL],
    budget=[
        (at, mib * MIB) for at, mib in ((0.0, 120), (1.0, 120), (1.2, 50), (2.9, 50), (3.1, 120))
    ],
    remote=[(0.0, 0), (2.0, 50 * MIB), (4.0, 10 * MIB)],
)


def test_changes_are_found_with_the_time_they_took() -> None:
    lowered, raised = plot.changes_of(SAMPLES)
    assert (lowered.before_bytes, lowered.budget_bytes) == (120 * MIB, 50 * MIB)
    assert (lowered.bound_seconds, lowered.budget_seconds) == (0.5, 1.0)
    assert lowered.peak_bytes == 52 * MIB
    assert (raised.seconds, raised.peak_bytes) == (2.9, 90 * MIB)
    assert raised.bound_seconds is not None and abs(raised.bound_seconds - 0.1) < 1e-9
    lines = plot.table([lowered, raised]).splitlines()
    assert "120 -> 50 MiB" in lines[-2] and "500 ms" in lines[-2] and "1000 ms" in lines[-2]
    assert "50 -> 120 MiB" in lines[-1] and "(raised)" in lines[-1]


def test_a_budget_that_is_never_met_is_said_to_be() -> None:
    samples = plot.Samples([(0.0, 99 * MIB), (2.0, 99 * MIB)], [(0.0, 99 * MIB), (1.0, MIB)], [])
    [change] = plot.changes_of(samples)
    assert change.bound_seconds is None
    assert "never" in plot.table([change])


def test_a_line_is_the_same_without_what_lies_between_equals() -> None:
    points = [(0.0, 1), (1.0, 1), (2.0, 1), (3.0, 2), (4.0, 2), (5.0, 2), (6.0, 1)]
    assert plot.thinned(points) == [(0.0, 1), (2.0, 1), (3.0, 2), (5.0, 2), (6.0, 1)]
    assert plot.thinned(points[:1]) == points[:1]
    assert plot.thinned(points[:2]) == points[:2]


def test_the_picture_has_a_line_for_each_figure_where_it_belongs() -> None:
    root = ElementTree.fromstring(plot.svg_of(SAMPLES, "a title"))
    space = "{http://www.w3.org/2000/svg}"
    lines = root.findall(f"{space}polyline")
    assert len(lines) == 4
    text = "".join(root.itertext())
    assert "a title" in text and "budget + 16 MiB" in text
    first, *_, last = lines[-1].attrib["points"].split()
    left, top = (float(number) for number in first.split(","))
    right, _ = (float(number) for number in last.split(","))
    assert (left, right) == (plot.LEFT, plot.WIDTH - plot.RIGHT)
    share = (plot.HEIGHT - plot.BOTTOM - top) / (plot.HEIGHT - plot.TOP - plot.BOTTOM)
    assert abs(share - 100 / 136) < 0.001  # 100 MiB of the highest, which is budget + 16 MiB
