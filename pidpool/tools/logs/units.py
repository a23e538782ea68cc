"""Times, durations and counts as people read them. Times are UTC: a log's own clock is not known."""

from __future__ import annotations

from datetime import datetime, timezone


def clock(at: float, since: float | None = None) -> str:
    """Return the time of day to the millisecond; with the date, where that isn't the same as `since`."""
    moment = datetime.fromtimestamp(at, timezone.utc)
    text = f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03d}"
    if since is None or datetime.fromtimestamp(since, timezone.utc).date() == moment.date():
        return text
    return f"{moment:%Y-%m-%d} {text}"


def day(at: float) -> str:
    """Return the date."""
    return f"{datetime.fromtimestamp(at, timezone.utc):%Y-%m-%d}"


def duration(seconds: float) -> str:
    """Return a duration to three places or so: 850 µs, 12.3 ms, 4.56 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 0.0009995:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def count(number: int, singular: str, plural: str | None = None) -> str:
    """Return a number with its noun: 1 checkout, 2,000 checkouts."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
