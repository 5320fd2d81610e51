"""A lock for threads that come again and again."""

from __future__ import annotations

from threading import Lock


class Turns:
    """As threading.Lock, but nobody takes it twice in a row while another waits.

    A Lock goes to whoever asks at the right moment, and that is the thread that has just released it and steps in a
    loop. Here who waits for the lock stands in the door, through which all others have to come.
    """

    def __init__(self) -> None:
        self._door, self._lock = Lock(), Lock()

    def __enter__(self) -> None:
        with self._door:
            self._lock.acquire()

    def __exit__(self, *raised: object) -> None:
        self._lock.release()

    def try_enter(self) -> bool:
        """Take the lock where nobody has it; safe at any time, in a finalizer too."""
        return self._lock.acquire(blocking=False)
