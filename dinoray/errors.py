"""The one exception tree of dinoray: every message says what happened, where, and what to do.

Three classes of trouble in a run (docs/reliability.md):

* `ItemError`: this one input is bad (decode, shape, NaN, missing, changed). It is quarantined with a
  reason and the unit completes.
* `TransientError`: try again later (throttling, time-out, truncated body). No receipt is written.
* `SystemicError`: nothing can work (no access, no space, wrong weights, lost device). The run stops.
"""

from __future__ import annotations


class DinorayError(Exception):
    """Base of all errors that dinoray raises on purpose.

    `what` happened, `where` (a path, a field, a unit), and `todo`: what the reader should do now.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", todo: str = ""):
        self.what, self.where, self.todo = what, where, todo
        super().__init__(what, where, todo)

    def __str__(self) -> str:
        parts = [self.what + (f" [{self.where}]" if self.where else "")]
        if self.todo:
            parts.append(self.todo)
        return "\n  ".join(parts)

    def __reduce__(self):  # keyword-only arguments do not survive the default pickling between processes
        return _rebuild, (type(self), self.what, self.where, self.todo, dict(self.__dict__))


def _rebuild(cls, what, where, todo, state):
    error = cls.__new__(cls)
    Exception.__init__(error, what, where, todo)
    error.__dict__.update(state)
    return error


class BadRequest(DinorayError):
    """The request cannot be carried out as asked; nothing was run (exit code 2)."""

    exit_code = 2


class MissingScale(BadRequest):
    """A volume does not say how large its voxels are (exit code 2)."""


class ChangedRequest(BadRequest):
    """The output belongs to other inputs or settings than those of this request (exit code 2)."""


class WeightsError(BadRequest):
    """Weights cannot be had, or are not those of the model (exit code 2)."""


class ItemError(DinorayError):
    """One input is bad: quarantined with `reason` (one word, see docs/reliability.md); the unit goes on."""

    def __init__(self, reason: str, what: str, *, where: str = "", todo: str = ""):
        self.reason = reason
        super().__init__(what, where=where, todo=todo)


class TransientError(DinorayError):
    """Storage or network trouble that may pass; the unit stays pending."""


class SystemicError(DinorayError):
    """Nothing can be processed until its cause is mended; the run stops and nothing is quarantined."""


class OutputDamaged(DinorayError):
    """What is stored differs from what the receipts say."""


class TooManyFailures(DinorayError):
    """More inputs were quarantined than `max_failed_fraction` allows."""


class Stopped(DinorayError):
    """The run ended before its end because someone asked it to (`dinoray stop --drain`); it can be resumed."""


class NoProgress(DinorayError):
    """Several rounds over the pending units ended without one new receipt."""
