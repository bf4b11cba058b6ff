"""The examples in the docstrings and in docs/regions.md: each is run, in an interpreter of its own.

A docstring's examples are doctests. The page is read from top to bottom as one program: what
an example prints must be what stands below it.
"""

import doctest
import re
import subprocess
from pathlib import Path

import pytest

from farmem import region, regionbudget
from tests.regions.scripts import LIMIT_SECONDS, PYTHON, ROOT, environment

PAGE = ROOT / "docs" / "regions.md"
FINDER = doctest.DocTestFinder(exclude_empty=True)
WITH_EXAMPLES = sorted(
    test.name
    for module in (region, regionbudget)
    for test in FINDER.find(module, module.__name__, globs={})
    if test.examples
)
RUN_ONE = """
import doctest, importlib, sys
module, name = sys.argv[1], sys.argv[2]
(test,) = [t for t in doctest.DocTestFinder().find(importlib.import_module(module), globs={})
           if t.name == name]
runner = doctest.DocTestRunner()
runner.run(test)
sys.exit(0 if runner.summarize(verbose=True).failed == 0 and runner.tries else 1)
"""
RUN_PAGE = """
import doctest, sys
text = open(sys.argv[1]).read()
test = doctest.DocTestParser().get_doctest(text, {}, sys.argv[1], sys.argv[1], 0)
runner = doctest.DocTestRunner()
runner.run(test)
sys.exit(0 if runner.failures == 0 and runner.tries > 10 else 1)
"""


def python(*words: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [PYTHON, "-c", *words],
        env=environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_docstring(name: str, tmp_path: Path) -> None:
    module = ".".join(name.split(".")[:2])
    done = python(RUN_ONE, module, name, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_docstrings_have_examples() -> None:
    for name in ("region.Region", "region.Region.ndarray", "regionbudget.Budget.stats"):
        assert f"farmem.{name}" in WITH_EXAMPLES


def test_page(tmp_path: Path) -> None:
    done = python(RUN_PAGE, str(PAGE), folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_shows_what_there_is() -> None:
    """Every public method and property of Region and Budget is named on the page."""
    text = PAGE.read_text()
    for kind in (region.Region, regionbudget.Budget):
        for name in vars(kind):
            if not name.startswith("_"):
                assert re.search(rf"\b{name}\b", text), f"{kind.__name__}.{name} is not explained"
