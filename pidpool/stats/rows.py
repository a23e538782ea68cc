"""One process's numbers about one pool, in a row of memory that the processes of a family share: what
is in it, how its owner writes it, how anybody reads it.

Every word of a row is eight bytes, aligned and written at once, and means something by itself: a count
that only grows, or a time. How many checkouts there were is the sum of the histogram of their waiting
times. So there is no state that a reader could catch half written, and a writer that is killed leaves
nothing half done. The one thing that takes several words, which connection it is, stands between two
copies of a number that tell when they don't belong together.

No two threads write the same word: a slot's words belong to whoever has its connection checked out, and
all others are written under the row's lock.
"""

from __future__ import annotations

import itertools
import os
import struct
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pidpool.forks.ownership import ConnectionTag
from pidpool.stats.snapshots import BOUNDS, ConnectionStats, Counters, Histogram, PoolStats

if TYPE_CHECKING:
    from pidpool._sqlalchemy.checkout import PidRecord

_BUCKETS = len(BOUNDS) + 1
LAST_BUCKET = len(BOUNDS)

CLOSED = ("recycled", "invalidated", "overflow", "disposed", "detached", "failed")
INHERITED = ("idle", "no transaction", "in transaction", "unknown")
ADOPTIONS = ("hook", "lazy")

# -- a row's head: the words of the process

_words = itertools.count()


def _next(count: int = 1) -> int:
    first = next(_words)
    for _ in range(count - 1):
        next(_words)
    return first


PID = _next()
"""0: nobody's row. Written last."""
GENERATION = _next()
"""Grows with every process that is given the row."""
PARENT_PID = _next()
JOINED = _next()
"""When the process joined, in nanoseconds of `time.CLOCK_BOOTTIME`: a process of the same pid that
started later is another one."""
SINCE = _next()
"""The same in microseconds since the epoch."""
ENDED = _next()
"""1 once somebody has seen that the process has ended."""
SLOTS_USED = _next()
"""Slots at and above this one have never been used."""
WAITING = _next()
TIMEOUTS = _next()
INVALIDATIONS = _next()
SEVERED = _next()
KEPT = _next()
REPLACED = _next()
REFUSED = _next()
FORKS = _next()
_CLOSED = _next(len(CLOSED))
_INHERITED = _next(len(INHERITED))
_ADOPTIONS = _next(len(ADOPTIONS))
_CREATE = _next(_BUCKETS)
_CREATE_SUM = _next()
HEAD = next(_words)

# -- a slot: the words of a pool entry, and of the connection that it holds at present

TAKEN = 0
"""1 while a pool entry has the slot."""
_BEGIN = 1
_NUMBER, _FD, _INODE, _SERVER_PID, _OPENED_AT, _EARLIER = range(2, 8)
# The last: how many checkouts the slot had counted of the connections before this one.
_END = 8
IN_STATE_SINCE = 9
"""`time.perf_counter_ns()` when the connection was opened, or of its last checkout or checkin."""
THREAD = 10
"""Who has checked the connection out, by `threading.get_ident()`; 0 while it is idle."""
WAIT = 11
WAIT_SUM = WAIT + _BUCKETS
USE = WAIT_SUM + 1
USE_SUM = USE + _BUCKETS
SLOT = USE_SUM + 1

_identity = struct.Struct("8Q")
_NONE = (1 << 64) - 1  # stands for None, in unsigned words


def bucket(nanoseconds: int) -> int:
    """Return the bucket of a histogram that a duration belongs to (see `BOUNDS`)."""
    return min((nanoseconds >> 10).bit_length(), LAST_BUCKET)


def words_of_a_row(slots: int) -> int:
    """Return how many words a row with so many slots has."""
    return HEAD + slots * SLOT


