"""The counters of one pool in one process: a block of cells in the memory that the family's processes
share. Here are its layout, the writing by its owner, and the reading by any process.

A cell has eight bytes, is aligned and is written at once. Each cell has a meaning by itself: a count that
only grows, or a time. The number of checkouts is the sum of the histogram of their waiting times. So a
reader can't see a half-written state, and a process that is killed leaves none. Only the identity of a
connection takes several cells. They stand between two copies of a change count: if the copies differ, the
identity is not valid.

The cells of a slot belong to the thread that has its connection checked out. All others are written without
a call between the reading and the writing: CPython switches threads, and calls signal handlers, after calls
only. There is no lock, which an exception from a signal handler could leave locked.
"""

from __future__ import annotations

import itertools
import os
import struct
import time
import weakref
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Protocol

from pidpool.stats import error_types
from pidpool.stats.live_count import LiveCount
from pidpool.stats.snapshots import BOUNDS, ConnectionStats, Counters, Histogram, PoolStats
from pidpool.tag import ConnectionTag
from pidpool.terms import CLOSE_REASONS, STATES_AT_FORK, TRIGGERS, CloseReason, StateAtFork, Trigger

_BUCKETS = len(BOUNDS) + 1
LAST_BUCKET = len(BOUNDS)

# -- the head of a block: the cells of the process

PID = 0
"""0: the block belongs to no process. Written last."""
GENERATION = 1
"""Grows with every process that is given the block."""
PARENT_PID = 2
JOINED = 3
"""`boot_time` when the process joined. A process of the same pid that started later is another one."""
SINCE = 4
"""The same in microseconds since the epoch."""
ENDED = 5
"""1 after another process has seen that this one has ended."""
SLOTS_USED = 6
"""Slots at and above this one have never been used."""
STACK = 7
"""The process's `own_stack`."""
SIZE = 8
"""The pool's `pool_size` in this process."""
MAX_OVERFLOW = 9
"""The pool's `max_overflow` in this process, plus one; 0 for no limit."""
PERMITS = 10
"""Connections of the process that are open or being opened, if the family has a limit (see budget.py)."""
WANTING = 11
"""Threads that want a permit and have found none."""
HOLD_WARNING = 12
"""The pool's `hold_warning` in this process in microseconds, plus one; 0 for none."""
LIMIT = 13
"""The pool's `family_limit` in this process; 0 for none."""
WAITING = 14
"""Threads that wait for a connection: the last cell of the head that can go down."""


class Count(IntEnum):
    """The plain counts of a process, each with its cell."""

    TIMEOUTS = 15
    INVALIDATIONS = 16
    SEVERED = 17
    KEPT = 18
    REPLACED = 19
    REFUSED = 20
    FORKS = 21
    OVERDUE = 22


FORKS = int(Count.FORKS)
_FIRST_COUNT = int(min(Count))
_CLOSED = max(Count) + 1
_INHERITED = _CLOSED + len(CLOSE_REASONS)
_ADOPTIONS = _INHERITED + len(STATES_AT_FORK)
_FAILED = _ADOPTIONS + len(TRIGGERS)
"""A cell for each number of `ErrorTypes`."""
_CREATE = _FAILED + error_types.MOST + 1
_CREATE_SUM = _CREATE + _BUCKETS
HEAD_CELLS = _CREATE_SUM + 1

# -- a slot: the cells of a pool entry, and of the connection that it holds at present

TAKEN = 0
"""1 while a pool entry has the slot."""
_CHANGE = 1
_NUMBER, _FD, _INODE, _SERVER_PID, _OPENED_AT = range(2, 7)
_EARLIER = 7
"""Checkouts that the slot counted before it got this connection."""
_CHANGE_COPY = 8
IN_STATE_SINCE = 9
"""`time.perf_counter_ns()` when the connection was opened, or of its last checkout or checkin."""
THREAD = 10
"""`threading.get_ident()` of the thread that has the connection checked out; 0 while it is idle."""
WAIT = 11
WAIT_SUM = WAIT + _BUCKETS
USE = WAIT_SUM + 1
USE_SUM = USE + _BUCKETS
SLOT_CELLS = USE_SUM + 1

_identity = struct.Struct("8Q")
_NONE = (1 << 64) - 1
"""Stands for None in an unsigned cell."""
_SIGN = 1 << 63


def bucket(nanoseconds: int) -> int:
    """Return the bucket of a histogram that a duration belongs to (see `BOUNDS`)."""
    return min((nanoseconds >> 10).bit_length(), LAST_BUCKET)


def cells_of_a_block(slots: int) -> int:
    """Return the number of cells in a block with so many slots."""
    return HEAD_CELLS + slots * SLOT_CELLS


class Entry(Protocol):
    """A pool entry, as far as its slot is concerned."""

    slot_number: int
    slot: memoryview


