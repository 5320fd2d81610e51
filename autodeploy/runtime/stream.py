"""Answers as they are made."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from threading import Lock

from autodeploy.runtime.engine import Engine
from autodeploy.runtime.requests import Request, RequestOutput


class Stream(Iterator[tuple[int, str]]):
    """(index of the request, piece of its text) for `requests` that are checked, but not queued before they are read.

    A request that ended with an error raises it, once all others have ended. `close`, from any thread, cancels what is
    left, and so does dropping the last reference.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self._engine = engine
        self._all = self._requests = tuple(requests)
        self._pieces: deque[tuple[int, str]] = deque()
        self._one_reader = Lock()
        self._is_queued = self._has_ended = False
        self._clock = engine.clock

    def __next__(self) -> tuple[int, str]:
        with self._one_reader:
            while not self._pieces:
                if self._has_ended:
                    raise self._take_error() or StopIteration
                self._read()
            return self._pieces.popleft()

    def close(self) -> None:
        """Cancel the requests; there is nothing more to read."""
        self._has_ended = True
        if self._is_queued:
            self._engine.cancel(*self._requests)

    def __del__(self) -> None:
        self.close()

    def outputs(self) -> list[RequestOutput]:
        """What the requests have come to so far, log probabilities included."""
        return self._engine.outputs(self._all)

    def _read(self) -> None:
        try:
            if not self._is_queued:
                self._is_queued = True
                self._engine.submit(self._requests)
            texts, self._clock, ended = self._engine.read(self._requests, self._clock)
        except BaseException:
            self.close()
            raise
        self._has_ended |= ended
        self._pieces += [(index, text) for index, text in enumerate(texts) if text]

    def _take_error(self) -> Exception | None:
        """The first error, once."""
        requests, self._requests = self._requests, ()
        return next((request.error for request in requests if request.error), None)


class TextStream(Iterator[str]):
    """The pieces of a stream of one request."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __next__(self) -> str:
        return next(self._stream)[1]

    def output(self) -> RequestOutput:
        """What the request has come to so far, log probabilities included."""
        return self._stream.outputs()[0]

    def close(self) -> None:
        """Cancel the request; there is nothing more to read."""
        self._stream.close()
