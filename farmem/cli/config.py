"""farmem config: what is configured, where each value comes from, and which files are read."""

import json
import os
from importlib import import_module
from typing import Any

import click

from farmem import config
from farmem.cli.options import (
    CONFIG_VARIABLE,
    INTERNAL_VARIABLES,
    NOT_CONFIGURED,
    PREFIX,
    Defaults,
    Files,
    Origin,
    Parsed,
    origin_of,
    variable_of,
)


@click.group(
    "config",
    help="Show the configuration.  An option that is not on the command line is looked for in the "
    "environment (FARMEM_VERB_OPTION, as FARMEM_RUN_LOCAL), then in ./farmem.toml, in the user's "
    "farmem.toml and in /etc/farmem/farmem.toml.",
)
def command() -> None:
    """See the help above."""


def _value_of(context: click.Context, option: click.Option) -> tuple[Any, Origin]:
    """An option's value as it would be used and where it comes from; a wrong one is an error."""
    try:
        value, source = option.consume_value(context, {})
        context.set_parameter_source(option.name or "", source)
        origin = origin_of(context, option)
        if origin.source == "default":
            value = option.to_info_dict()["default"]
            return (None, Origin("not set", "")) if value in (None, "", ()) else (value, origin)
        converted = option.type_cast_value(context, value)
    except click.BadParameter as error:
        error.ctx, error.param = context, option
        raise
    return value if isinstance(option.type, Parsed) else converted, origin


def _values(root: click.Context, files: Files) -> dict[str, dict[str, tuple[Any, Origin]]]:
    """Every option of every verb that can be configured."""
    from farmem.cli import VERBS

    found = {}
    for verb in VERBS:
        if verb in NOT_CONFIGURED:
            continue
        verb_command: click.Command = import_module(f"farmem.cli.{verb}").command
        defaults = Defaults(verb, verb_command, files)
        root.default_map = {verb: defaults}
        with click.Context(verb_command, parent=root, info_name=verb) as context:
            found[verb] = {
                key: _value_of(context, option) for key, option in defaults.options.items()
            }
    return found


def _other_variables(known: set[str]) -> list[str]:
    """Variables that look like ours and are none."""
    names = (name for name in os.environ if name.startswith(PREFIX) and name not in known)
    return sorted(name for name in names if not name.startswith(INTERNAL_VARIABLES))


def _as_text(values: dict[str, dict[str, tuple[Any, Origin]]]) -> list[str]:
    """The values as a file would hold them, each with where it comes from."""
    lines: list[str] = []
    for verb, options in values.items():
        if not options:
            continue
        rows = []
        for key, (value, origin) in options.items():
            unset = origin.source == "not set"
            shown = list(value) if isinstance(value, tuple) else value
            text = f"# {key}" if unset else f"{key} = {json.dumps(shown, ensure_ascii=False)}"
            rows.append((text, origin.where or origin.source))
        width = max(len(text) for text, _ in rows)
        lines += [f"[{verb}]", *(f"{text:{width}}  # {where}" for text, where in rows), ""]
    return lines[:-1]


def _as_json(values: dict[str, dict[str, tuple[Any, Origin]]], others: list[str]) -> str:
    options = {
        verb: {
            key: {"value": value, "source": origin.source, "where": origin.where or None}
            for key, (value, origin) in found.items()
        }
        for verb, found in values.items()
    }
    return json.dumps({"options": options, "other_variables": others}, indent=2)


@command.command("show", help="Show each option, and where its value is from.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def show(ctx: click.Context, as_json: bool) -> None:
    """See the help above."""
    root = ctx.find_root()
    values = _values(root, ctx.obj)
    known = {variable_of(verb, key) for verb, found in values.items() for key in found}
    others = _other_variables({*known, CONFIG_VARIABLE})
    if as_json:
        click.echo(_as_json(values, others))
        return
    click.echo("\n".join(_as_text(values)))
    if others:
        click.echo(f"\n# not options of farmem: {', '.join(others)}")


def _state_of(place: config.Place) -> str:
    if place.kind != "named" and not config.is_there(place):
        return "not there"
    distrust = config.distrust_of(place)
    return "used" if distrust is None else f"not used: {distrust.why}"


@command.command("path", help="Show which files are looked for, and used.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def path(ctx: click.Context, as_json: bool) -> None:
    """See the help above."""
    rows = [(place, _state_of(place)) for place in ctx.obj.places]
    if as_json:
        found = [{"kind": p.kind, "path": p.path, "state": state} for p, state in rows]
        click.echo(json.dumps(found, indent=2))
        return
    width = max(len(place.path) for place, _ in rows)
    for place, state in rows:
        click.echo(f"{place.path:{width}}  {state}")
