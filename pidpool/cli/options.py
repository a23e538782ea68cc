"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def interval(help_text: str) -> Callable[[Decorated], Decorated]:
    """Return the option ``--interval``: seconds, 2 by default, at least 0.1.

    :param help_text: says what the command waits for.
    """
    return click.option(
        "--interval",
        type=click.FloatRange(min=0.1),
        default=2.0,
        show_default=True,
        metavar="SECONDS",
        help=help_text,
    )