class Row:
    """This process's own row: its numbers are written here. One for each pool and process.

    Threads: counts are exact for any number of them. Forks: a child has a row of its own, and this one
    refuses to be written by it.
    """

    def __init__(self, words: memoryview, slots: int) -> None:
        self.words = words
        # Reentrant, since a finalizer may count something inside any line here.
        self._lock = threading.RLock()
        self._slots = slots
        self._free: list[int] = []
        # Not the process as fork.py knows it: in an at-fork hook that still is the parent.
        self._pid = os.getpid()
        self._records: dict[int, weakref.ref[PidRecord]] = {}

    def records(self) -> list[PidRecord]:
        """Return the pool entries that have a slot here."""
        found = (reference() for reference in list(self._records.values()))
        return [record for record in found if record is not None]

    def add(self, word: int, count: int = 1) -> None:
        """Add to a count of the process; nothing is done in any other one."""
        if not self._is_of_this_process():
            return
        with self._lock:
            self.words[word] += count

    def add_closed(self, reason: str) -> None:
        """Count a connection that was closed."""
        self.add(_CLOSED + CLOSED.index(reason))

    def add_inherited(self, state: str, *, severed: bool) -> None:
        """Count an inherited connection."""
        self.add(_INHERITED + INHERITED.index(state))
        self.add(SEVERED if severed else KEPT)

    def add_adoption(self, trigger: str) -> None:
        """Count that this process took the pool over."""
        self.add(_ADOPTIONS + ADOPTIONS.index(trigger))

    def add_opened(self, create_time: int) -> None:
        """Count a connection that took `create_time` nanoseconds to open."""
        if not self._is_of_this_process():
            return
        with self._lock:
            self.words[_CREATE + bucket(create_time)] += 1
            self.words[_CREATE_SUM] += create_time

    def _is_of_this_process(self) -> bool:
        # A child may leave a block that its parent entered, waiting() for one: what it counted there is
        # the parent's to take back, and the lock may have been held at the fork.
        return self._pid == os.getpid()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count this thread among those that wait for a connection; a greenlet's copy that goes on in a
        forked child takes nothing from that."""
        self.add(WAITING)
        try:
            yield
        finally:
            self.add(WAITING, -1)

    def take_slot(self, record: PidRecord) -> tuple[int, memoryview]:
        """Give a pool entry a slot: its number and its words.

        Slot 0 is for all entries beyond the number of slots, and TAKEN says how many. What they count is
        right, since no other thread of CPython's comes between the reading and the writing of a word;
        which connection it is can't be told of them.
        """
        with self._lock:
            used = max(self.words[SLOTS_USED], 1)
            number = self._free.pop() if self._free else used if used < self._slots else 0
            self.words[SLOTS_USED] = max(used, number + 1)
            self._records[id(record)] = weakref.ref(record)
            first = HEAD + number * SLOT
            slot = self.words[first : first + SLOT]
            slot[TAKEN] += 1
        return number, slot

    def give_back_slot(self, record: PidRecord) -> None:
        """Take an entry's slot back, with its counts, which the next entry goes on with."""
        if not self._is_of_this_process():
            return
        with self._lock:
            self._records.pop(id(record), None)
            record.slot[TAKEN] -= 1
            if record.slot_number:
                name_connection(record.slot, None)
                record.slot[THREAD] = 0
                self._free.append(record.slot_number)


def name_connection(slot: memoryview, tag: ConnectionTag | None) -> None:
    """Write which connection a slot holds; None for none."""
    change = (slot[_END] + 1) & 0xFFFFFFFF
    slot[_BEGIN] = change
    if tag is None:
        numbers = (0, 0, 0, 0, 0, 0)
    else:
        slot[IN_STATE_SINCE] = time.perf_counter_ns()
        numbers = (
            int(tag.connection_id.partition("-")[2]),
            _NONE if tag.fd is None else tag.fd,
            _NONE if tag.socket_inode is None else tag.socket_inode,
            # PgBouncer gives random ones, which libpq hands on as signed numbers.
            _NONE if tag.server_pid is None else tag.server_pid & _NONE,
            int(tag.opened_at * 1e6),
            sum(slot[WAIT:WAIT_SUM]),
        )
    _identity.pack_into(slot, _BEGIN * 8, change, *numbers, change)


SCRATCH = memoryview(bytearray(SLOT * 8)).cast("Q")
"""Where the entries write that are not this process's to count."""


# -- reading


@dataclass(frozen=True)
class Shape:
    """What all rows of a family have in common."""

    size: int
    max_overflow: int


def copy(words: memoryview) -> memoryview:
    """Return a copy of the used part of a row, in which no connection is half written."""
    length = HEAD + words[SLOTS_USED] * SLOT
    for _ in range(3):
        first, second = words[:length].tobytes(), words[:length].tobytes()
        if _identities(first) == _identities(second):
            break
    return memoryview(second).cast("Q")


def _identities(row: bytes) -> list[bytes]:
    return [row[at + _BEGIN * 8 : at + (_END + 1) * 8] for at in range(HEAD * 8, len(row), SLOT * 8)]


