"""What the supervisor answers to a person's command: `farmem stat` asks, `farmem set` changes.

A question is one JSON object of at most QUESTION_BYTES_MAX bytes.  Who may ask is told by
the kernel, not by the job's token: the user that the job belongs to, and root.  An answer is
a copy of the figures: the control segment itself stays here, for it holds the job's secret.
Nothing that is asked may fail in another way than by an answer that says so.
"""

import json
import os
from collections.abc import Callable
from typing import Any

from farmem.budget import Budget
from farmem.checks import check_budget
from farmem.errors import FarmemError
from farmem.sizes import BYTES_MAX

SETTING_HINT = "farmem set PID local=16M"
_ROOT = 0
_WHOLE_NAMESPACE = ["0", "0", "4294967295"]


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def may_ask(uid: int) -> bool:
    """Whether a user may see and change this process's job.

    In a user namespace, users that it does not know all look like one (nobody, most often):
    that number stands for anybody there, so it is trusted with nothing.
    """
    if uid not in (_ROOT, os.geteuid()):
        return False
    try:
        is_nobody = uid == int(_read("/proc/sys/kernel/overflowuid"))
        return not is_nobody or _read("/proc/self/uid_map").split() == _WHOLE_NAMESPACE
    except (OSError, ValueError):
        return False


class Answers:
    """Answers questions about one job; `status` gives its figures."""

    def __init__(self, budget: Budget, status: Callable[[], dict[str, Any]]) -> None:
        self._budget = budget
        self._status = status

    def to(self, text: bytes) -> bytes:
        """The answer to a question, as JSON."""
        try:
            answer = self._answer(json.loads(text))
        except FarmemError as error:
            answer = {"error": error.what, "hint": error.hint}
        except (ValueError, RecursionError):  # of the parser: not JSON, not UTF-8, too deep
            answer = _not_understood()
        return json.dumps(answer).encode()

    def _answer(self, question: Any) -> dict[str, Any]:
        match question:
            case {"ask": "status", **rest} if not rest:
                return self._status()
            case {"ask": "set", "budget_bytes": int(size_bytes), **rest} if not rest:
                return self._set(size_bytes)
        return _not_understood()

    def _set(self, size_bytes: int) -> dict[str, Any]:
        check_budget(size_bytes, SETTING_HINT)
        if size_bytes > BYTES_MAX:
            raise FarmemError(
                f"a budget of {size_bytes} bytes is more than any machine can address"
            )
        before_bytes = self._budget.change(size_bytes)
        return {"budget_bytes": size_bytes, "budget_before_bytes": before_bytes}


def _not_understood() -> dict[str, Any]:
    return {
        "error": "the job's supervisor does not understand the question",
        "hint": "the job was started by another version of farmem: use that one's command",
    }
