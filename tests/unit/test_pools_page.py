"""docs/pools.md explains what is refused in the very words that are said."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAD = "| said | what it means |\n|---|---|\n"


def explained() -> list[str]:
    """The words in backticks of the table's first column."""
    table = (ROOT / "docs" / "pools.md").read_text().partition(HEAD)[2].partition("\n\n")[0]
    rows = [row.split(" | ")[0] for row in table.splitlines()]
    return [words for row in rows for words in re.findall(r"`([^`]+)`", row)]


def test_what_is_explained_is_what_is_said() -> None:
    texts = [path.read_text() for path in (ROOT / "farmem").rglob("*.py")]
    words = explained()
    assert len(words) > 10
    assert [phrase for phrase in words if not any(phrase in text for text in texts)] == []
