"""Reads event logs: JSON lines from files, gzipped or not, and from pipes; several at once in the order of
their events. A followed log is read on through rotation and truncation.

Made for big logs: lines are parsed a chunk at a time, and no more than a chunk of each file is in memory.
"""

from __future__ import annotations

import errno
import heapq
import json
import os
import select
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

CHUNK = 1 << 19
"""Bytes that are read and parsed at a time."""

CHUNKS = 1 << 22
"""Bytes that are read of all logs together at a time, if there are many."""

LONGEST_LINE = 1 << 22
"""Bytes; a longer line is no event."""

LOOK_AGAIN = 0.2
"""Seconds between two looks at a followed file."""

_GZIP = b"\x1f\x8b"
_REMEMBERED = 64


class Unreadable(Exception):
    """A log that can't be read: the fact and the remedy, ready to be shown."""


class Source:
    """One log, read from its beginning.

    :param path: a file's path, or ``-`` for the standard input.
    :param follow: whether to read on what is written later. A pipe is then never waited for.
    :param chunk: bytes to read at a time.
    :raises Unreadable: if it can't be opened.
    """

    def __init__(self, path: str, follow: bool = False, chunk: int | None = None) -> None:
        self.path = path
        self.name = "standard input" if path == "-" else path
        self.lines = 0
        self.foreign = 0
        """Lines that can't be events of pidpool, blank ones not counted."""
        self.position = 0
        """Bytes read of the file; of a compressed file, compressed ones."""
        self.over = False
        """Whether the log has no further events."""
        try:
            self._fd = os.dup(0) if path == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Unreadable(_why(path, error)) from error
        status = os.fstat(self._fd)
        if stat.S_ISDIR(status.st_mode):
            os.close(self._fd)
            raise Unreadable(
                f"{path} is a directory; name the files in it, for example {path.rstrip('/')}/*.log"
            )
        self.regular = stat.S_ISREG(status.st_mode)
        self.identity = (status.st_dev, status.st_ino)
        self.size = status.st_size if self.regular else 0
        self._follow = follow
        self._chunk_size = CHUNK if chunk is None else chunk
        self._gunzip: Any = None
        self._raw = b""  # read and not yet decompressed
        self._rest = b""  # the beginning of a line whose end was not read yet
        self._skipping = False
        self._last = b""  # the last bytes read: still in place unless the file was truncated

    def fileno(self) -> int:
        """Return its descriptor."""
        return self._fd

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.over = True

    def read(self) -> list[Any] | None:
        """Return the events of the next chunk, perhaps none; None if there is no chunk at present.

        :raises Unreadable: if the file turns out to be broken.
        """
        if self.over:
            return None
        chunk = self._chunk()
        if chunk:
            return self._events(chunk)
        if chunk is None or (self._follow and self.regular and self._gunzip is None):
            return None
        return self.finish() or None

    def finish(self) -> list[Any]:
        """Close the log and return the event of a last line without a line feed, if there is one."""
        rest, self._rest = self._rest, b""
        self.close()
        return self._parse([rest]) if rest.strip() and not self._skipping else []

    def was_replaced(self) -> bool:
        """Return whether another file has the log's name now."""
        if not self.regular or self._gunzip is not None:
            return False
        try:
            status = os.stat(self.path)
        except OSError:
            return False  # in the middle of a rotation
        return (status.st_dev, status.st_ino) != self.identity

    def begin_again_if_truncated(self) -> None:
        """Go back to the beginning if the file was truncated since the last read, even if it grew again."""
        if self.over or not self.regular or self._gunzip is not None:
            return
        start = self.position - len(self._last)
        if os.fstat(self._fd).st_size < self.position or (
            self._last and os.pread(self._fd, len(self._last), start) != self._last
        ):
            os.lseek(self._fd, 0, os.SEEK_SET)
            self.position = 0
            self._last = self._rest = b""
            self._skipping = False

    # -- bytes

    def _chunk(self) -> bytes | None:
        """Return the next bytes, decompressed; b"" at the end, None if a pipe has none at present."""
        while True:
            if self._gunzip is None:
                raw = self._more()
                if not raw or self.position != len(raw) or not raw.startswith(_GZIP):
                    return raw
                self._gunzip, self._raw = zlib.decompressobj(wbits=31), raw
            elif not self._raw:
                more = self._more()
                if more is None:
                    return None
                if not more and not self._gunzip.eof:
                    held_back: bytes = self._gunzip.decompress(b"", self._chunk_size)
                    if not held_back and not self._gunzip.eof:
                        raise Unreadable(self._broken("it ends too early"))
                    return held_back
                if not more:
                    return b""
                self._raw = more
            plain = self._decompress()
            if plain:
                return plain

    def _decompress(self) -> bytes:
        if self._gunzip.eof:  # another member may follow, or zeros up to a block's end
            self._raw = self._raw.lstrip(b"\0")
            if not self._raw:
                return b""
            self._gunzip = zlib.decompressobj(wbits=31)
        try:
            plain: bytes = self._gunzip.decompress(self._raw, self._chunk_size)
        except zlib.error as error:
            raise Unreadable(self._broken(str(error))) from error
        self._raw = self._gunzip.unused_data if self._gunzip.eof else self._gunzip.unconsumed_tail
        return plain

    def _broken(self, why: str) -> str:
        return (
            f"{self.name} is broken as a gzip file near byte {self.position:,} ({why}); to read it "
            f"up to there: gzip -dc {self.path} | pidpool logs -"
        )

    def _more(self) -> bytes | None:
        if self._follow and not self.regular and not select.select([self._fd], [], [], 0)[0]:
            return None
        try:
            raw = os.read(self._fd, self._chunk_size)
        except OSError as error:
            raise Unreadable(_why(self.path, error)) from error
        self.position += len(raw)
        if self._follow and raw:
            self._last = (self._last + raw[-_REMEMBERED:])[-_REMEMBERED:]
        return raw

    # -- lines

    def _events(self, chunk: bytes) -> list[Any]:
        lines = chunk.split(b"\n")
        if self._skipping:
            if len(lines) == 1:
                return []
            del lines[0]
            self._skipping = False
        elif self._rest:
            lines[0] = self._rest + lines[0]
        self._rest = lines.pop()
        if len(self._rest) > LONGEST_LINE:
            self._rest, self._skipping = b"", True
            self.lines += 1
            self.foreign += 1
        return self._parse(lines)

    def _parse(self, lines: list[bytes]) -> list[Any]:
        # Every event has a pid: a line without one needn't be parsed.
        wanted = [line for line in lines if b'"pid"' in line]
        if len(wanted) != len(lines):
            blank = sum(not line.strip() for line in lines)
            self.lines -= blank
            self.foreign += len(lines) - len(wanted) - blank
        self.lines += len(lines)
        try:
            # All at once, which takes two thirds of the time. No JSON string may hold a line feed, so a
            # broken line can't reach into the next one.
            events: list[Any] = json.loads("[" + b"\n,\n".join(wanted).decode() + "]")
            if len(events) == len(wanted):
                return events
        except (ValueError, RecursionError):
            pass
        events = []
        for line in wanted:
            try:
                events.append(_event(line))
            except (ValueError, RecursionError):
                self.foreign += 1
        return events


