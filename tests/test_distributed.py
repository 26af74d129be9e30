"""Two processes: every process compiles for itself, and gradients are averaged as ever."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from examples import reversible
from moonwalk_compile import moonwalk_compile
from moonwalk_compile.measure import gradient_error, gradients

PROCESSES = 2

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def _process(rank: int, store: str, train: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    train(rank)
    dist.barrier()
    os._exit(0)  # without waiting for gloo's threads, which now and then do not end


def _model() -> tuple[nn.Sequential, list[Tensor], nn.Module]:
    """A model, a batch for each process, and the model with the averaged gradients."""
    torch.manual_seed(0)
    base, (x,) = reversible.build(blocks=5, half=16, hidden=32, batch=8, tokens=64)
    batches = [torch.randn_like(x) for _ in range(PROCESSES)]
    reference = copy.deepcopy(base)
    sum(loss(reference, batch) for batch in batches).div(PROCESSES).backward()
    return base, batches, reference


def _replicated(rank: int) -> None:
    for wrapped_first in (False, True):
        _averaged(rank, wrapped_first)


def _averaged(rank: int, wrapped_first: bool) -> None:
    base, batches, reference = _model()
    options = {"lowering": "eager", "strategies": ("invert", "checkpoint"), "max_slowdown": 3}
    if wrapped_first:
        model = moonwalk_compile(DistributedDataParallel(copy.deepcopy(base)), **options)
    else:
        model = DistributedDataParallel(moonwalk_compile(copy.deepcopy(base), **options))
    for _ in range(3):
        model.zero_grad()
        loss(model, batches[rank]).backward()
    plan = model.plan if wrapped_first else model.module.plan
    assert any(segment.strategy == "invert" for segment in plan.segments)
    assert plan.peak_bytes < plan.plain_peak_bytes / 2
    assert gradient_error(gradients(model.module), gradients(reference)) < 1e-5
    mine = torch.cat([p.grad.flatten() for p in model.parameters()])
    everyones = [torch.empty_like(mine) for _ in range(PROCESSES)]
    dist.all_gather(everyones, mine)
    assert all(mine.equal(other) for other in everyones)


def _sharded(rank: int) -> None:
    """FSDP puts its hooks around blocks that have been compiled."""
    base, batches, reference = _model()
    options = {"lowering": "eager", "strategies": ("checkpoint",), "max_slowdown": 3}
    mesh = init_device_mesh("cpu", (PROCESSES,))
    whole = {"backend": "moonwalk", "fullgraph": True, "options": options}  # or an error
    model = nn.Sequential(*(torch.compile(block, **whole) for block in base))
    for block in (*model, model):
        fully_shard(block, mesh=mesh)
    for _ in range(3):
        model.zero_grad()
        loss(model, batches[rank]).backward()
    found = {name.replace("._orig_mod", ""): p.grad.full_tensor() for name, p in model.named_parameters()}
    assert found.keys() == gradients(reference).keys()
    assert gradient_error(found, gradients(reference)) < 1e-5


def test_gradients_are_averaged(tmp_path: Path) -> None:
    mp.spawn(_process, (str(tmp_path / "store"), _replicated), nprocs=PROCESSES)


@pytest.mark.slow
def test_compiled_blocks_are_sharded(tmp_path: Path) -> None:
    mp.spawn(_process, (str(tmp_path / "store"), _sharded), nprocs=PROCESSES)
