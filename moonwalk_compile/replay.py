"""Checkpoints for a model that Dynamo cannot capture: it runs as it is, and its repeated modules are computed again.

Nothing is known of such a module but how it behaves. So before a method of it is checkpointed for the first time, it is
rehearsed: computed twice from the same inputs, buffers and random numbers. It is checkpointed if both outputs are equal
to the bit and nothing has changed but buffers, in place. From then on the second run of a step starts from the buffers
that the first one found, and leaves them as it found them itself: running statistics are updated once. Everything else
runs as it is.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from .passes._torch_compat import tree_flatten, tree_map
from .peers import repeated_blocks

RECOMPUTED = 4 / 3  # time of a step whose modules are all computed again, relative to plain
ATOMS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
OWN = ("_parameters", "_buffers", "_modules")  # of every module; compared entry by entry
DEPTH = 3  # of containers and objects in attributes that are looked into


class Replays:
    """The repeated modules of a model, and what is known of their methods."""

    def __init__(self, model: nn.Module, strategies: Sequence[str], max_slowdown: float) -> None:
        self.model, self.allowed = model, "checkpoint" in strategies and max_slowdown >= RECOMPUTED
        self.rehearsed: dict[tuple[nn.Module, str, bool], bool] = {}  # whether a method may be computed again
        self.inside = False  # calls from within such a method run as they are

    @functools.cached_property
    def blocks(self) -> list[nn.Module]:
        return repeated_blocks(self.model) if self.allowed else []

    @property
    def note(self) -> str:
        """What is different from plain training."""
        count = len({module for (module, _, _), same in self.rehearsed.items() if same})
        return f", with {count} of its modules computed again in the backward pass" if count else ""

    def forget(self) -> None:
        """Rehearse all again: the model was in a state that it will not be in another time."""
        self.rehearsed.clear()

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        """While this holds, each block keeps its inputs only. What users have set on a block themselves stays."""
        hidden: list[tuple[nn.Module, str]] = []
        try:
            for block in self.blocks:
                for name in _methods(type(block)) - set(vars(block)):
                    vars(block)[name] = self._wrapped(block, name)
                    hidden.append((block, name))
            yield
        finally:
            for block, name in hidden:
                vars(block).pop(name, None)

    def _wrapped(self, block: nn.Module, name: str) -> Callable[..., Any]:
        function = getattr(block, name)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.inside or not torch.is_grad_enabled() or not _is_plain((args, kwargs)):
                return function(*args, **kwargs)
            key, entered = (block, name, block.training), self._entered(function)
            if key not in self.rehearsed:
                self.rehearsed[key] = _rehearse(block, entered, args, kwargs)
            if not self.rehearsed[key]:
                return entered(*args, **kwargs)
            contexts = functools.partial(_contexts, block)
            return checkpoint(entered, *args, use_reentrant=False, context_fn=contexts, **kwargs)

        return run

    def _entered(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            outer, self.inside = self.inside, True
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = outer

        return run


def _methods(kind: type[nn.Module]) -> set[str]:
    """`forward`, and what the module's own classes define beside it (a flow has an `inverse`)."""
    own = kind.__mro__[: kind.__mro__.index(nn.Module)]
    found = {name for owner in own for name, entry in vars(owner).items() if isinstance(entry, FunctionType)}
    return {name for name in found if name == "forward" or not (name.startswith("_") or hasattr(nn.Module, name))}


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _is_plain(arguments: Any) -> bool:
    """Whether there is a tensor, and no object that the call may change unseen."""
    leaves = tree_flatten(arguments)[0]
    return bool(_tensors(arguments)) and all(isinstance(leaf, (Tensor, *ATOMS)) for leaf in leaves)


# -- buffers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Saved:
    """A tensor, and what it was."""

    tensor: Tensor
    version: int
    address: int
    value: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> _Saved:
        return cls(tensor, tensor._version, tensor.data_ptr(), tensor.detach().clone())

    @property
    def changed(self) -> bool:
        """Batch normalization writes its statistics without telling their versions."""
        return self.moved or self.tensor._version != self.version or not _same(self.tensor, self.value)

    @property
    def moved(self) -> bool:
        return self.tensor.data_ptr() != self.address

    def put_back(self) -> None:
        with torch.no_grad():
            self.tensor.copy_(self.value)


def _contexts(block: nn.Module) -> tuple[Any, Any]:
    """Around the first run of a checkpointed call, and around each later one."""
    found: list[_Saved] = []
    return _first_run(block, found), _LaterRun(found)


@contextlib.contextmanager
def _first_run(block: nn.Module, found: list[_Saved]) -> Iterator[None]:
    """Collects in `found` what the buffers that are written to were before."""
    saved = [_Saved.of(buffer) for buffer in block.buffers()]
    yield
    found += [before for before in saved if before.changed]


class _LaterRun:
    """With the buffers as the first run found them; may be entered again, as a retained graph is."""

    def __init__(self, found: Sequence[_Saved]) -> None:
        self.found = found
        self.now: list[_Saved] = []

    def __enter__(self) -> None:
        self.now = [_Saved.of(before.tensor) for before in self.found]
        for before in self.found:
            before.put_back()

    def __exit__(self, *error: object) -> None:
        for after in self.now:
            after.put_back()
        self.now = []


