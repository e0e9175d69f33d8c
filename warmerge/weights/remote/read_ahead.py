"""Ask far folders for what a pass over the weights will read, before it is needed and in large pieces.

A merge reads tiles of a megabyte, in an order that is known from the start. Asked for one by one each would wait for
the network; here they are cut out of windows that are already on their way. Nothing is asked for twice, and what has
been read is forgotten: memory stays within a fixed amount, whatever the size of the checkpoints.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from warmerge.weights.checkpoint import Stored
from warmerge.weights.folder import Folder, Reader, read_bytes

# Bytes that all windows together may take, requests under way at once, bytes of one request.
MEMORY = 128 * 2**20
_REQUESTS = 16
_LARGEST_WINDOW = 8 * 2**20
_SMALLEST_WINDOW = 2**20
# Two small pieces this near to each other are cheaper in one request than in two.
_NEAR = 256 * 1024


class Window(NamedTuple):
    """Bytes start..stop of a file."""

    file: str
    start: int
    stop: int


class Piece(NamedTuple):
    """Some bytes of a file."""

    folder: Folder
    file: str
    offset: int
    length: int


def read_pieces(pieces: Sequence[Piece]) -> list[bytes]:
    """The bytes of each piece. From far folders neighbouring ones come in one request, several requests at once."""
    found = _near(pieces)

    def fetch(group: Sequence[int]) -> None:
        folder, file, start, _ = pieces[group[0]]
        data = read_bytes(folder, file, start, max(pieces[i].offset + pieces[i].length for i in group) - start)
        for i in group:
            found[i] = data[pieces[i].offset - start :][: pieces[i].length]

    groups = _neighbours(pieces)
    if groups:
        with ThreadPoolExecutor(_REQUESTS) as pool:
            for done in [pool.submit(fetch, group) for group in groups]:
                done.result()
    return found


def _near(pieces: Sequence[Piece]) -> list[bytes]:
    """The bytes of pieces on this machine, nothing for the others; in the order of the files, each opened once."""
    readers: dict[str, Reader] = {}
    found = [b""] * len(pieces)
    near = [i for i, piece in enumerate(pieces) if not piece.folder.far and piece.length]
    try:
        for i in sorted(near, key=lambda i: (pieces[i].folder.identity, pieces[i].file, pieces[i].offset)):
            folder, file, offset, length = pieces[i]
            if folder.identity not in readers:
                readers[folder.identity] = folder.reader()
            data = bytearray(length)
            readers[folder.identity].readinto(file, offset, memoryview(data))
            found[i] = bytes(data)
    finally:
        for reader in readers.values():
            reader.close()
    return found


def _neighbours(pieces: Sequence[Piece]) -> list[list[int]]:
    """The pieces of far folders (their numbers) that lie so near to each other that one request is to bring them."""
    far = [i for i, piece in enumerate(pieces) if piece.folder.far and piece.length]
    groups: list[list[int]] = []
    end = ("", "", 0)
    for i in sorted(far, key=lambda i: (pieces[i].folder.identity, pieces[i].file, pieces[i].offset)):
        folder, file, offset, length = pieces[i]
        if end[:2] == (folder.identity, file) and offset - end[2] <= _NEAR:
            groups[-1].append(i)
        else:
            groups.append([i])
        end = (folder.identity, file, offset + length)
    return groups


class ReadAhead:
    """Readers of far folders that know what will be read of them, for one pass: `parts` are whole tensors, in order."""

    def __init__(self, parts: Iterable[Stored]) -> None:
        wanted: dict[str, list[Stored]] = {}
        for part in parts:
            if part.folder.far and part.nbytes:
                wanted.setdefault(part.folder.identity, []).append(part)
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(_REQUESTS) if wanted else None
        each = MEMORY // max(len(wanted), 1)
        size = min(_LARGEST_WINDOW, max(_SMALLEST_WINDOW, each // 4))
        # Beside those ahead, the window that is being read, and one that a slower thread still reads, are in memory.
        ahead = max(1, each // size - 2)
        self._lanes = {
            identity: _Lane(self._pool, stored[0].folder.reader(self._pause), stored, size, ahead)
            for identity, stored in wanted.items()
            if self._pool is not None
        }

    def reader(self, folder: Folder) -> Reader:
        """A reader of `folder` for one thread."""
        lane = self._lanes.get(folder.identity)
        return folder.reader(self._pause) if lane is None else lane

    def _pause(self, seconds: float) -> bool:
        """Waits between two tries; whether to give up."""
        return self._stopped.wait(seconds)

    def close(self) -> None:
        """Forgets everything, and gives up what is under way."""
        self._stopped.set()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def windows(parts: Iterable[Stored], size: int) -> list[Window]:
    """The bytes of these tensors in order, each once, neighbours joined, cut into windows of at most `size` bytes."""
    runs: list[Window] = []
    for part in {(part.file, part.offset): part for part in parts}.values():
        stop = part.offset + part.nbytes
        if runs and (runs[-1].file, runs[-1].stop) == (part.file, part.offset):
            runs[-1] = runs[-1]._replace(stop=stop)
        else:
            runs.append(Window(part.file, part.offset, stop))
    return [
        Window(run.file, start, min(start + size, run.stop))
        for run in runs
        for start in range(run.start, run.stop, size)
    ]


class _Lane:
    """One folder's windows, shared by all threads: reading in one of them asks for the next ones too.

    Each byte is expected to be read as often as `parts` name it. What is read more often, or was not announced, is
    asked for by itself.
    """

    def __init__(
        self, pool: ThreadPoolExecutor, reader: Reader, parts: Sequence[Stored], size: int, ahead: int
    ) -> None:
        self._pool, self._reader, self._ahead = pool, reader, ahead
        self._windows = windows(parts, size)
        # Where each file's windows begin, in order, and which windows these are.
        self._places: dict[str, list[tuple[int, int]]] = {}
        for number, window in enumerate(self._windows):
            bisect.insort(self._places.setdefault(window.file, []), (window.start, number))
        self._left = [0] * len(self._windows)
        for part in parts:
            position, stop = part.offset, part.offset + part.nbytes
            while position < stop:
                covering = self._covering(part.file, position)
                assert covering is not None, "windows are made of the same parts"
                end = min(stop, self._windows[covering].stop)
                self._left[covering] += end - position
                position = end
        self._data: dict[int, Future[memoryview]] = {}
        self._lock = threading.Lock()

    def readinto(self, file: str, offset: int, buffer: memoryview) -> None:
        """As `Folder.readinto`."""
        while len(buffer):
            number = self._covering(file, offset)
            future = None if number is None else self._ask_for(number)
            if number is None or future is None:
                self._reader.readinto(file, offset, buffer)
                return
            window = self._windows[number]
            count = min(len(buffer), window.stop - offset)
            begin = offset - window.start
            buffer[:count] = future.result()[begin : begin + count]
            with self._lock:
                self._left[number] -= count
                if self._left[number] <= 0:
                    self._data.pop(number, None)
            offset, buffer = offset + count, buffer[count:]

    def close(self) -> None:
        """Other threads read on; `ReadAhead.close` ends it."""

    def _covering(self, file: str, offset: int) -> int | None:
        """Which window holds this byte."""
        places = self._places.get(file, [])
        position = bisect.bisect_right(places, (offset, len(self._windows))) - 1
        number = places[position][1] if position >= 0 else None
        return number if number is not None and offset < self._windows[number].stop else None

    def _ask_for(self, number: int) -> Future[memoryview] | None:
        """The window, on its way with the ones after it; None when it has been read to its end and forgotten, or when
        nothing is fetched ahead any more: then who still reads asks for it alone, and gives up at the first fault."""
        with self._lock:
            for other in range(number, min(number + 1 + self._ahead, len(self._windows))):
                if other not in self._data and self._left[other] > 0:
                    try:
                        self._data[other] = self._pool.submit(self._fetch, self._windows[other])
                    except RuntimeError:  # `ReadAhead.close` came in between, from another thread
                        break
            return self._data.get(number)

    def _fetch(self, window: Window) -> memoryview:
        data = memoryview(bytearray(window.stop - window.start))
        self._reader.readinto(window.file, window.start, data)
        return data
