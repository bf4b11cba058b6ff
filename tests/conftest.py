"""What a test needs from the machine, and what a skip means.

The markers `root`, `uffd` and `move` skip a test, with the reason, where the machine
does not give what it needs.  In CI (CI=true) the machine is ours: a skip there is a
failure, so that no promise goes untested without anybody noticing.
"""

import os
import signal
from collections.abc import Generator
from functools import cache

import pytest

from farmem import _native

# The configuration of whoever runs the tests has no say in them.
os.environ["FARMEM_CONFIG"] = os.devnull
# A shell's background job ignores Ctrl-C, and what it starts inherits that; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
IN_CI = os.environ.get("CI") == "true"


@cache
def userfaultfd_probe() -> tuple[bool, bool]:
    """Whether a full userfaultfd can be had, and whether it can MOVE."""
    probe = _native.ffi.new("struct fm_probe *")
    _native.lib.fm_probe_userfaultfd(probe)
    has_full = probe.way != _native.lib.FM_UFFD_NONE
    return has_full, has_full and bool(probe.features & _native.lib.FM_PROBE_FEATURE_MOVE)


def _missing(item: pytest.Item) -> str:
    has_full, has_move = userfaultfd_probe()
    if item.get_closest_marker("root") and os.geteuid() != 0:
        return "needs to be root"
    if item.get_closest_marker("uffd") and not has_full:
        return "needs a userfaultfd that sees kernel faults (vm.unprivileged_userfaultfd=1)"
    if item.get_closest_marker("move") and not has_move:
        return "needs UFFDIO_MOVE (Linux 6.8)"
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what can't be tested here."""
    reason = _missing(item)
    if reason:
        pytest.skip(reason)


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where nothing may be: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skipped test fails in CI."""
    report = yield
    _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A skipped module fails in CI."""
    report = yield
    _forbid_skip(report)
    return report
