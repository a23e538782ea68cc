"""The command ``pidpool``. Each subcommand is a module here, imported only when it is called: none needs the
packages of another. Such a module has one `click.Command`, named ``command``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click

_COMMANDS = {
    "demo": "Fork over a real PostgreSQL with TLS: SQLAlchemy's pool, then pidpool.",
    "logs": "Read event logs: the process tree, the leaks, the longest waits and holds.",
    "ps": "Find database sockets that several processes hold open.",
    "top": "Watch a stats endpoint in the terminal.",
}

MISSING = 2
"""The exit status if a package of an extra is missing."""

_UNWRITTEN = 2


def main() -> None:
    """Run the command."""
    with needing(_extra_of(sys.argv[1:])):
        commands = _group()
    try:
        commands()
    except OSError as error:
        # Above all a full disk under the output. Not status 1, which stands for a finding.
        sys.stderr.write(f"pidpool: {error.filename or 'the output'}: {error.strerror or error}\n")
        # The interpreter's last flush goes nowhere, so that it does not fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(_UNWRITTEN)


def _extra_of(arguments: Sequence[str]) -> str:
    """Return the one extra that brings all packages for this command line."""
    return "demo" if arguments[:1] == ["demo"] else "cli"


class needing:
    """Turn a failed import into the name of the extra that brings the package.

    :param extra: the extra's name, for ``pip install 'pidpool[<extra>]'``.
    """

    def __init__(self, extra: str) -> None:
        self._extra = extra

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("pidpool"):
            sys.stderr.write(
                f"pidpool: the package {error.name} is missing; "
                f"install it with: pip install 'pidpool[{self._extra}]'\n"
            )
            sys.exit(MISSING)


def _group() -> click.Group:
    import click

    class Commands(click.Group):
        def list_commands(self, ctx: click.Context) -> list[str]:
            return list(_COMMANDS)

        def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            # Without importing the commands.
            with formatter.section("Commands"):
                formatter.write_dl(list(_COMMANDS.items()))

        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            if cmd_name not in _COMMANDS:
                return None
            with needing(_extra_of([cmd_name])):
                module = importlib.import_module(f"pidpool.cli.{cmd_name}")
            command: click.Command = module.command
            return command

    commands = Commands(
        "pidpool",
        help="A SQLAlchemy connection pool that survives fork: its tools.",
        epilog="\b\nExample:\n  pidpool logs app.log",
    )
    return click.version_option(package_name="pidpool", message="pidpool %(version)s")(commands)