class _EntryReference(weakref.ref["Entry"]):
    """A weak reference to an entry that knows the entry's slot.

    By a weak reference's callback a slot becomes free, and not by the entry's ``__del__``: that runs after
    the entry may have been resurrected, and once only.
    """

    __slots__ = ("key", "number")

    key: int
    number: int


class _State(Protocol):
    def __getitem__(self, index: int, /) -> int: ...


_fork_state: _State = (1,)
_noticed_pid: _State = (os.getpid(),)


def watch_forks(fork_state: _State, noticed_pid: _State) -> None:
    """Have each count look whether a fork was noticed.

    :param fork_state: has 0 in a process that was forked and has not noticed it.
    :param noticed_pid: the process, as far as forks were noticed.
    """
    global _fork_state, _noticed_pid
    _fork_state, _noticed_pid = fork_state, noticed_pid


class ProcessCounters:
    """The counters of this process for one pool, in a block of its own.

    Threads: counts are exact for any number of them. Forks: a child has a block of its own, and can't
    write here.
    """

    def __init__(self, cells: memoryview, slots: int) -> None:
        self.cells = cells
        self.is_listed = True
        """False if the family had no room, so that no other process can see the block."""
        self.waiting = LiveCount(cells, WAITING)
        """The threads' waits for a connection."""
        self.wanting = LiveCount(cells, WANTING)
        """Those of them that want a permit of the family's budget."""
        self._slots = slots
        # Not fork.current(): inside an at-fork hook that is still the parent.
        self._pid = os.getpid()
        self._owners: dict[int, _EntryReference] = {}
        """The entries with a slot of their own, by its number."""
        self._sharing: dict[int, _EntryReference] = {}
        """The entries that share slot 0, by `id()`."""

    def are_of(self, pid: int) -> bool:
        """Return whether they are the counters of that process, which may be this one's parent."""
        return self._pid == pid

    def end(self) -> None:
        """Note that this process has the pool no more, though it may run on."""
        if self._is_of_this_process():
            self.cells[ENDED] = 1

    def entries(self) -> list[Entry]:
        """Return the pool entries that have a slot here."""
        found = []
        for reference in [*self._owners.values(), *self._sharing.values()]:
            entry = reference()
            if entry is not None:
                found.append(entry)
        return found

    def add(self, count: Count, number: int = 1) -> None:
        """Add to one of the plain counts."""
        self._add(count, number)

    def add_closed(self, reason: CloseReason) -> None:
        """Count a closed connection."""
        self._add(_CLOSED + CLOSE_REASONS.index(reason))

    def add_inherited(self, states: Sequence[StateAtFork], severed: int) -> None:
        """Count inherited connections, by their states at the fork, and what became of their sockets."""
        for number, state in enumerate(STATES_AT_FORK):
            if state in states:
                self._add(_INHERITED + number, states.count(state))
        if severed:
            self._add(Count.SEVERED, severed)
        if severed < len(states):
            self._add(Count.KEPT, len(states) - severed)

    def add_adoption(self, trigger: Trigger) -> None:
        """Count that this process took the pool over."""
        self._add(_ADOPTIONS + TRIGGERS.index(trigger))

    def add_failed(self, error_type: int) -> None:
        """Count a connect that failed, by the number that `ErrorTypes` has for its error's class."""
        self._add(_FAILED + error_type)

    def add_opened(self, create_time: int) -> None:
        """Count a connection that took `create_time` nanoseconds to open."""
        self._add(_CREATE + bucket(create_time))
        self._add(_CREATE_SUM, create_time)

    def _add(self, cell: int, number: int = 1) -> None:
        # A signal handler may fork when os.getpid() returns, and after no line below. A child that has not
        # noticed its fork does not count here, nor one that has counters of its own.
        if self._is_of_this_process() and (self._pid == _noticed_pid[0]) == (_fork_state[0] != 0):
            self.cells[cell] += number

    def _is_of_this_process(self) -> bool:
        # A child may end what its parent has begun, and the parent counts that itself.
        return self._pid == os.getpid()

    def assign_slot(self, entry: Entry) -> tuple[int, memoryview]:
        """Give a pool entry a slot; return its number and its cells.

        Slot 0 is shared by all entries for which there is no other, and its TAKEN is their number. Their
        counts are right, because CPython does not switch threads between the reading and the writing of
        a cell. Their connections can't be listed.
        """
        if not self._is_of_this_process():
            return 0, SCRATCH  # a child makes the entry, forked in the middle of that
        reference = _EntryReference(entry, self._release_slot)
        reference.key = id(entry)
        number = self._claim_slot(reference)
        slot = self._slot(number)
        if self.cells[SLOTS_USED] <= number:
            self.cells[SLOTS_USED] = number + 1
        if number:
            slot[TAKEN] = 1
        return number, slot

    def _claim_slot(self, reference: _EntryReference) -> int:
        for number in range(1, self._slots):
            reference.number = number
            if number not in self._owners and self._owners.setdefault(number, reference) is reference:
                return number
        reference.number = 0
        self._sharing[reference.key] = reference
        self._count_sharing()
        return 0

    def _slot(self, number: int) -> memoryview:
        first = HEAD_CELLS + number * SLOT_CELLS
        return self.cells[first : first + SLOT_CELLS]

    def _count_sharing(self) -> None:
        while self.cells[HEAD_CELLS + TAKEN] != len(self._sharing):  # another thread has counted meanwhile
            self.cells[HEAD_CELLS + TAKEN] = len(self._sharing)

    def has_slot(self, entry: Entry) -> bool:
        """Return whether an entry has a slot here; not if it was collected, and then resurrected."""
        return self._reference(entry) is not None

    def release_slot(self, entry: Entry) -> None:
        """Make an entry's slot free, since it has left its pool."""
        reference = self._reference(entry)
        if reference is not None:
            self._release_slot(reference)

    def _reference(self, entry: Entry) -> _EntryReference | None:
        reference = self._owners.get(entry.slot_number) or self._sharing.get(id(entry))
        return reference if reference is not None and reference() is entry else None

    def _release_slot(self, reference: weakref.ref[Entry]) -> None:
        """Make a collected entry's slot free for the next one, which goes on with its counts."""
        assert isinstance(reference, _EntryReference)
        if not self._is_of_this_process():
            return
        if not reference.number:
            if self._sharing.get(reference.key) is reference:
                self._sharing.pop(reference.key, None)
            self._count_sharing()
            return
        slot = self._slot(reference.number)
        try:
            # Without a call in between, so that no other thread has the slot yet. The last line frees it: if
            # this is interrupted, `make_good` begins again.
            if self._owners[reference.number] is reference:
                slot[_NUMBER] = 0
                slot[THREAD] = 0
                slot[TAKEN] = 0
                del self._owners[reference.number]
        except KeyError:
            pass

    def make_good(self) -> None:
        """Bring up to date what interrupted callbacks have left."""
        for reference in [*self._owners.values(), *self._sharing.values()]:
            if reference() is None:
                self._release_slot(reference)
        self._count_sharing()
        self.waiting.write()
        self.wanting.write()


