"""What operations hold within their call, by trial."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moonwalk_compile.passes import workspace
from moonwalk_compile.passes.graph import Operation
from moonwalk_compile.passes.trials import frozen_call, shortened
from moonwalk_compile.passes.workspace import Workspaces, measured_workspace, watched

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


def gradients(cotangent: torch.Tensor, images: torch.Tensor) -> Operation:
    rest = (torch.empty(4, 4, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
    call = (aten.convolution_backward.default, *frozen_call((cotangent, images, *rest), {}))
    return Operation(aten.convolution_backward.default, (), new=(4,), borrows=True, call=call)


def test_where_loops_are_fused_convolutions_are_tried_as_they_are_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(workspace, "_measure", lambda target, args, kwargs, threads: tried.append(args) or 7)
    images, parts = torch.empty(2, 4, 6, 6), torch.empty(2, 8, 6, 6)[:, 4:]
    fused = Workspaces(fused=True)
    for found in (Workspaces(), fused, fused.plain):
        assert found(gradients(images, images)) == 7
    as_captured, last = (144, 36, 6, 1), (144, 1, 24, 4)
    assert [args[1].stride for args in tried] == [as_captured, last]  # plain `torch.compile` lays them out likewise
    permuted = torch.empty(2, 6, 6, 4).permute(0, 3, 1, 2)
    assert fused.plain(gradients(permuted, images)) == 7  # but where another layout meets them
    assert [(args[0].stride, args[1].stride) for args in tried[2:]] == [(last, as_captured)]
    assert fused(gradients(parts, images)) == 7 + images.nbytes  # a part is copied to have a layout of its own
    assert Workspaces()(gradients(parts, images)) == 7


def test_bags_are_not_empty_when_they_are_tried() -> None:
    """The gradient of the largest of each bag selects, for bags that have any, its gradient and its index."""
    bags, width = 64, 32
    weight, indices = torch.randn(100, width), torch.randint(0, 100, (4 * bags,))
    outputs = aten._embedding_bag.default(weight, indices, torch.arange(0, 4 * bags, 4), False, 2)
    given = (torch.randn(bags, width), indices, *outputs[1:], len(weight), False, 2, None)
    found = Workspaces().of_call(aten._embedding_bag_dense_backward.default, given, {})
    assert found >= bags * width * (4 + 8)


def test_watching_tells_the_peak_and_what_remains() -> None:
    def run() -> torch.Tensor:
        torch.empty(3000, dtype=torch.uint8)
        return torch.empty(1000, dtype=torch.uint8)

    result, top, end = watched(run, torch.device("cpu"))
    assert (top, end) == (3000, 1000) and len(result) == 1000


@pytest.mark.parametrize("scattered", [False, True])
def test_what_loops_is_tried_with_few_rounds(scattered: bool) -> None:
    """They hold as much memory as all, and the call for that stays short."""
    given = (torch.randn(2, 4, 9, 9), torch.randn(4, 4, 3, 3), [1, 1], [1, 1], [1, 1], 1, [2, 4, 9, 9], scattered)
    solve = torch.ops.moonwalk_compile.solve_convolution.default
    assert shortened(solve, (*given, 40))[-1] < 40
    assert Workspaces().of_call(solve, (*given, 40), {}) == measured_workspace(solve, (*given, 40), {}) > 0


def test_only_our_own_operators_are_shortened() -> None:
    assert shortened(aten.sort.default, (40, 41)) == (40, 41)
