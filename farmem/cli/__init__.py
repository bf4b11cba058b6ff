"""The command line: `farmem VERB ...`, a module per verb, loaded when it is typed.

`farmem run` is on the way to somebody's program: nothing that it does not need is
imported on its account.  Errors are sentences on stderr and an exit status, never a
traceback.
"""

import os
import sys
from importlib import import_module
from typing import Any

import click

from farmem import __version__
from farmem.cli.options import CONFIG_VARIABLE, Defaults, Files, hint_for
from farmem.errors import EXIT_FARMEM, FarmemError

VERBS = {
    "run": "Run a command with less memory than it needs.",
    "stat": "Show what running jobs do now.",
    "set": "Change a setting of a running job.",
    "serve": "Lend this host's memory to jobs elsewhere.",
    "pools": "Show servers that lend memory.",
    "doctor": "Look whether farmem can run programs here.",
    "config": "Show the configuration, and where each value comes from.",
    "completion": "Print what makes a shell complete farmem's words.",
}
COMPLETE_VARIABLE = "_FARMEM_COMPLETE"
_EXIT_INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group whose verbs are modules of this package."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command, its module imported now."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(f"farmem.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb that was typed; what the configuration says for it goes where click looks."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and command is not None:
            ctx.obj = Files(ctx.params.get("config_path") or "")
            ctx.default_map = {name: Defaults(name, command, ctx.obj)}
        return name, command, rest

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """The verbs, without importing one, or the options."""
        from farmem.cli.words import verbs

        return verbs(VERBS, incomplete) or click.Command.shell_complete(self, ctx, incomplete)


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="farmem", message="%(prog)s %(version)s")
@click.option(
    "--config",
    "config_path",
    metavar="FILE",
    type=click.Path(),
    envvar=CONFIG_VARIABLE,
    help="Read the configuration from FILE, and from no other file.",
)
@click.pass_context
def cli(ctx: click.Context, config_path: str | None) -> None:
    """Far memory for unmodified Linux programs."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def _complain(what: str, hint: str) -> None:
    print(f"farmem: {what}", file=sys.stderr)
    if hint:
        print(f"  {hint}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns an exit status unless a command has taken our place."""
    if COMPLETE_VARIABLE in os.environ:
        import farmem.cli.completion  # noqa: F401 - tells click how we complete
    try:
        cli.main(arguments, prog_name="farmem", standalone_mode=False)
    except FarmemError as error:
        _complain(error.what, error.hint)
        return error.status
    except click.ClickException as error:
        _complain(error.format_message().rstrip("."), hint_for(error))
        return EXIT_FARMEM
    except (KeyboardInterrupt, click.Abort):
        return _EXIT_INTERRUPTED
    except OSError as error:
        _complain(f"the system refused: {error}", "")
        return EXIT_FARMEM
    return 0