def write_connection(slot: memoryview, tag: ConnectionTag | None) -> None:
    """Write the identity of the connection that a slot holds; None if it holds none."""
    change = (slot[_CHANGE_COPY] + 1) & 0xFFFFFFFF
    slot[_CHANGE] = change
    if tag is None:
        numbers: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    else:
        slot[IN_STATE_SINCE] = time.perf_counter_ns()
        numbers = (
            int(tag.connection_id.partition("-")[2]),
            _NONE if tag.fd is None else tag.fd,
            _NONE if tag.socket_inode is None else tag.socket_inode,
            # PgBouncer makes up random ones, and libpq returns them as signed numbers.
            _NONE if tag.server_pid is None else tag.server_pid & _NONE,
            int(tag.opened_at * 1e6),
            sum(slot[WAIT:WAIT_SUM]),
        )
    _identity.pack_into(slot, _CHANGE * 8, change, *numbers, change)


SCRATCH = memoryview(bytearray(SLOT_CELLS * 8)).cast("Q")
"""The slot of all inherited entries: their counts belong to another process and are discarded."""


# -- reading


def copy_block(cells: memoryview) -> memoryview:
    """Return a copy of the used part of a block, in which no connection is half written."""
    length = HEAD_CELLS + cells[SLOTS_USED] * SLOT_CELLS
    for _ in range(3):
        first, second = cells[:length].tobytes(), cells[:length].tobytes()
        if _identities(first) == _identities(second):
            break
    return memoryview(second).cast("Q")


def _identities(block: bytes) -> list[bytes]:
    starts = range(HEAD_CELLS * 8, len(block), SLOT_CELLS * 8)
    return [block[at + _CHANGE * 8 : at + (_CHANGE_COPY + 1) * 8] for at in starts]


