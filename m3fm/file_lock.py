# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""A lock on a file that a run writes for long."""

import os
from pathlib import Path
from typing import BinaryIO

__all__ = ["FileLock"]


class FileLock:
    """Keeps other runs from a file, until it is released or the process ends in whatever way.

    Args:
        path: The file; the lock is a file beside it, with ".lock" after its name.

    Raises:
        ValueError: If another process holds the lock.
    """

    def __init__(self, path: Path):
        self._path = path.with_name(f"{path.name}.lock")
        while True:
            self._file = open(self._path, "ab")  # noqa: SIM115 - closed by release
            try:
                is_held = not _try_lock(self._file)
                # A run that ended in this moment took away the file that was opened.
                is_gone = not is_held and not self._is_there()
            except BaseException:
                self._file.close()
                raise
            if not is_held and not is_gone:
                return
            self._file.close()
            if is_held:
                raise ValueError(f"{path} is being written by another run: expected another output.")

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Lets others in."""
        if self._file.closed:
            return
        if os.name == "nt":  # an open file cannot be removed there
            self._file.close()
        try:
            self._path.unlink(missing_ok=True)
        except OSError:  # on Windows, another run has opened it in the meantime
            pass
        finally:
            self._file.close()


def _try_lock(file: BinaryIO) -> bool:
    """Locks a file unless another process has; file systems that cannot lock let everyone in."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        # Unlike `flock`, not shared with the processes that this one forks, which may outlive it for a moment.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True
