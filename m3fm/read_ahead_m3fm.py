# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Read studies ahead of the model, in worker processes, in order.

Processes and not threads: parsing DICOM and TIFF holds Python's lock, what silences warnings is not safe among
threads, and a decoder in C that crashes takes its process with it. Each worker has one study at a time, so that a
crash or a hang is the error of that study, and the others go on. What passes between the processes is pickled, as
multiprocessing does: it comes from the process's own child or parent, never from a file.
"""

import contextlib
import io
import multiprocessing
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

# Ample for a CT from a slow network drive.
TIMEOUT_SECONDS = 300.0
# Larger items are arrays or images in memory, which are sooner read here than copied to another process.
_MAX_ITEM_BYTES = 1 << 25


@dataclass(frozen=True)
class Result:
    """What became of one item.

    Attributes:
        value: What was read; None where reading failed.
        error: Why it failed: what `read` raised, or a `ValueError` that says that its process died or took too long.
            None where it did not.
    """

    value: Any = None
    error: Exception | None = None


def read_ahead(
    read: Callable[[Any], Any],
    items: Iterable[Any],
    workers: int,
    ahead: int | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> Iterator[Result]:
    """Yields what `read` makes of each item, in their order, while workers read the next ones.

    `items` is consumed as far as is read ahead. Items that cannot be sent to another process, or are large, are read
    in this one when it is their turn. Closing the iterator ends the workers.

    Args:
        read: Takes an item. Has to be picklable where processes are not forked (macOS, Windows), with little in it:
            an image processor, say, and no model. What it returns has to be picklable too.
        items: Of any kind; paths best.
        workers: Processes that read; 0 reads in this one, each item when it is asked for.
        ahead: Most items that are read, or being read, before they are asked for; None: twice as many as workers. A
            model that takes batches is never kept waiting with the size of a batch, or more.
        timeout: Seconds that a worker may take for an item before it is ended.

    Raises:
        ValueError: If workers, ahead or timeout is out of range.
    """
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 0:
        raise ValueError(f"Expected workers to be a whole number >= 0, got {workers!r}.")
    ahead = max(1, 2 * workers) if ahead is None else ahead
    if ahead < 1 or not timeout > 0:
        raise ValueError(f"Expected ahead >= 1 and a timeout above 0 s, got {ahead!r} and {timeout!r}.")
    return _read_with_workers(read, items, workers, ahead, timeout) if workers else _read_here(read, items)


def _read_here(read: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Result]:
    for item in items:
        yield _attempt(read, item)


def _attempt(read: Callable[[Any], Any], item: Any) -> Result:
    try:
        return Result(read(item))
    except Exception as error:  # which of them are the fault of the item is for the caller to say
        return Result(error=error)


def _read_with_workers(
    read: Callable[[Any], Any], items: Iterable[Any], workers: int, ahead: int, timeout: float
) -> Iterator[Result]:
    pool = _Pool(read, workers, timeout)
    waiting: deque[tuple[Any, Future[Result] | None]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(item)))
            if len(waiting) > ahead:
                yield _result(read, *waiting.popleft())
        while waiting:
            yield _result(read, *waiting.popleft())
    finally:
        pool.close()


def _result(read: Callable[[Any], Any], item: Any, future: "Future[Result] | None") -> Result:
    return _attempt(read, item) if future is None else future.result()


class _Pool:
    """Gives items to processes, each watched by a thread of this one."""

    def __init__(self, read: Callable[[Any], Any], workers: int, timeout: float):
        self._read = read
        self._timeout = timeout
        self._size = workers
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="m3fm-read-ahead")
        self._workers: list[_Worker] = []
        self._idle: SimpleQueue[int] = SimpleQueue()  # places in the list
        self._closing = False
        # A forked worker holds this process's ends of the pipes there are. Started one at a time, no two can hold
        # each other's, and all of them see when this process has ended, even if it was killed.
        self._starting = threading.Lock()

    def submit(self, item: Any) -> "Future[Result] | None":
        """Has an item read; returns None if it is to be read here."""
        try:
            request = _encode(item, _MAX_ITEM_BYTES)
        except Exception:  # pickling raises many kinds
            return None
        if len(self._workers) < self._size:
            with self._starting:
                self._workers.append(_Worker(self._read))
            self._idle.put(len(self._workers) - 1)
        return self._threads.submit(self._ask, request)

    def _ask(self, request: bytes) -> Result:
        place = self._idle.get()
        try:
            if self._workers[place].has_ended and not self._closing:
                with self._starting:
                    self._workers[place] = _Worker(self._read)
            return self._workers[place].ask(request, self._timeout)
        finally:
            self._idle.put(place)

    def close(self) -> None:
        """Ends the workers, whatever they are at."""
        self._closing = True
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.end()  # those too that were started in the meantime


class _Worker:
    """A process that reads one item at a time."""

    def __init__(self, read: Callable[[Any], Any]):
        context = multiprocessing.get_context()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(read, theirs, self._pipe), daemon=True)
        self._process.start()
        theirs.close()
        self._is_ready = False
        self.has_ended = False

    def ask(self, request: bytes, timeout: float) -> Result:
        """Has one item read.

        Raises:
            RuntimeError: If the process did not come to read anything.
        """
        try:
            if not self._is_ready:
                self._pipe.recv_bytes()
                self._is_ready = True
            self._pipe.send_bytes(request)
            if self._pipe.poll(timeout):
                return pickle.loads(self._pipe.recv_bytes())
            reason = f"reading took longer than {timeout:g} s"
        except (EOFError, OSError):
            self._process.join(1)
            cause = _cause(self._process.exitcode)
            if not self._is_ready:
                raise RuntimeError(
                    f"A process that reads ended at its start{cause}: expected a main module that can be imported "
                    '(`if __name__ == "__main__":`), or no workers.'
                ) from None
            reason = f"reading ended its process{cause}"
        self.end()
        return Result(error=ValueError(reason))

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        self.has_ended = True
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _cause(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return "" if exitcode is None else f" (exit code {exitcode})"
    names = {each.value: each.name for each in signal.Signals}
    name = names.get(-exitcode, f"signal {-exitcode}")
    return f" ({name}, as where memory runs out)" if name == "SIGKILL" else f" ({name})"


def _work(read: Callable[[Any], Any], pipe: Any, other_end: Any) -> None:
    """Answers requests until the asking process closes the pipe, or ends."""
    other_end.close()  # else this process itself keeps the pipe open
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the asking one ends this one
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):
        pipe.send_bytes(b"ready")
        while True:
            pipe.send_bytes(_answer(read, pipe.recv_bytes()))


def _answer(read: Callable[[Any], Any], request: bytes) -> bytes:
    result = _attempt(lambda encoded: read(pickle.loads(encoded)), request)
    try:
        answer = _encode(result)
        if result.error is not None:
            pickle.loads(answer)  # some exceptions can be pickled but not restored
        return answer
    except Exception as error:  # pickling raises many kinds
        reason = f"what was read cannot be sent: {error}" if result.error is None else str(result.error)
        return _encode(Result(error=ValueError(reason)))


class _Pickler(pickle.Pickler):
    """Sends tensors by value: shared memory is scarce in containers, and would end with a worker that dies."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is torch.Tensor and value.dtype is not torch.bfloat16:
            return torch.from_numpy, (value.detach().numpy(),)
        return NotImplemented


class _Buffer(io.BytesIO):
    def __init__(self, limit: int | None):
        super().__init__()
        self._limit = limit

    def write(self, data: Any) -> int:
        if self._limit is not None and self.tell() + memoryview(data).nbytes > self._limit:
            raise ValueError("too large")
        return super().write(data)


def _encode(value: Any, limit: int | None = None) -> bytes:
    buffer = _Buffer(limit)
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


__all__ = ["TIMEOUT_SECONDS", "Result", "read_ahead"]