def read(
    words: list[int],
    summed: list[int],
    name: str,
    shape: Shape,
    *,
    alive: bool,
    thread_names: Mapping[int, str],
) -> PoolStats:
    """Return what a copy of a row says, of which `summed` are the sums."""
    at, now = time.time(), time.perf_counter_ns()
    connections = []
    # Of the entries that share a slot; what is read one after the other may differ by a moment.
    shared = words[HEAD : HEAD + SLOT]
    taken = sum(shared[:1])
    used = beyond_used = min(taken, max(0, sum(shared[WAIT:WAIT_SUM]) - sum(shared[USE:USE_SUM])))
    beyond_idle = taken - beyond_used
    for first in range(HEAD + SLOT, len(words), SLOT):
        slot = words[first : first + SLOT]
        taken += slot[TAKEN]
        used += slot[THREAD] != 0
        if not slot[_NUMBER] or slot[_BEGIN] != slot[_END]:
            continue
        tag = ConnectionTag(
            connection_id=f"{words[PID]}-{slot[_NUMBER]}",
            owner_pid=words[PID],
            fd=_or_none(slot[_FD]),
            socket_inode=_or_none(slot[_INODE]),
            server_pid=_signed_or_none(slot[_SERVER_PID]),
            opened_at=slot[_OPENED_AT] / 1e6,
        )
        thread = slot[THREAD] or None
        connections.append(
            ConnectionStats(
                tag=tag,
                state="idle" if thread is None else "used",
                age=max(0.0, at - tag.opened_at),  # the clock may have been set back
                in_state=max(0, now - slot[IN_STATE_SINCE]) / 1e9,
                checkouts=max(0, sum(slot[WAIT:WAIT_SUM]) - slot[_EARLIER]),
                thread_id=thread,
                thread_name=None if thread is None else thread_names.get(thread),
            )
        )
    return PoolStats(
        pool=name,
        pid=words[PID],
        parent_pid=words[PARENT_PID] or None,
        alive=alive,
        since=words[SINCE] / 1e6,
        size=shape.size,
        max_overflow=shape.max_overflow,
        overflow=taken - shape.size if shape.size else 0,
        idle=sum(each.thread_id is None for each in connections) + beyond_idle if alive else 0,
        used=used if alive else 0,
        waiting=words[WAITING] if alive else 0,
        counters=counters(summed),
        connections=tuple(connections) if alive else (),
    )


def sums(words: list[int]) -> list[int]:
    """Return a row's words with one slot, which has counted what all its slots have."""
    slots = [words[first + WAIT : first + SLOT] for first in range(HEAD, len(words), SLOT)]
    counted = map(sum, zip(*slots, strict=True)) if slots else [0] * (SLOT - WAIT)
    return [*words[:HEAD], *[0] * WAIT, *counted]


def add_up(summed: list[list[int]]) -> list[int]:
    """Return what several rows have counted together, from the sums of each."""
    return [*map(sum, zip(*summed, strict=True))]


def counters(summed: list[int]) -> Counters:
    """Return what was counted, from the sums of one row or of several."""
    slot = summed[HEAD:]
    create, wait, use = summed[_CREATE:_CREATE_SUM], slot[WAIT:WAIT_SUM], slot[USE:USE_SUM]
    return Counters(
        opened=sum(create),
        closed=dict(zip(CLOSED, summed[_CLOSED:], strict=False)),
        checkouts=sum(wait),
        checkins=sum(use),
        timeouts=summed[TIMEOUTS],
        invalidations=summed[INVALIDATIONS],
        inherited=dict(zip(INHERITED, summed[_INHERITED:], strict=False)),
        severed=summed[SEVERED],
        kept=summed[KEPT],
        replaced=summed[REPLACED],
        refused=summed[REFUSED],
        adoptions=dict(zip(ADOPTIONS, summed[_ADOPTIONS:], strict=False)),
        forks=summed[FORKS],
        create_time=Histogram(tuple(create), summed[_CREATE_SUM] / 1e9),
        wait_time=Histogram(tuple(wait), slot[WAIT_SUM] / 1e9),
        use_time=Histogram(tuple(use), slot[USE_SUM] / 1e9),
    )


def fold(into: memoryview, row: memoryview) -> None:
    """Add the counts of a row to those of another, which has one slot."""
    summed = sums(row.tolist())
    for word in (*range(WAITING + 1, HEAD), *range(HEAD + WAIT, HEAD + SLOT)):
        into[word] += summed[word]
    into[SLOTS_USED] = 1


def _or_none(word: int) -> int | None:
    return None if word == _NONE else word


def _signed_or_none(word: int) -> int | None:
    return _or_none(word) if word == _NONE or word < 1 << 63 else word - (1 << 64)
