"""Times, durations, counts and untrusted text, as all the commands print them. The times of a log are printed
in UTC, since a log does not name its machine's time zone.
"""

from __future__ import annotations

from datetime import datetime, timezone


def clock(at: float, since: float | None = None) -> str:
    """Return the time of day to the millisecond; with the date if it isn't that of `since`."""
    moment = datetime.fromtimestamp(at, timezone.utc)
    text = f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03d}"
    if since is None or datetime.fromtimestamp(since, timezone.utc).date() == moment.date():
        return text
    return f"{moment:%Y-%m-%d} {text}"


def day(at: float) -> str:
    """Return the date."""
    return f"{datetime.fromtimestamp(at, timezone.utc):%Y-%m-%d}"


def duration(seconds: float) -> str:
    """Return a duration to about three places: 4.1 µs, 12.3 ms, 4.56 s, 3 min 20 s, 5 min, 2 h 5 min.

    The function of the same name in logs/page.js does the same.
    """
    if seconds < 0.0009995:
        return f"{max(0.0, seconds * 1e6):.3g} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return _two_units(whole, 60, "min", 1, "s")
    if whole < 48 * 3600:
        return _two_units(whole, 3600, "h", 60, "min")
    return _two_units(whole, 86400, "d", 3600, "h")


def age(seconds: float) -> str:
    """Return a duration in whole seconds, for ages: 0 s, 12 s, 5 min 3 s."""
    return f"{max(0, round(seconds))} s" if seconds < 59.5 else duration(round(seconds))


def _two_units(seconds: int, large: int, large_name: str, small: int, small_name: str) -> str:
    number, rest = divmod(seconds, large)
    rest //= small
    return f"{number} {large_name} {rest} {small_name}" if rest else f"{number} {large_name}"


def count(number: int, singular: str, plural: str | None = None) -> str:
    """Return a number with its noun: 1 checkout, 2,000 checkouts."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def printable(text: str) -> str:
    """Return an untrusted text (a command line, a name) without a terminal's control characters."""
    return "".join(character if character.isprintable() else "?" for character in text)
