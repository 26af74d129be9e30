"""The training loop that the examples share. The one line that compiles a model is in `train`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler that measures the peak is silent

Batch = tuple[Tensor, ...]
Loss = Callable[..., Tensor]


def train(
    model: nn.Module,
    loss: Loss,
    batches: Iterator[Batch],
    *,
    steps: int,
    lr: float,
    plain: bool = True,
    **options: Any,
) -> list[float]:
    """Train by Adam for `steps` batches and return the loss of each; `options` go to the compiler."""
    if not plain:
        from moonwalk_compile import moonwalk_compile

        model = moonwalk_compile(model, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    return [_step(model, loss, optimizer, next(batches)) for _ in range(steps)]


def _step(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    optimizer.zero_grad(set_to_none=True)
    value = loss(model, *batch)
    value.backward()
    optimizer.step()
    return value.item()


def run_example(
    build: Callable[..., tuple[nn.Module, Batch]],
    loss: Loss,
    batches: Callable[..., Iterator[Batch]],
    *,
    lr: float,
    arguments: list[str] | None = None,
) -> None:
    """The command line of an example: train, then print the loss, the time of a step and its measured peak."""
    options = _parse(arguments)
    torch.manual_seed(0)
    model, inputs = build(**options.sizes)
    data = batches(*inputs)
    compile_options = {} if options.plain else {"budget": options.budget, "lowering": options.lowering}
    start = time.perf_counter()
    losses = train(model, loss, data, steps=options.steps, lr=lr, plain=options.plain, **compile_options)
    seconds = (time.perf_counter() - start) / options.steps
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {options.steps} steps of {seconds:.3f} s")
    print(
        f"measured peak {_peak(model, loss, next(data)) / 2**20:.1f} MiB ({'plain' if options.plain else 'compiled'})"
    )
    if not options.plain:
        print(model.plan)


def _peak(model: nn.Module, loss: Loss, batch: Batch) -> int:
    from moonwalk_compile.measure import measure_step

    model.zero_grad(set_to_none=True)
    return measure_step(lambda: loss(model, *batch).backward()).peak_bytes


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plain", action="store_true", help="do not compile")
    parser.add_argument("--budget", help='bound on the peak: bytes, "512MiB" or "40%%" of plain (default: none)')
    parser.add_argument("--lowering", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("sizes", nargs="*", type=_size, metavar="NAME=VALUE", help="sizes of build(), such as blocks=8")
    options = parser.parse_args(arguments)
    options.sizes = dict(options.sizes)
    return options


def _size(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value
