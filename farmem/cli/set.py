"""farmem set: change a setting of a running job."""

import click

from farmem.answers import SETTING_HINT
from farmem.checks import check_budget
from farmem.errors import FarmemError
from farmem.running import parse_pid, set_budget, status_of
from farmem.sizes import format_bytes, parse_size

EXAMPLE = "farmem set PID local=2G"
SETTINGS = ("local",)


def parse_settings(words: tuple[str, ...]) -> dict[str, str]:
    """KEY=VALUE words, each key once, each one known."""
    settings: dict[str, str] = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator:
            raise FarmemError(f"{word!r} is not KEY=VALUE", f"type: {EXAMPLE}")
        if key not in SETTINGS:
            known = ", ".join(SETTINGS)
            raise FarmemError(
                f"there is no setting {key!r}", f"settings are: {known}; type: {EXAMPLE}"
            )
        if key in settings:
            raise FarmemError(f"{key!r} is set twice", f"give it once: {EXAMPLE}")
        settings[key] = value
    if not settings:
        raise FarmemError("there is nothing to set", f"type: {EXAMPLE}")
    return settings


@click.command(
    "set",
    help="Change a setting of the running job that process PID belongs to.\n\n"
    "local=SIZE: its local memory. It takes effect within moments, lowered or raised.",
)
@click.argument("pid", metavar="PID")
@click.argument("words", metavar="KEY=VALUE...", nargs=-1)
def command(pid: str, words: tuple[str, ...]) -> None:
    """See the help above."""
    number = parse_pid(pid, EXAMPLE.replace("PID", "1234"))
    settings = parse_settings(words)
    budget_bytes = parse_size(settings["local"], "local memory")
    check_budget(budget_bytes, SETTING_HINT)
    job = status_of(number)["job"]
    before_bytes, now_bytes = set_budget(job, budget_bytes)
    print(f"{job}: local was {format_bytes(before_bytes)}, is {format_bytes(now_bytes)}")