def _event(line: bytes) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        # A leak is shown even if a field of the user's is in another encoding.
        return json.loads(line.decode(errors="replace"))


def open_all(paths: Sequence[str], follow: bool = False) -> list[Source]:
    """Open the logs; one that is named twice is opened once.

    :raises Unreadable: if one can't be opened.
    """
    sources: dict[tuple[int, int], Source] = {}
    chunk = min(CHUNK, max(1 << 14, CHUNKS // max(1, len(paths))))
    for path in paths:
        source = Source(path, follow, chunk)
        if sources.setdefault(source.identity, source) is not source:
            source.close()
    return list(sources.values())


def merged(sources: Sequence[Source]) -> Iterator[list[Any]]:
    """Yield all events, some at a time; those of several logs in the order of their ``at``.

    Each log is taken to be in that order itself, more or less.
    """
    if len(sources) == 1:
        while (batch := sources[0].read()) is not None:
            yield batch
        return
    heads: list[tuple[float, int, int, list[float], list[Any]]] = []
    for number, source in enumerate(sources):
        _put_next(heads, number, source)
    while heads:
        _, number, start, times, events = heads[0]
        limit = min((head[0] for head in heads[1:3]), default=float("inf"))
        end = start + 1
        while end < len(times) and times[end] <= limit:
            end += 1
        yield events[start:end]
        if end < len(times):
            heapq.heapreplace(heads, (times[end], number, end, times, events))
        else:
            heapq.heappop(heads)
            _put_next(heads, number, sources[number])


def _put_next(heads: list[Any], number: int, source: Source) -> None:
    while (events := source.read()) is not None:
        if events:
            times = _times(events)
            heapq.heappush(heads, (times[0], number, 0, times, events))
            return


def _times(events: list[Any]) -> list[float]:
    times = []
    last = 0.0
    for event in events:
        at = event.get("at") if type(event) is dict else None
        if type(at) is float or type(at) is int:
            last = at
        times.append(last)  # an event without a time stays behind the one before it
    return times


class Followed:
    """Logs that are being written to.

    :param sources: opened with `follow`.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self._retired: dict[str, Source] = {}

    def news(self, stopped: Callable[[], bool]) -> Iterator[list[Any]]:
        """Yield the events written since the last look, until all logs have ended or `stopped` returns true.

        :raises Unreadable: if a log was replaced by one that can't be read.
        """
        while not stopped():
            events: list[Any] = []
            for source in list(self.sources):
                events += self._news_of(source)
            if events:
                times = _times(events)
                yield [events[i] for i in sorted(range(len(events)), key=times.__getitem__)]
            elif all(source.over for source in self.sources):
                return
            else:
                time.sleep(LOOK_AGAIN)

    def _news_of(self, source: Source) -> list[Any]:
        source.begin_again_if_truncated()
        # Checked first: then the events written before a rotation are read below, after it.
        replaced = source not in self._retired.values() and source.was_replaced()
        events = _all_of(source)
        if not replaced:
            return events
        # The old file is kept open up to the next rotation: writers go on with it until they reopen the log.
        oldest = self._retired.pop(source.path, None)
        if oldest is not None:
            events += oldest.finish()
            self.sources.remove(oldest)
        self._retired[source.path] = source
        successor = Source(source.path, follow=True)
        self.sources.append(successor)
        return events + _all_of(successor)


def _all_of(source: Source) -> list[Any]:
    events: list[Any] = []
    while (batch := source.read()) is not None:
        events += batch
    return events


def _why(path: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path}: there is no such file; name a log of JSON lines, or - for the standard input"
    if isinstance(error, PermissionError):
        return (
            f"{path}: no permission to read it as uid {os.geteuid()}; read it as its owner or change its mode"
        )
    if error.errno == errno.EMFILE:
        return f"{path}: too many files at a time; allow more (ulimit -n 10000), or read them in several runs"
    return f"{path}: {error.strerror or error}; check the file, or pipe it: pidpool logs - < {path}"
