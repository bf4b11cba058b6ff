"""Frames that others still read after they have left the program.

vmsplice and MSG_ZEROCOPY lend the page's frame itself to a pipe or to the network. MOVE
takes such a page out without complaint; if its frame is then filled with another page, the
borrower sees that page. Once the program has used one of these calls, frames are dropped
and not written to again; the defect `reuse_shared_frames` goes on recycling them.
"""

from __future__ import annotations

import pytest

from tests.harness import assert_defect_noticed, assert_ok, assert_paged, compile_c, run_farmem

pytestmark = [pytest.mark.safety, pytest.mark.uffd]
LOCAL = "32M"


@pytest.mark.parametrize("how", ["pipe", "zerocopy"])
def test_lent_pages(how: str) -> None:
    result = run_farmem([compile_c("vmsplice"), how], local=LOCAL)
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)


@pytest.mark.parametrize("how", ["pipe", "zerocopy"])
def test_lent_pages_notice(how: str) -> None:
    assert_defect_noticed([compile_c("vmsplice"), how], "reuse_shared_frames", local=LOCAL)