def pool_stats(
    cells: list[int],
    sums: list[int],
    name: str,
    *,
    alive: bool,
    thread_names: Mapping[int, str],
    errors: Sequence[str],
) -> PoolStats:
    """Return the snapshot of one process.

    :param cells: a copy of its block.
    :param sums: what `sum_slots` made of that copy.
    :param errors: the names of `ErrorTypes`.
    """
    at, now = time.time(), time.perf_counter_ns()
    connections = []
    # The entries that share a slot. Its cells are read one after the other, so their sums may differ
    # by what happens in between.
    shared = cells[HEAD_CELLS : HEAD_CELLS + SLOT_CELLS]
    taken = sum(shared[:1])
    used = beyond_used = min(taken, max(0, sum(shared[WAIT:WAIT_SUM]) - sum(shared[USE:USE_SUM])))
    beyond_idle = taken - beyond_used
    for first in range(HEAD_CELLS + SLOT_CELLS, len(cells), SLOT_CELLS):
        slot = cells[first : first + SLOT_CELLS]
        taken += slot[TAKEN]
        used += slot[THREAD] != 0
        if not slot[_NUMBER] or slot[_CHANGE] != slot[_CHANGE_COPY]:
            continue
        tag = ConnectionTag(
            connection_id=f"{cells[PID]}-{slot[_NUMBER]}",
            owner_pid=cells[PID],
            fd=None if slot[_FD] == _NONE else slot[_FD],
            socket_inode=None if slot[_INODE] == _NONE else slot[_INODE],
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
    overdue = None
    if cells[HOLD_WARNING]:
        held = [each.in_state for each in connections if each.state == "used"]
        overdue = sum(seconds * 1e6 >= cells[HOLD_WARNING] - 1 for seconds in held) if alive else 0
    return PoolStats(
        pool=name,
        pid=cells[PID],
        parent_pid=cells[PARENT_PID] or None,
        alive=alive,
        since=cells[SINCE] / 1e6,
        size=cells[SIZE],
        max_overflow=cells[MAX_OVERFLOW] - 1,
        overflow=taken - cells[SIZE] if cells[SIZE] else 0,
        idle=sum(each.thread_id is None for each in connections) + beyond_idle if alive else 0,
        used=used if alive else 0,
        waiting=cells[WAITING] if alive else 0,
        overdue=overdue,
        counters=counters(sums, errors),
        connections=tuple(connections) if alive else (),
        permits=cells[PERMITS] if alive else 0,
        wanting=cells[WANTING] if alive else 0,
    )


def sum_slots(cells: list[int]) -> list[int]:
    """Return a block with a single slot, which has the counts of all slots together."""
    slots = [cells[first + WAIT : first + SLOT_CELLS] for first in range(HEAD_CELLS, len(cells), SLOT_CELLS)]
    counted = map(sum, zip(*slots, strict=True)) if slots else [0] * (SLOT_CELLS - WAIT)
    return [*cells[:HEAD_CELLS], *[0] * WAIT, *counted]


def add_blocks(sums: list[list[int]]) -> list[int]:
    """Return the counts of several blocks together, from the `sum_slots` of each."""
    return [*map(sum, zip(*sums, strict=True))]


def counters(sums: list[int], errors: Sequence[str]) -> Counters:
    """Return the counts as a snapshot, from `sum_slots` or `add_blocks`.

    :param errors: the names of `ErrorTypes`.
    """
    slot = sums[HEAD_CELLS:]
    # At once: to look up a member of an enumeration costs more than to read a cell.
    timeouts, invalidations, severed, kept, replaced, refused, forks, overdue = sums[_FIRST_COUNT:_CLOSED]
    failed: dict[str, int] = {}
    if any(sums[_FAILED:_CREATE]):  # as a rule there is none
        failed = dict(zip(errors, sums[_FAILED:_CREATE], strict=False))
        failed[error_types.OTHER] = sums[_FAILED + error_types.MOST]
    create, wait, use = sums[_CREATE:_CREATE_SUM], slot[WAIT:WAIT_SUM], slot[USE:USE_SUM]
    return Counters(
        opened=sum(create),
        failed={name: count for name, count in failed.items() if count},
        closed=dict(zip(CLOSE_REASONS, sums[_CLOSED:], strict=False)),
        checkouts=sum(wait),
        checkins=sum(use),
        timeouts=timeouts,
        invalidations=invalidations,
        inherited=dict(zip(STATES_AT_FORK, sums[_INHERITED:], strict=False)),
        severed=severed,
        kept=kept,
        replaced=replaced,
        refused=refused,
        adoptions=dict(zip(TRIGGERS, sums[_ADOPTIONS:], strict=False)),
        forks=forks,
        overdue=overdue,
        create_time=Histogram(tuple(create), sums[_CREATE_SUM] / 1e9),
        wait_time=Histogram(tuple(wait), slot[WAIT_SUM] / 1e9),
        use_time=Histogram(tuple(use), slot[USE_SUM] / 1e9),
    )


def fold(into: memoryview, block: memoryview) -> None:
    """Add the counts of a block to those of another, which has one slot."""
    sums = sum_slots(block.tolist())
    for cell in itertools.chain(range(WAITING + 1, HEAD_CELLS), range(HEAD_CELLS + WAIT, len(sums))):
        into[cell] += sums[cell]
    into[SLOTS_USED] = 1


def _signed_or_none(cell: int) -> int | None:
    if cell < _SIGN:
        return cell
    return None if cell == _NONE else cell - (1 << 64)
