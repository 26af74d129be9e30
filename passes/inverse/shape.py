"""Operations that move elements without changing them, and linear ones whose result holds a copy of the argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..graph import Ref
from .rule import Call, Recipe, Rule


def _source(call: Call) -> Tensor:
    return call.tensors[call.args[0].slot]


def _first(call: Call, function: Callable[[Tensor], Tensor]) -> Iterator[Recipe]:
    """A recipe for the first argument from the only result."""
    yield Recipe((call.args[0].slot,), function)


def _reshaped(call: Call) -> Iterator[Recipe]:
    output, source = call.outputs[0], _source(call)
    if output is not None and output.dtype == source.dtype:  # not a view of the bits as another type
        yield from _first(call, lambda y: y.reshape(list(source.shape)))


def _copied(call: Call) -> Iterator[Recipe]:
    output = call.outputs[0]
    source = _source(call)
    if output is not None and (output.dtype, output.device) == (source.dtype, source.device):
        yield from _first(call, lambda y: y)


def permute(call: Call) -> Iterator[Recipe]:
    order = [dim % len(call.args[1]) for dim in call.args[1]]
    back = sorted(range(len(order)), key=order.__getitem__)
    yield from _first(call, lambda y: y.permute(back))


def transpose(call: Call) -> Iterator[Recipe]:
    yield from _first(call, lambda y: y.transpose(*call.args[1:3]))


def t(call: Call) -> Iterator[Recipe]:
    yield from _first(call, lambda y: y.t())


def flip(call: Call) -> Iterator[Recipe]:
    yield from _first(call, lambda y: y.flip(call.args[1]))


def roll(call: Call) -> Iterator[Recipe]:
    shifts = [-shift for shift in call.args[1]]
    dims = list(call.constant("dims", 2, []))
    yield from _first(call, lambda y: torch.roll(y, shifts, dims))


def expand(call: Call) -> Iterator[Recipe]:
    """Every copy equals the source: read the first."""
    source = _source(call)
    output = call.outputs[0]
    if output is None or not output.numel():
        return
    new = output.dim() - source.dim()
    grown = [dim for dim, size in enumerate(source.shape) if size != output.shape[dim + new]]

    def function(y: Tensor) -> Tensor:
        for _ in range(new):
            y = y.select(0, 0)
        for dim in grown:
            y = y.narrow(dim, 0, 1)
        return y

    yield from _first(call, function)


def cumsum(call: Call) -> Iterator[Recipe]:
    """What each sum adds to the one before it."""
    source, dim = _source(call), call.args[1]
    if source.dim() and source.is_floating_point() and not call.kwargs:
        yield from _first(call, lambda y: y.diff(dim=dim, prepend=torch.zeros_like(y.narrow(dim, 0, 1))))


def pixel_shuffle(call: Call) -> Iterator[Recipe]:
    yield from _first(call, lambda y: torch.pixel_unshuffle(y, call.args[1]))


def pixel_unshuffle(call: Call) -> Iterator[Recipe]:
    yield from _first(call, lambda y: torch.pixel_shuffle(y, call.args[1]))


def pad(call: Call) -> Iterator[Recipe]:
    """Padding is undone by cropping; cropping (a negative pad) erases."""
    pads = list(call.args[1])
    if min(pads, default=0) >= 0:
        sizes = list(_source(call).shape)
        dims = [len(sizes) - 1 - k for k in range(len(pads) // 2)]
        yield from _first(call, lambda y: _narrow(y, dims, pads[::2], [sizes[dim] for dim in dims]))


def _narrow(y: Tensor, dims: Sequence[int], starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    for dim, start, size in zip(dims, starts, sizes, strict=True):
        y = y.narrow(dim, start, size)
    return y


def repeat(call: Call) -> Iterator[Recipe]:
    """The first copy."""
    source, times = _source(call), call.args[1]
    sizes = list(source.shape)
    if all(times):
        new = len(times) - len(sizes)
        yield from _first(call, lambda y: _narrow(y[(0,) * new], range(len(sizes)), [0] * len(sizes), sizes))


def slice_backward(call: Call) -> Iterator[Recipe]:
    """The gradient of a slice is that slice, in zeros."""
    _, _, dim, start, end, step = call.args
    yield from _first(call, lambda y: torch.ops.aten.slice(y, dim, start, end, step))


def select_backward(call: Call) -> Iterator[Recipe]:
    _, _, dim, index = call.args
    yield from _first(call, lambda y: y.select(dim, index))


def cat(call: Call) -> Iterator[Recipe]:
    """All pieces at once."""
    pieces = _pieces(call)
    dim = call.constant("dim", 1, 0)
    if pieces and len({piece.dim() for piece in pieces}) == 1 and len({piece.dtype for piece in pieces}) == 1:
        sizes = [piece.shape[dim] for piece in pieces]
        yield Recipe(tuple(ref.slot for ref in call.args[0]), lambda y: tuple(y.split(sizes, dim)))


def stack(call: Call) -> Iterator[Recipe]:
    pieces = _pieces(call)
    dim = call.constant("dim", 1, 0)
    if pieces and len({piece.dtype for piece in pieces}) == 1:
        yield Recipe(tuple(ref.slot for ref in call.args[0]), lambda y: tuple(y.unbind(dim)))


def _pieces(call: Call) -> list[Tensor]:
    """The listed tensors, or nothing if one of them is listed twice: the pieces would be solved twice."""
    refs = call.args[0]
    return [call.tensors[ref.slot] for ref in refs] if len(set(refs)) == len(refs) else []


def _joined(function: Callable[..., Tensor], argument: int) -> Rule:
    """The source from all the pieces that were cut out of it."""

    def rule(call: Call) -> Iterator[Recipe]:
        dim = call.constant("dim", argument, 0)
        count = len(call.outputs)
        if isinstance(call.args[0], Ref) and count:
            solved, pieces = (call.args[0].slot,), tuple(range(count))
            yield Recipe(solved, lambda *items: function(list(items), dim), (), pieces)

    return rule


RULES: dict[str, Rule] = {
    "view": _reshaped,
    "_unsafe_view": _reshaped,
    "squeeze": _reshaped,
    "unsqueeze": _reshaped,
    "clone": _copied,
    "alias": _copied,
    "detach": _copied,
    "_to_copy": _copied,
    "permute": permute,
    "transpose": transpose,
    "t": t,
    "flip": flip,
    "roll": roll,
    "expand": expand,
    "cumsum": cumsum,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    **dict.fromkeys(
        ("constant_pad_nd", *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3))), pad
    ),
    "repeat": repeat,
    "slice_backward": slice_backward,
    "select_backward": select_backward,
    "cat": cat,
    "stack": stack,
    "split": _joined(torch.cat, 2),
    "split_with_sizes": _joined(torch.cat, 2),
    "unbind": _joined(torch.stack, 1),
}
