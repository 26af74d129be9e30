"""What a user can be told: a title, what happened, what to do, and the user's own source line where there is one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .units import format_bytes


class MoonwalkError(Exception):
    """Base of all errors that are meant for users.

    Args:
        title: what it is about, a few words.
        what: what happened, one line.
        todo: what to do about it, one line.
        where: the user's own source line ("model.py:12"), if known; adds a fourth line to the message.
    """

    def __init__(self, title: str, what: str, todo: str, where: str | None = None) -> None:
        super().__init__(title, what, todo, where)
        self.title = title
        self.what = what
        self.todo = todo
        self.where = where

    def __str__(self) -> str:
        lines = [self.title, f"  what happened: {self.what}"]
        if self.where:
            lines.append(f"  where: {self.where}")
        return "\n".join([*lines, f"  what to do: {self.todo}"])


class CaptureError(MoonwalkError):
    """The model's training step could not be captured as one graph."""


class OptionError(MoonwalkError, ValueError):
    """An option has an unknown name or an impossible value."""


class UsageError(MoonwalkError):
    """The command line, or a call of the public API, was used wrongly."""


class BudgetError(MoonwalkError):
    """No plan has a peak within the budget.

    Args:
        budget_bytes: what was asked for.
        smallest_peak_bytes: the smallest peak of any plan; asking for exactly this works.
        pinned: names of the tensors that are alive at that peak and that no strategy can remove.
        advice: what else the user may do.
    """

    def __init__(
        self, budget_bytes: int, smallest_peak_bytes: int, pinned: tuple[str, ...] = (), advice: str = ""
    ) -> None:
        what = (
            f"the budget is {format_bytes(budget_bytes)}, the smallest reachable peak is "
            f"{format_bytes(smallest_peak_bytes)} ({smallest_peak_bytes} bytes){_pinned_by(pinned)}"
        )
        todo = f"ask for at least budget={smallest_peak_bytes}, or make the model or the batch smaller"
        super().__init__("The memory budget cannot be met", what, f"{todo}; or {advice}" if advice else todo)
        # What pickle and copy hand to __init__ when the error crosses a process boundary.
        self.args = (budget_bytes, smallest_peak_bytes, pinned, advice)
        self.budget_bytes = budget_bytes
        self.smallest_peak_bytes = smallest_peak_bytes
        self.pinned = pinned


@contextlib.contextmanager
def advised(*advice: str) -> Iterator[None]:
    """A budget that cannot be met comes with this advice."""
    try:
        yield
    except BudgetError as error:
        raise BudgetError(error.budget_bytes, error.smallest_peak_bytes, error.pinned, ", or ".join(advice)) from None


def _pinned_by(names: tuple[str, ...], shown: int = 5) -> str:
    if not names:
        return ""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f", pinned by {', '.join(names[:shown])}{more}"
