"""The folder of compiled steps: private, each step one file that appears at once, bounded in number, size and age."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

MAX_FILES, MAX_BYTES, MAX_DAYS = 128, 4 << 30, 90
_MAX_HOURS_OF_BUILDING = 24
_NUM_LOCKS = 64
_BUILDING = ".building-"


class UnsafeFolder(Exception):
    """A folder in which others can put code; the message says why, as the end of a sentence about it."""


class StepFolder:
    """Files by name, for this user alone. What is written replaces a file at once; what is read is read whole.

    So no process ever sees half of a file, or has one removed while it loads it.
    """

    def __init__(self, path: Path) -> None:
        """Makes the folder where there is none. Raises UnsafeFolder or OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        _check_private(path.stat())
        self._path = path

    def read(self, name: str) -> bytes | None:
        """None where there is no such file. Raises UnsafeFolder or OSError."""
        path = self._path / name
        try:
            with path.open("rb") as file:
                _check_private(os.fstat(file.fileno()))
                data = file.read()
        except FileNotFoundError:
            return None
        with suppress(OSError):
            os.utime(path)  # the least recently used is removed first
        return data

    def find(self, prefix: str) -> list[str]:
        """The names of the files that begin with `prefix`, in order."""
        return sorted(path.name for path in self._path.glob(f"{prefix}*"))

    def write(self, name: str, data: bytes) -> None:
        """Raises OSError, and then changes nothing."""
        handle, building = tempfile.mkstemp(prefix=_BUILDING, dir=self._path)  # with mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(building, self._path / name)
        except BaseException:
            Path(building).unlink(missing_ok=True)
            raise

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder in this one, for as long as it is open."""
        with tempfile.TemporaryDirectory(prefix=_BUILDING, dir=self._path, ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    @contextmanager
    def lock(self, name: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """Held by one process and thread at a time for one name, and seldom for two names that share it."""
        number = sum(name.encode()) % _NUM_LOCKS  # files of locks cannot be removed safely, so there are only so many
        lock = FileLock(self._path / f".lock-{number}", mode=0o600)
        with suppress(OSError, NotImplementedError):  # where files cannot be locked, both make the step
            try:
                lock.acquire(blocking=False)
            except Timeout:
                on_wait()
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def prune(self) -> None:
        """Remove the least recently used beyond MAX_FILES, MAX_BYTES and MAX_DAYS, and what was left half written."""
        now, num_files, num_bytes = time.time(), 0, 0
        for path, status in sorted(self._entries(), key=lambda entry: -entry[1].st_mtime):
            hours = (now - status.st_mtime) / 3600
            if path.name.startswith(_BUILDING):
                is_over = hours > _MAX_HOURS_OF_BUILDING
            else:
                num_files, num_bytes = num_files + 1, num_bytes + status.st_size
                is_over = num_files > MAX_FILES or num_bytes > MAX_BYTES or hours > 24 * MAX_DAYS
            if is_over:
                _remove(path)

    def _entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._path.iterdir():
            if not path.name.startswith(".lock-"):
                try:
                    yield path, path.lstat()
                except FileNotFoundError:  # another process removes as well
                    continue


def _check_private(status: os.stat_result) -> None:
    if not hasattr(os, "getuid"):  # Windows, where a user's folders are his own
        return
    if status.st_uid != os.getuid():
        raise UnsafeFolder("it belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsafeFolder("others can write to it (chmod go-w)")


def _remove(path: Path) -> None:
    """A file, or a folder of an earlier version; one in use on Windows stays."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        return
