"""What an inverse rule is: a function from a call to recipes that solve for some of the call's arguments.

A rule never looks at values, only at shapes, dtypes and constants (`Call`). A recipe's function is an ordinary
function of tensors; the compiler traces it into operations. The same rule serves both questions: an operation of the
forward pass is solved for its input (`invert`), a backward operation, linear in its cotangent, for the cotangent
(the vijp, `moonwalk`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..graph import Edge, Ref


@dataclass(frozen=True)
class Call:
    """One ATen call: `tensors` are its distinct arguments (fake), in the order of the edge's `needs`.

    `args` and `kwargs` hold `Ref(position)` where the argument `tensors[position]` stands, and constants elsewhere.
    `outputs` are the fake results by position; an item of a tuple that nobody reads is None. `orthogonal` lists the
    positions of matrices that are proved to have orthonormal rows or columns, whichever are fewer.
    """

    name: str  # without overload, and for ATen without namespace: "addmm", "mylib::scale"
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    outputs: tuple[Tensor | None, ...]
    orthogonal: frozenset[int] = frozenset()

    def tensor(self, argument: int) -> Tensor | None:
        """The tensor that stands at `args[argument]`; None for a constant or a missing argument."""
        place = self.args[argument] if argument < len(self.args) else None
        return self.tensors[place.slot] if isinstance(place, Ref) else None

    def constant(self, name: str, argument: int, default: Any) -> Any:
        """A constant argument that may be given by keyword, by place, or not at all."""
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[argument] if argument < len(self.args) else default


@dataclass(frozen=True)
class Recipe:
    """`function(*outputs, *reads)` returns the tensors `solves` (one tensor, or a tuple when there are several).

    All positions count tensor arguments (`Call.tensors`) and results (`Call.outputs`).

    What the operation erases of `solves` may be kept as a *fragment* (of a cotangent only, while the spine has it):
    `fragment(*solves, *fragment_reads)` returns a tuple of tensors, and `function` takes them behind its `reads`.
    Where the call itself may be given a bit per element of an argument (see `Packing`), the fragment may be too.

    A *fragile* recipe divides by what may vanish among ordinary activations: any other way is taken before it.
    """

    solves: tuple[int, ...]
    function: Callable[..., Any]
    reads: tuple[int, ...] = ()
    outputs: tuple[int, ...] = (0,)
    note: str = ""
    fragment: Callable[..., tuple[Tensor, ...]] | None = None
    fragment_reads: tuple[int, ...] = ()
    fragile: bool = False


@dataclass(frozen=True)
class Region:
    """A recipe over several nodes at once, in value indices: `function(*needs)` returns the values `gives`.

    The function is a `functools.partial` of a module-level function with hashable constants, so that equal regions
    are traced once. So is `fragment(*gives, *fragment_needs)`, which returns what `function` takes behind `needs`.
    """

    gives: tuple[int, ...]
    needs: tuple[int, ...]
    function: Callable[..., Any]
    label: str
    inverse: bool = True  # False: another way to compute the values forward (cheaper, or from less)
    fragment: Callable[..., tuple[Tensor, ...]] | None = None
    fragment_needs: tuple[int, ...] = ()
    fragile: bool = False


@dataclass(frozen=True)
class Packing:
    """How a value may be kept as one bit per element: whether it lies between two numbers, or is set if it is a bool.

    Set bits stand for `high`, the others for `low`. With `exact` the stand-in equals the value wherever the rule
    applies; otherwise it only serves the readers that look at its sign (or at its side of a threshold). It has the
    value's dtype. With `of_argument` the bits are taken of the first argument of the call that made the value.
    """

    high: float
    low: float
    exact: bool
    note: str = ""
    between: tuple[float, float | None] = (0.0, None)
    of_argument: bool = False


Rule = Callable[[Call], Iterator[Recipe]]


def result_places(edge: Edge) -> list[int]:
    """The position of each of `edge.gives` in the result of the call."""
    if edge.results == (len(edge.needs),):
        return [0]
    return [edge.operations[result - len(edge.needs)].args[1] for result in edge.results]
