"""On a CUDA device: the same gradients, predicted peaks that are the allocator's, and budgets that hold."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples import ordinary
from moonwalk_compile import BudgetError, moonwalk_compile, peers
from moonwalk_compile.api import planned_session
from moonwalk_compile.bench import bench_model, scalar_loss
from moonwalk_compile.measure import compare_steps, measure_step
from moonwalk_compile.options import Options, parse_bytes
from moonwalk_compile.passes import timing
from moonwalk_compile.passes.bits import pack_bits, pack_signs, unpack_two

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("fresh_compiler"),
]
LOWERINGS = ("eager", "inductor")
SETTLES = 3  # steps: the first two are measured, and the third may be planned again


@pytest.fixture(autouse=True)
def repeatable_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def to_gpu(model: nn.Module, inputs: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    return model.cuda(), tuple(value.cuda() if isinstance(value, Tensor) else value for value in inputs)


def step_of(model: nn.Module, inputs: Any) -> Any:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        scalar_loss(model, *inputs).backward()

    return step


def measured_peak(model: nn.Module, inputs: Any) -> int:
    step = step_of(model, inputs)
    for _ in range(SETTLES):
        step()
    model.zero_grad(set_to_none=True)
    return measure_step(step, device="cuda").peak_bytes


def smallest(model: nn.Module, inputs: Any, lowering: str) -> int:
    with pytest.raises(BudgetError) as caught:
        scalar_loss(moonwalk_compile(copy.deepcopy(model), budget=1, lowering=lowering), *inputs)
    return caught.value.smallest_peak_bytes


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", ordinary.MODELS)
def test_ordinary_models(name: str, lowering: str) -> None:
    model, inputs = to_gpu(*ordinary.build(name, "small"))
    with peers.same_random_numbers(lowering):
        reference = peers.plain(model, lowering)
        high = measured_peak(reference, inputs)
        low = smallest(model, inputs, lowering)
        for budget in (high, (high + low) // 2, low):
            ours = moonwalk_compile(copy.deepcopy(model), budget=max(budget, low), lowering=lowering)
            peak = measured_peak(ours, inputs)
            assert compare_steps(ours, reference, scalar_loss, inputs).gradient_error < 1e-5
            assert peak <= ours.plan.budget_bytes
            assert ours.plan.peak_bytes == pytest.approx(peak, rel=0.05)


# Inverses of weights in double precision make a moonwalk slow on a GPU: by default checkpoints are chosen there.
WALKED = {"strategies": ("moonwalk", "checkpoint"), "max_slowdown": 8}


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize(("name", "options"), [("reversible", {}), ("lipschitz", WALKED), ("flow", {})])
def test_inverted_models(name: str, options: dict[str, Any], lowering: str) -> None:
    model, inputs = importlib.import_module(f"examples.{name}").build()
    model, inputs = to_gpu(model, inputs)
    reference = peers.plain(model, lowering)
    ours = moonwalk_compile(copy.deepcopy(model), lowering=lowering, **options)
    plain, peak = measured_peak(reference, inputs), measured_peak(ours, inputs)
    assert {segment.strategy for segment in ours.plan.segments} & {"invert", "moonwalk"}
    assert peak < plain / 2
    assert compare_steps(ours, reference, scalar_loss, inputs).gradient_error < 1e-3


class Attends(nn.Module):
    """Attention as GPUs run it: flash, memory-efficient; with dropout, and under autocast."""

    def __init__(self, dropout: float, autocast: bool) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(64, 192) for _ in range(4))
        self.out = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.dropout, self.autocast = dropout, autocast

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast):
            for qkv, out in zip(self.qkv, self.out, strict=True):
                q, k, v = (part.view(4, -1, 2, 32).transpose(1, 2) for part in qkv(x).chunk(3, dim=-1))
                y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
                x = x + out(y.transpose(1, 2).reshape(x.shape))
        return x


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_attention(dropout: float, autocast: bool, lowering: str) -> None:
    model, (x,) = to_gpu(Attends(dropout, autocast), (torch.randn(4, 256, 64),))
    reference = peers.plain(model, lowering)
    with peers.same_random_numbers(lowering):
        budget = smallest(model, (x,), lowering)
        ours = moonwalk_compile(copy.deepcopy(model), budget=budget, lowering=lowering)
        assert measured_peak(ours, (x,)) <= budget
        measured_peak(reference, (x,))
        assert compare_steps(ours, reference, scalar_loss, (x,)).gradient_error < (1e-2 if autocast else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [1, 8, 1000, 8193, 100_003])
def test_bits_are_those_of_a_cpu(count: int, dtype: torch.dtype) -> None:
    source = (torch.randn(count).to(dtype) if dtype.is_floating_point else torch.rand(count) < 0.3).cuda()
    for low, high in ((0.0, None),) if dtype == torch.bool else ((0.0, None), (0.0, 0.7), (-1.0, 1.0)):
        packed = pack_bits(source, low, high)
        assert packed.cpu().equal(pack_bits(source.cpu(), low, high))
        for other, one in ((0.0, 1.0), (0.1, 1.0)):
            values = unpack_two(packed, [count], one, other, torch.float64)
            assert values.cpu().equal(unpack_two(packed.cpu(), [count], one, other, torch.float64))
    assert pack_signs(source).cpu().equal(pack_signs(source.cpu()))
    wide = source.expand(3, count).t()
    for view in (source[::2], wide, wide[:, :1]):
        assert pack_bits(view).cpu().equal(pack_bits(view.cpu()))


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_times_are_measured_on_the_device(lowering: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONWALK_CACHE_DIR", str(tmp_path))
    model, inputs = to_gpu(*ordinary.build("gpt2", "full"))
    session = planned_session(model, inputs, Options(parse_bytes("50%"), lowering=lowering, profile="measure"))
    (path,) = tmp_path.iterdir()
    known = timing.read(path)
    assert len(known) > 30 and all(seconds > 0 for seconds in known.values())
    graph = session.analysis.graph
    attention = [o for e in graph.edges for o in e.operations if "attention_backward" in str(o.target)]
    assert attention and all(session.device.clock(operation, False) for operation in attention)


def test_bench_on_the_device() -> None:
    found = bench_model(lambda: ordinary.build("gpt2", "small"), Options(parse_bytes("150%"), lowering="eager"), "h100")
    assert [row.name for row in found.rows][-1] == "moonwalk"
