"""How the commands put into words what they show."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a time span in the largest unit of which it has two at least."""
    seconds = max(0, round(seconds))
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds // unit} {name}"
    return f"{seconds} s"


def printable(text: str) -> str:
    """Return a text from elsewhere without what would steer the terminal: command lines, names, answers."""
    return "".join(character if character.isprintable() else "?" for character in text)
