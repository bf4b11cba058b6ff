"""Pages that a device, io_uring or another process writes to behind the page table's back.

Such a page is pinned: its frame is being written by somebody who doesn't go through the
program's mapping. Evicting it by copying and dropping loses what is written afterwards.
UFFDIO_MOVE refuses pinned pages, so they must stay. The defect `copy_pinned` takes the
refusal for a reason to copy; a page that is pinned at the time of the drop the kernel does
not take even so, so the defect `drop_by_address` goes with it. The programs hold old bytes
that differ from the new ones, so that a lost write can't look right by chance.
"""

from __future__ import annotations

import pytest

from tests.harness import (
    assert_defect_noticed,
    assert_ok,
    assert_paged,
    compile_c,
    free_space_folder,
    run_farmem,
)

pytestmark = [pytest.mark.safety, pytest.mark.uffd, pytest.mark.move]
LOCAL = "32M"
DEFECTS = "copy_pinned,drop_by_address"


def test_registered_uring_buffers() -> None:
    folder = str(free_space_folder())
    result = run_farmem([compile_c("uring_fixed"), folder], local=LOCAL)
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert result.stats is not None and result.stats["pages_pinned"] >= 1, result.stats


def test_registered_uring_buffers_notices() -> None:
    folder = str(free_space_folder())
    assert_defect_noticed([compile_c("uring_fixed"), folder], DEFECTS, local=LOCAL)


def test_direct_io_in_flight() -> None:
    folder = str(free_space_folder())
    result = run_farmem([compile_c("direct_io"), folder], local=LOCAL)
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)


def test_direct_io_in_flight_notices() -> None:
    command = [str(compile_c("direct_io")), str(free_space_folder()), "120"]
    assert_defect_noticed(command, DEFECTS, local=LOCAL)


def test_process_vm_writev() -> None:
    result = run_farmem([compile_c("vm_writev")], local=LOCAL)
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)


def test_process_vm_writev_notices() -> None:
    assert_defect_noticed([compile_c("vm_writev"), "12"], DEFECTS, local=LOCAL)
