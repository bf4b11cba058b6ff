"""Programs that discard, unmap, move and protect memory that has been evicted.

The engine's picture of the address space must follow each of these, told by the kernel's
events, which come before the change, late, out of order, or (growing in place) never. The
programs know exactly what each word may be at each moment; the twins take the reading of
one kind of event out.
"""

from __future__ import annotations

import pytest

from tests.harness import assert_defect_noticed, assert_ok, assert_paged, compile_c, run_farmem

pytestmark = [pytest.mark.safety, pytest.mark.uffd]
LOCAL = "32M"


def run_case(case: str, evict: str | None = None) -> None:
    name, *arguments = case.split()
    result = run_farmem([compile_c(name), *arguments], local=LOCAL, evict=evict)
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)


@pytest.mark.parametrize("evict", [None, "copy"])
@pytest.mark.parametrize("how", ["dontneed", "free"])
def test_discards_racing_faults(how: str, evict: str | None) -> None:
    run_case(f"discards {how}", evict)


def test_memory_freed_lazily_is_evicted_again() -> None:
    """A page that was discarded and then written must not be forgotten: it is evictable."""
    run_case("discards free 4 evict")


@pytest.mark.parametrize(
    ("case", "defect"),
    [
        ("discards dontneed", "ignore_remove"),
        ("discards free 4 evict", "remove_is_fresh"),
        ("unmap_reuse", "ignore_unmap"),
        ("remap move", "ignore_remap"),
        ("remap fixed", "ignore_remap"),
        ("remap dontunmap", "ignore_remap"),
        ("protect", "skip_store"),
    ],
)
def test_mappings_notice(case: str, defect: str) -> None:
    name, *arguments = case.split()
    assert_defect_noticed([compile_c(name), *arguments], defect, local=LOCAL)


@pytest.mark.parametrize("how", ["move", "over"])
def test_a_page_put_where_one_is_being_dropped(how: str) -> None:
    """The copy path drops by address, and the kernel lets the program change the address
    space in the middle of it: what lies there by then must not be lost."""
    run_case(f"drop_race {how}", "copy")


def test_a_page_put_where_one_is_being_dropped_notices() -> None:
    command = [compile_c("drop_race"), "move", "40"]
    assert_defect_noticed(command, "drop_by_address", local=LOCAL, evict="copy", timeout=60)


@pytest.mark.parametrize("evict", [None, "copy"])
def test_unmap_and_reuse(evict: str | None) -> None:
    run_case("unmap_reuse", evict)


@pytest.mark.parametrize("evict", [None, "copy"])
@pytest.mark.parametrize("how", ["grow", "move", "fixed", "dontunmap", "storm"])
def test_mremap(how: str, evict: str | None) -> None:
    run_case(f"remap {how}", evict)


@pytest.mark.parametrize("evict", [None, "copy"])
def test_mprotect_every_protection(evict: str | None) -> None:
    """By default what can't be moved is copied; here that path is real, not forced."""
    run_case("protect", evict)
