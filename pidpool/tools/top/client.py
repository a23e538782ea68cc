"""Fetches the ``stats.json`` of a stats endpoint, and computes rates from two answers. Depends on the format
of the answer alone, not on the endpoint's code.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from pidpool.stats.snapshots import BOUNDS, quantile

TIMEOUT = 5.0
"""Seconds that each wait for the endpoint may last."""

_LARGEST = 64 << 20


class StatsUnavailable(Exception):
    """The endpoint gave no stats; the text says why, with a remedy."""


@dataclass(frozen=True)
class Tally:
    """The counters of a process or a family that are shown; they only grow."""

    opened: int
    checkouts: int
    timeouts: int
    forks: int
    severed: int
    kept: int
    replaced: int
    refused: int
    inherited: Mapping[str, int]
    wait_time: Sequence[int]
    """One number for each bucket of the histogram."""
    use_time: Sequence[int]

    @classmethod
    def read(cls, counters: Mapping[str, Any]) -> Tally:
        """Read the counters from the JSON."""
        names = ("opened", "checkouts", "timeouts", "forks", "severed", "kept", "replaced", "refused")
        return cls(
            **{name: int(counters[name]) for name in names},
            inherited={str(state): int(count) for state, count in counters["inherited"].items()},
            wait_time=tuple(counters["wait_time"]["counts"]),
            use_time=tuple(counters["use_time"]["counts"]),
        )


@dataclass(frozen=True)
class Member:
    """A process of a family."""

    pid: int
    parent_pid: int | None
    alive: bool
    since: float
    idle: int
    used: int
    waiting: int
    overflow: int
    maximum: int | None
    tally: Tally


@dataclass(frozen=True)
class Family:
    """One pool in all its processes."""

    pool: str
    taken_at: float
    """Seconds since the epoch, by the clock of the endpoint's machine."""
    idle: int
    used: int
    waiting: int
    maximum: int | None
    server_max_connections: int | None
    departed: int
    unlisted: int
    members: tuple[Member, ...]
    tally: Tally
    bounds: Sequence[float]
    """The upper bounds of the histograms' buckets, in seconds."""
    limit: int | None = None
    permits: int = 0
    wanting: int = 0
    given_back: int = 0


def stats_url(url: str) -> str:
    """Return the address of the ``stats.json`` that belongs to an endpoint's address.

    :raises ValueError: if `url` is no address of HTTP.
    """
    complaint = f"{url!r} is no address of HTTP; give one like http://127.0.0.1:9432/"
    if "@" in url.partition("?")[0]:  # not shown: a password may stand before it
        raise ValueError("a stats endpoint takes no user and password; leave out the part up to the @")
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(complaint)
    except ValueError:  # also a port that is no number
        raise ValueError(complaint) from None
    path = parts.path if parts.path.endswith("/stats.json") else parts.path.rstrip("/") + "/stats.json"
    return urlunsplit((parts.scheme, parts.netloc, quote(path, safe="/%:@!$&'()*+,;=~"), "", ""))


def fetch(url: str, token: str | None) -> list[Family]:
    """Return the endpoint's stats, one family for each pool. Each wait for the network ends after `TIMEOUT`.

    :param url: as `stats_url` returns it.
    :raises StatsUnavailable: if there is no answer, or one without stats.
    """
    request = urllib.request.Request(url, headers={"Accept": "application/json"})
    if token:
        # A redirect may lead to another server, which must not get the token.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            body = answer.read(_LARGEST)
    except urllib.error.HTTPError as error:
        with error:
            raise StatsUnavailable(_refusal(url, error, token)) from None
    except TimeoutError:
        raise StatsUnavailable(f"{url} did not answer within {TIMEOUT:g} s; is it stopped?") from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise StatsUnavailable(
            f"nothing answers at {url} ({reason}); start the application with serve_stats() or StatsApp "
            "there, or give its address"
        ) from None
    try:
        document = json.loads(body)
        bounds = document.get("bounds", BOUNDS)
        # The endpoint gives a list of pools; a page made with `to_dict()` of one pool is that pool alone.
        return [_family(each, bounds) for each in document.get("pools", [document])]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StatsUnavailable(
            f"the answer of {url} is not pidpool's stats; give the address of serve_stats() or StatsApp"
        ) from None


def _refusal(url: str, error: urllib.error.HTTPError, token: str | None) -> str:
    if error.code == 401:
        if token:
            return f"{url} refuses the token (401); give the one that the application was started with"
        return f"{url} asks for a token (401); give it in PIDPOOL_TOKEN"
    if error.code == 404:
        return f"there is no {url} (404); give the address of serve_stats() or StatsApp"
    try:
        said = error.read(500).decode(errors="replace").strip().partition("\n")[0]
    except (OSError, HTTPException):
        said = ""
    return f"{url} answers {error.code} {said or error.reason}"


def _family(stats: Mapping[str, Any], bounds: Sequence[float]) -> Family:
    names = ("taken_at", "idle", "used", "waiting", "maximum", "server_max_connections")
    return Family(
        pool=str(stats["pool"]),
        **{name: stats[name] for name in (*names, "departed", "unlisted")},
        members=tuple(_member(process) for process in stats["processes"]),
        tally=Tally.read(stats["counters"]),
        bounds=bounds,
        # Not in the answers of the first version.
        limit=stats.get("limit"),
        permits=stats.get("permits", 0),
        wanting=stats.get("wanting", 0),
        given_back=stats["counters"].get("closed", {}).get("given back", 0),
    )


def _member(process: Mapping[str, Any]) -> Member:
    names = ("pid", "parent_pid", "alive", "since", "idle", "used", "waiting", "overflow", "maximum")
    return Member(**{name: process[name] for name in names}, tally=Tally.read(process["counters"]))


@dataclass(frozen=True)
class Rates:
    """The counts of the time between two answers; if there was only one, of the time since the start."""

    seconds: float | None
    """How long that time was; None for since the start."""
    checkouts: int
    opened: int
    timeouts: int
    wait_p99: float | None
    """Seconds within which 99 of 100 checkouts got their connection. None if there were no checkouts."""
    use_p99: float | None

    def per_second(self, count: int) -> float | None:
        """Return a count as a rate; None without a known time."""
        return count / self.seconds if self.seconds else None


def rates(now: Tally, before: Tally | None, seconds: float | None, bounds: Sequence[float]) -> Rates:
    """Compare two tallies of the same process or family, taken `seconds` after each other.

    If the earlier one is missing or is of another process with that pid, `now` counts alone.
    """
    if before is None or not seconds or seconds <= 0 or before.checkouts > now.checkouts:
        return Rates(
            None,
            now.checkouts,
            now.opened,
            now.timeouts,
            quantile(now.wait_time, bounds, 0.99),
            quantile(now.use_time, bounds, 0.99),
        )
    return Rates(
        seconds,
        now.checkouts - before.checkouts,
        now.opened - before.opened,
        now.timeouts - before.timeouts,
        quantile(_difference(now.wait_time, before.wait_time), bounds, 0.99),
        quantile(_difference(now.use_time, before.use_time), bounds, 0.99),
    )


def _difference(now: Sequence[int], before: Sequence[int]) -> list[int]:
    # Counters are read without a lock: a bucket may be a moment older than its neighbour.
    return [max(0, new - old) for new, old in zip(now, before, strict=False)]