# -- the rehearsal -----------------------------------------------------------------------------------------------------


def _rehearse(block: nn.Module, function: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether a second run gives what the first gave. Leaves all that it knows of as it was."""
    randomness, state = _Randomness.of(_tensors((args, kwargs))), _State.of(block)
    try:
        outcomes = []
        for _ in range(2):
            copied, named = tree_map(_copied, (args, kwargs))
            inputs = _State()
            inputs.add((copied, named))
            outcomes.append(_detached(function(*copied, **named)))
            unchanged = state.holds() and inputs.holds() and randomness.torch_alone()
            state.restore()
            randomness.restore()
            if not unchanged:
                return False
        return _equal(*outcomes)
    except Exception:  # the call itself will raise it, if it is one of the user's
        return False
    finally:
        state.restore()
        randomness.restore()


def try_out(model: nn.Module, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Call `function` and leave tensors and random numbers as they were. What it raises is the user's own error; what
    `model` sets up in its first call is there then. It runs without gradients, and with them if it does not so: some
    models differentiate within their forward pass."""
    try:
        with torch.no_grad():
            _leaving_no_trace(model, function, args, kwargs)
    except Exception:
        with torch.enable_grad():
            _leaving_no_trace(model, function, args, kwargs)


def _leaving_no_trace(model: nn.Module, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    randomness = _Randomness.of(_tensors((args, kwargs)))
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    copied, named = tree_map(_copied, (args, kwargs))
    try:
        function(*copied, **named)
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        randomness.restore()


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _detached(result: Any) -> Sequence[Any] | None:
    """What a call returned, without its history; None if there is more than tensors and atoms."""
    leaves = tree_flatten(result)[0]
    if not all(isinstance(leaf, (Tensor, *ATOMS)) for leaf in leaves):
        return None
    return [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _equal(first: Sequence[Any] | None, second: Sequence[Any] | None) -> bool:
    return first is not None and second is not None and len(first) == len(second) and all(map(_same, first, second))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    return type(a) is type(b) and a == b


@dataclass
class _State:
    """What a call may change: attributes of modules and objects, containers, tensors."""

    dicts: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)  # now and before
    lists: list[tuple[Any, Any]] = field(default_factory=list)  # and sets
    tensors: list[_Saved] = field(default_factory=list)
    buffers: list[_Saved] = field(default_factory=list)  # which may be written to

    @classmethod
    def of(cls, block: nn.Module) -> _State:
        state = cls()
        for module in block.modules():
            for entries in (vars(module), *(vars(module)[name] for name in OWN)):
                state.dicts.append((entries, dict(entries)))
            for name, value in vars(module).items():
                if name not in OWN:
                    state.add(value)
        state.tensors += map(_Saved.of, block.parameters())
        state.buffers += map(_Saved.of, block.buffers())
        return state

    def add(self, value: Any, depth: int = DEPTH) -> None:
        """What `value` holds."""
        if isinstance(value, Tensor):
            self.tensors.append(_Saved.of(value))
        elif depth and isinstance(value, (list, set, tuple)):
            if not isinstance(value, tuple):
                self.lists.append((value, value.copy()))
            for item in value:
                self.add(item, depth - 1)
        elif depth and not isinstance(value, (nn.Module, type, FunctionType)):
            entries = value if isinstance(value, dict) else getattr(value, "__dict__", None)
            if isinstance(entries, dict):
                self.dicts.append((entries, dict(entries)))
                for item in entries.values():
                    self.add(item, depth - 1)

    def holds(self) -> bool:
        return (
            all(_entries_hold(now, before) for now, before in self.dicts)
            and all(_items_hold(now, before) for now, before in self.lists)
            and not any(saved.changed for saved in self.tensors)
            and not any(saved.moved for saved in self.buffers)
        )

    def restore(self) -> None:
        for entries, before in self.dicts:
            if not _entries_hold(entries, before):
                entries.clear()
                entries.update(before)
        for items, kept in self.lists:
            if not _items_hold(items, kept):
                items.clear()
                items.extend(kept) if isinstance(items, list) else items.update(kept)
        for saved in (*self.tensors, *self.buffers):
            if saved.changed:
                saved.put_back()


def _entries_hold(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() == before.keys() and all(_is(now[key], before[key]) for key in now)


def _items_hold(now: Any, before: Any) -> bool:
    if isinstance(now, set):
        return now == before
    return len(now) == len(before) and all(map(_is, now, before))


def _is(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, ATOMS) and type(a) is type(b) and a == b)


@dataclass(frozen=True)
class _Randomness:
    """The states of all random number generators that are known: torch's, Python's and numpy's."""

    cpu: Tensor
    devices: tuple[list[int], list[Tensor]]
    python: Any
    numpy: Any

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> _Randomness:
        return cls(torch.get_rng_state(), get_device_states(*tensors), random.getstate(), np.random.get_state())

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(*self.devices)
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def torch_alone(self) -> bool:
        """Whether only torch's generators, which a checkpoint sets back, were drawn from."""
        kind, keys, *rest = np.random.get_state()
        before, numbers, *others = self.numpy
        same = kind == before and bool((keys == numbers).all()) and rest == others
        return same and random.getstate() == self.python
