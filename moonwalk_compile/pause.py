"""The garbage collector waits while a step is planned."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from contextvars import ContextVar

_PAUSED = ContextVar("moonwalk_collector_paused", default=False)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Planning makes millions of small objects that live until it ends: the collector would look through them again
    and again, for a quarter of planning's time."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    token = _PAUSED.set(True)
    try:
        yield
    finally:
        _PAUSED.reset(token)
        gc.enable()


@contextlib.contextmanager
def collector_back() -> Iterator[None]:
    """Code generation within planning leaves cycles behind, and large ones: it is run with the collector."""
    if not _PAUSED.get():
        yield
        return
    gc.enable()
    try:
        yield
    finally:
        gc.disable()
