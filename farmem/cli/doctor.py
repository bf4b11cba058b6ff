"""farmem doctor: what this host has of what farmem needs, and how to get the rest."""

import sys
from collections.abc import Iterator

import click


@click.command(
    "doctor",
    help="Look whether farmem can run programs here, and say what to type where it can't.",
    epilog="Exit status: 0 when all that is required is there, 1 when not.",
)
@click.option("--json", "is_json", is_flag=True, help="Print the findings as JSON.")
def command(is_json: bool) -> None:
    """See the help above."""
    from farmem.doctor import GROUPS
    from farmem.doctor.findings import Finding, examine, stands_in_the_way
    from farmem.doctor.host import Host
    from farmem.doctor.report import as_json, as_lines

    refused = False

    def seen() -> Iterator[Finding]:
        nonlocal refused
        for finding in examine(GROUPS, Host()):
            refused = refused or stands_in_the_way(finding)
            yield finding

    if is_json:
        click.echo(as_json(seen()))
    else:
        for line in as_lines(GROUPS, seen()):
            click.echo(line)
    if refused:
        sys.exit(1)
