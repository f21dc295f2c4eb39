"""Bytes in motion: reads that run ahead of their use, and parts that are uploaded while the next one fills.

Both keep a fixed number of buffers, so their memory does not depend on the size of what passes through. Reading and
sending happen in threads (both release the interpreter lock); the caller's thread computes.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from .buffers import Buffers
from .traffic import carried

PART_BYTES = 8 << 20  # parts are this large at least, and less than twice that (S3 wants 5 MiB)
ONE_PUT_BYTES = 2 * PART_BYTES  # smaller objects go up in one request

_SENDING = 2  # parts on their way at once
PARTS_IN_FLIGHT = _SENDING + 1  # with the one that fills
_MOST_AHEAD = 16  # requests: the smallest, too, takes a buffer
_counting = threading.Lock()  # several threads read and send
_T = TypeVar("_T")


class Sized(Protocol):
    """What is read: how many bytes it has."""

    @property
    def bytes(self) -> int:
        """The length."""
        ...


_Request = TypeVar("_Request", bound=Sized)


@dataclass
class Stage:
    """What one kind of work took: bytes moved, wall seconds (of all threads together) and CPU seconds."""

    bytes: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def timed(self, size_bytes: int, work: Callable[[], _T]) -> _T:
        """`work()`, counted."""
        wall, cpu = time.perf_counter(), time.thread_time()
        result = work()
        wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
        with _counting:
            self.cpu_seconds += cpu
            self.seconds += wall
            self.bytes += size_bytes
        return result


@dataclass
class Stages:
    """Where the time of a stream went; `wait` is the caller's, for bytes that were not there or not gone yet."""

    read: Stage = field(default_factory=Stage)
    compute: Stage = field(default_factory=Stage)
    write: Stage = field(default_factory=Stage)
    wait: Stage = field(default_factory=Stage)

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Plain JSON values, rounded to microseconds."""
        return {name: {k: round(v, 6) for k, v in vars(stage).items()} for name, stage in vars(self).items()}


def read_ahead(
    requests: Iterable[_Request],
    read: Callable[[_Request, memoryview], None],
    stages: Stages,
    *,
    buffers: Buffers,
    ahead_bytes: int,
) -> Iterator[tuple[_Request, memoryview]]:
    """Every request in order with the bytes that `read` filled in; the view is valid until the next one is asked for.

    Requests of `ahead_bytes` in all are being read or wait to be used, at least one and at most 16. An error of `read`
    is raised in its turn.
    """
    waiting: deque[tuple[_Request, memoryview, Future[None]]] = deque()
    held_bytes = 0
    source = iter(requests)
    upcoming = next(source, None)
    with ThreadPoolExecutor(max_workers=4, thread_name_prefix="read") as pool:
        try:
            while upcoming is not None or waiting:
                while upcoming is not None and (
                    not waiting or (len(waiting) < _MOST_AHEAD and held_bytes + upcoming.bytes <= ahead_bytes)
                ):
                    view = buffers.take(upcoming.bytes)
                    held_bytes += upcoming.bytes
                    future = pool.submit(carried(_filled), stages.read, read, upcoming, view)
                    waiting.append((upcoming, view, future))
                    upcoming = next(source, None)
                request, view, future = waiting[0]
                stages.wait.timed(0, future.result)
                yield request, view
                waiting.popleft()
                held_bytes -= request.bytes
                buffers.give_back(view)
        finally:
            under_way = [future for _, _, future in waiting if not future.cancel()]
            for future in under_way:
                future.exception()  # it still writes into its buffer
            for _, view, _ in waiting:
                buffers.give_back(view)


def _filled(
    stage: Stage, read: Callable[[_Request, memoryview], None], request: _Request, view: memoryview
) -> None:
    if request.bytes:
        stage.timed(request.bytes, lambda: read(request, view))


def part_sizes(size_bytes: int, part_bytes: int = PART_BYTES) -> list[int]:
    """Lengths of the parts of `size_bytes`: about equal, from `part_bytes` to less than twice that, or one part."""
    count = max(1, size_bytes // part_bytes)
    each, longer = divmod(size_bytes, count)
    return [each + (index < longer) for index in range(count)]


class PartWriter:
    """Cuts a stream into parts of given sizes and sends each as soon as it is full, two at a time.

    `send(number, offset, data)` uploads one part and returns its etag; numbers count from `first_number`, offsets from
    `offset_bytes`. Use as a context: leaving it waits for what is on its way. `etags` are all once `finish` returned.
    """

    def __init__(
        self,
        send: Callable[[int, int, memoryview], str],
        sizes: Sequence[int],
        stages: Stages,
        *,
        buffers: Buffers,
        first_number: int = 1,
        offset_bytes: int = 0,
    ) -> None:
        self._send = send
        self._sizes = deque(sizes)
        self._stages = stages
        self._buffers = buffers
        self._number = first_number
        self._offset = offset_bytes
        self._pool = ThreadPoolExecutor(max_workers=_SENDING, thread_name_prefix="send")
        self._sending: deque[Future[str]] = deque()
        self._part: memoryview | None = None
        self._filled = 0
        self.etags: list[str] = []

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)  # what waits for a thread is sent as well: that gives its buffer back
        if self._part is not None:
            self._buffers.give_back(self._part)
            self._part = None

    def write(self, data: memoryview) -> None:
        """Appends bytes; blocks while two parts are on their way. Raises what `send` raised."""
        while len(data):
            if self._part is None:
                self._part = self._buffers.take(self._sizes.popleft())
            taken = min(len(data), len(self._part) - self._filled)
            self._part[self._filled : self._filled + taken] = data[:taken]
            self._filled += taken
            data = data[taken:]
            if self._filled == len(self._part):
                self._ship()

    def finish(self) -> list[str]:
        """The etags of all parts, once the last one has arrived. The bytes written must be those of the sizes given."""
        assert self._part is None, f"{self._filled} bytes of an unfinished part"
        assert not self._sizes, f"{len(self._sizes)} parts were never written"
        while self._sending:
            self._collect()
        return self.etags

    def _ship(self) -> None:
        assert self._part is not None
        while len(self._sending) >= _SENDING:
            self._collect()
        self._sending.append(self._pool.submit(carried(self._sent), self._number, self._offset, self._part))
        self._number += 1
        self._offset += len(self._part)
        self._part, self._filled = None, 0

    def _sent(self, number: int, offset: int, data: memoryview) -> str:
        try:
            return self._stages.write.timed(len(data), lambda: self._send(number, offset, data))
        finally:
            self._buffers.give_back(data)

    def _collect(self) -> None:
        self.etags.append(self._stages.wait.timed(0, self._sending.popleft().result))
