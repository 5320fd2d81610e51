"""Every error a user can meet: what was wrong, where, and what to do about it.

A typed error is raised before anything has changed. `assert` is kept for our own invariants.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST_LISTED = 60  # names in one message


class AutodeployError(Exception):
    """Base of all errors raised on purpose by this package.

    `what` says what was wrong, `where` names the place (module path, node, file, request), `fix` says what to do.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        parts = [what]
        if where:
            parts.append(f"  where: {where}")
        if fix:
            parts.append(f"  fix:   {fix}")
        super().__init__("\n".join(parts))


class NoAttentionFound(AutodeployError):
    """The graph holds no attention node we know; the message lists the near misses."""


class UnsupportedFeature(AutodeployError):
    """A layer asks for something that no (or not the chosen) backend can do."""


class TraceError(AutodeployError):
    """The model could not be turned into one FX graph."""


class UnknownName(AutodeployError):
    """A backend, pass, field or option name that is not registered; the message lists the known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        listed = f"known: {', '.join(known) or '(none)'}" if len(known) <= _MOST_LISTED else f"{len(known)} are known"
        super().__init__(f"unknown {kind} {name!r}", fix=hint + listed)


class OptionError(AutodeployError):
    """An option or sampling parameter with a value outside its range."""


class LayoutError(AutodeployError):
    """A batch layout that breaks its own rules: lengths, page indices, dtype or shape."""


class RequestTooLong(AutodeployError):
    """A request that can never run: longer than the model's context or than the whole page pool."""


class RequestFailed(AutodeployError):
    """A request that ended by itself: its logits are no numbers, or its step or its tokenizer raised."""


class CaptureError(AutodeployError):
    """A step that cannot be captured as a CUDA graph."""


class NameTaken(AutodeployError):
    """A module of somebody else's has a name that this package needs."""


class ModelNotFound(AutodeployError):
    """No model at that hub id or folder, or files missing from it."""


class DownloadError(AutodeployError):
    """A download that failed or whose hash does not match; nothing was left behind in the cache."""


class MissingDependency(AutodeployError):
    """An optional library is needed for what was asked and is not installed."""


class PassError(AutodeployError):
    """A pass raised, left an invalid graph, or changed what it may not change; the message names the pass."""


class InvariantError(PassError):
    """A graph breaks one of the invariants in `autodeploy.compiler.spec`."""
