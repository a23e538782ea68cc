"""`LiveCount`: a cell of shared memory that has the number of certain objects which are alive."""

from __future__ import annotations

import os
import weakref


class LiveCount:
    """Keeps a cell at the number of certain objects that are alive.

    An object counts until it is collected, so an interrupt can't leave it counted.
    """

    def __init__(self, cells: memoryview, cell: int) -> None:
        self._cells = cells
        self._cell = cell
        self._pid = os.getpid()
        self._references: set[weakref.ref[object]] = set()

    def add(self, counted: object) -> None:
        """Count an object."""
        reference = weakref.ref(counted, self._forget)
        hash(reference)  # while it can be
        self._references.add(reference)
        self.write()

    def write(self) -> None:
        """Write the number. It is right already, unless a callback was interrupted."""
        if self._pid != os.getpid():
            return  # a child collects what its parent has counted
        for reference in list(self._references):
            if reference() is None:
                self._references.discard(reference)
        while self._cells[self._cell] != len(self._references):  # another thread has counted meanwhile
            self._cells[self._cell] = len(self._references)

    def _forget(self, reference: weakref.ref[object]) -> None:
        self._references.discard(reference)
        self.write()
