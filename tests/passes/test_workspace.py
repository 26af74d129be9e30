"""What operations hold within their call, by trial."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moonwalk_compile.passes import workspace
from moonwalk_compile.passes.workspace import Workspaces, watched

aten = torch.ops.aten


class Collective:
    """Looks like an operation of torch.distributed, and must not be called."""

    namespace = "_c10d_functional"

    def __call__(self, *args: Any) -> Any:
        raise AssertionError("other processes would wait for this call")


def test_a_collective_is_never_tried() -> None:
    assert Workspaces().of_call(Collective(), (torch.empty(4),), {}) == 0


def test_each_distinct_call_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(workspace, "_measure", lambda target, args, kwargs, threads: tried.append(args) or 7)
    found = Workspaces()
    for size in (4, 4, 5):
        assert found.of_call(aten.sort.default, (torch.empty(size),), {}) == 7
    assert len(tried) == 2


def test_what_is_too_large_is_not_tried() -> None:
    assert Workspaces(limit=8).of_call(aten.sort.default, (torch.empty(1000),), {}) == 0


def test_watching_tells_the_peak_and_what_remains() -> None:
    def run() -> torch.Tensor:
        torch.empty(3000, dtype=torch.uint8)
        return torch.empty(1000, dtype=torch.uint8)

    result, top, end = watched(run, torch.device("cpu"))
    assert (top, end) == (3000, 1000) and len(result) == 1000
