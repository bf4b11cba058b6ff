"""What docs/style.md asks for and a program can check, on every source file.

C functions are found by their shape (a body that opens and closes in the first column),
which our style makes sure of.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("farmem", "native", "tests", "tools", "docs", "systemd", ".ci")
SUFFIXES = {".py", ".pyi", ".c", ".h", ".md", ".sh", ".toml", ".txt", ""}
SUFFIXES |= {".service", ".socket", ".conf", ".rules"}
CODE = (".py", ".pyi", ".c", ".h", ".sh")
FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 600
C_LINE_CHARACTERS_MAX = 130
# In pieces, so that this file does not hold what it forbids.
BANNED = re.compile(
    "|".join([r"\bTO" + "DO", r"\bFIX" + "ME", r"\bXX" + r"X\b", "/wor" + "k/", "/roo" + "t/"])
)
TEST_NAME = re.compile(r"`((?:native/)?tests/[\w./-]+\.(?:py|c))((?:::\w+)*)(?:\[[^`]*\])?`")


def _all_files() -> Iterator[Path]:
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            hidden = "__pycache__" in path.parts
            if path.is_file() and not hidden and path.suffix in SUFFIXES:
                yield path
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix in SUFFIXES and path.name != "LICENSE":
            yield path


FILES = sorted(_all_files())


def files(*suffixes: str) -> list[Path]:
    return [path for path in FILES if path.suffix in suffixes]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def c_functions(text: str) -> Iterator[tuple[str, int]]:
    """The signature's line and the length of each function body."""
    lines = text.splitlines()
    start, signature = -1, ""
    for number, line in enumerate(lines):
        if start < 0:
            opens_alone = line == "{" and number > 0 and lines[number - 1].rstrip().endswith(")")
            opens_behind = re.match(r"\w.*\)\s*\{$", line)
            if opens_alone or opens_behind:
                start = number
                signature = line if opens_behind else lines[number - 1]
        elif line.startswith("}"):
            yield signature, number - start + 1
            start = -1


def test_c_functions_are_short() -> None:
    assert [
        f"{name_of(path)}: {signature}: {lines} lines"
        for path in files(".c", ".h")
        for signature, lines in c_functions(path.read_text())
        if lines > FUNCTION_LINES_MAX
    ] == []


def test_the_length_of_a_c_function_is_seen() -> None:
    """The finder of functions finds: without this, the test above could pass blind."""
    body = "    step();\n" * 80
    text = (
        f"int x = 1;\nstatic int f(int a,\n             int b)\n{{\n{body}}}\nint g(void) {{\n}}\n"
    )
    assert [lines for _, lines in c_functions(text)] == [82, 2]
    core = ROOT / "native" / "core" / "pool_ledger.c"
    assert len(list(c_functions(core.read_text()))) > 10


def test_python_functions_are_short() -> None:
    assert [
        f"{name_of(path)}: {node.name}: {(node.end_lineno or 0) - node.lineno + 1} lines"
        for path in files(".py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES_MAX
    ] == []


def test_files_are_of_moderate_size() -> None:
    sizes = {path: len(path.read_text().splitlines()) for path in files(*CODE)}
    assert {name_of(path): n for path, n in sizes.items() if n > FILE_LINES_MAX} == {}


def says_what_it_is_for(path: Path) -> bool:
    text = path.read_text()
    if path.suffix in {".c", ".h"}:
        head = re.match(r"/\* (.{20,}?)(?:\n|\*/)", text)
        named = re.match(r"/\* ([\w.]+\.[ch])\b", text)
        return bool(head) and (named is None or named.group(1) == path.name)
    if path.suffix == ".sh":
        return bool(re.match(r"#![^\n]*\n# \S", text))
    return bool(ast.get_docstring(ast.parse(text)))


def test_a_file_opens_by_saying_what_it_is_for() -> None:
    """In C by a comment (with the file's own name, if with one); in Python by a docstring."""
    assert [name_of(path) for path in files(*CODE) if not says_what_it_is_for(path)] == []


def offending_lines(paths: list[Path], offends: Callable[[Path, str], object]) -> list[str]:
    return [
        f"{name_of(path)}:{number}: {line}"
        for path in paths
        for number, line in enumerate(path.read_text().split("\n"), 1)
        if offends(path, line)
    ]


def test_white_space_is_plain() -> None:
    def offends(path: Path, line: str) -> bool:
        return line != line.rstrip() or ("\t" in line and path.name != "Makefile")

    assert offending_lines(FILES, offends) == []
    texts = {path: path.read_text() for path in FILES}
    assert [name_of(path) for path, text in texts.items() if text and text[-1] != "\n"] == []


def test_c_lines_are_not_too_long() -> None:
    paths = files(".c", ".h")
    assert offending_lines(paths, lambda _, line: len(line) > C_LINE_CHARACTERS_MAX) == []


def test_no_file_holds_loose_ends_or_a_machines_paths() -> None:
    assert offending_lines(FILES, lambda _, line: BANNED.search(line)) == []


def entries(text: str) -> list[str]:
    """The list items and the table rows of a page, continuation lines joined."""
    found: list[str] = []
    for line in text.splitlines():
        if line.startswith(("- ", "| ")):
            found.append(line)
        elif line.startswith("  ") and line.strip() and found:
            found[-1] += " " + line.strip()
        elif line.startswith("|--") or line.startswith("|:-"):
            found.pop()  # what came before was the table's head
    return found


def missing_tests(text: str) -> list[str]:
    """The tests that a page names and that are not there."""
    missing = []
    for file, names in TEST_NAME.findall(text):
        path = ROOT / file
        wanted = [name for name in names.split("::") if name]
        content = path.read_text() if path.exists() else ""
        if not content or any(
            not re.search(rf"^\s*(?:def|class) {name}\b", content, re.MULTILINE) for name in wanted
        ):
            missing.append(file + names)
    return missing


def test_every_guarantee_names_a_test_that_exists() -> None:
    """A promise is a list item or a table row of docs/guarantees.md; its test is named in
    backticks, as `tests/unit/test_tidy.py::test_white_space_is_plain`."""
    text = (ROOT / "docs" / "guarantees.md").read_text()
    promises = entries(text)
    assert promises
    assert [promise for promise in promises if not TEST_NAME.search(promise)] == []
    assert missing_tests(text) == []


def test_pages_name_only_tests_that_exist() -> None:
    found = {name_of(path): missing_tests(path.read_text()) for path in files(".md")}
    assert {page: missing for page, missing in found.items() if missing} == {}


def test_a_missing_test_would_be_seen() -> None:
    assert missing_tests("`tests/unit/test_tidy.py::test_white_space_is_plain`") == []
    assert missing_tests("`tests/unit/test_tidy.py::test_not_there`") != []
    assert missing_tests("`tests/unit/not_there.py`") != []
    assert entries("| a | b |\n|---|---|\n| c | d |\n- e\n  f\n") == ["| c | d |", "- e f"]
