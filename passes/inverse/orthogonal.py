"""Which matrices are orthogonal by construction, as `torch.nn.utils.parametrizations.orthogonal` makes them.

The exponential of a skew-symmetric matrix and its Cayley transform are proved from the graph, and so are transposes,
slices and products of orthogonal matrices. The parametrization's `base` buffer is a value: whoever has it says so.
Its Householder map is not proved: it ends in a product with integers read off the parameter's diagonal, which are
signs only as long as nothing (such as weight decay) moves that diagonal.
"""

from __future__ import annotations

from collections.abc import Callable

from ..capture import Capture
from ..graph import Edge, Graph, Ref

Prover = Callable[["_Prover", Edge], bool]


class _Prover:
    """`proved` grows in the order of the graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.proved: set[int] = set()

    def shape(self, value: int) -> tuple[int, ...]:
        return self.graph.values[value].shape

    def argument(self, edge: Edge | None, position: int) -> int | None:
        args = edge.operations[0].args if edge is not None else ()
        place = args[position] if position < len(args) else None
        return edge.needs[place.slot] if edge is not None and isinstance(place, Ref) else None

    def made_by(self, value: int | None, *labels: str) -> Edge | None:
        edge = self.graph.definition.get(value) if value is not None else None
        return edge if edge is not None and edge.label in labels else None

    def is_skew(self, value: int | None) -> bool:
        """a - a^T"""
        edge = self.made_by(value, "sub")
        if edge is None or edge.operations[0].kwargs or len(edge.needs) != 2:
            return False
        turned = self.made_by(self.argument(edge, 1), "t", "transpose")
        real = not self.graph.values[edge.needs[0]].dtype.startswith("complex")
        return turned is not None and real and turned.needs[0] == self.argument(edge, 0) and _turns(turned)

    def shifted_identity(self, value: int | None) -> tuple[int, float] | None:
        """(k, alpha) for a value 1 + alpha k with k skew."""
        edge = self.made_by(value, "add")
        if edge is None or self.made_by(self.argument(edge, 0), "eye") is None:
            return None
        skew = self.argument(edge, 1)
        return (skew, edge.operations[0].kwargs.get("alpha", 1)) if skew is not None and self.is_skew(skew) else None


def _turns(edge: Edge) -> bool:
    return edge.label == "t" or sorted(dim % 2 for dim in edge.operations[0].args[1:3]) == [0, 1]


def _exponential(prover: _Prover, edge: Edge) -> bool:
    return prover.is_skew(edge.needs[0])


def _cayley(prover: _Prover, edge: Edge) -> bool:
    """(1 - k/2)^-1 (1 + k/2)"""
    left, right = (prover.shifted_identity(prover.argument(edge, i)) for i in (0, 1))
    plain = not edge.operations[0].kwargs and len(edge.operations[0].args) == 2
    return plain and left is not None and right is not None and left == (right[0], -right[1])


def _same(prover: _Prover, edge: Edge) -> bool:
    return edge.needs[0] in prover.proved


def _slice(prover: _Prover, edge: Edge) -> bool:
    """Some columns of a tall matrix, some rows of a wide one."""
    rows, columns = prover.shape(edge.needs[0])[-2:] if _same(prover, edge) else (0, 0)
    dim = edge.operations[0].args[1] if len(edge.operations[0].args) > 1 else 0
    return rows > 0 and (rows == columns or dim % 2 == int(rows > columns))


def _product(prover: _Prover, edge: Edge) -> bool:
    """Of two tall matrices or two wide ones."""
    if not prover.proved.issuperset(edge.needs):
        return False
    shapes = [prover.shape(value) for value in edge.needs]
    return all(rows >= columns for rows, columns in shapes) or all(rows <= columns for rows, columns in shapes)


_PROVERS: dict[str, Prover] = {
    "linalg_matrix_exp": _exponential,
    "_linalg_solve_ex": _cayley,
    "t": _same,
    "transpose": _same,
    "detach": _same,
    "alias": _same,
    "clone": _same,
    "slice": _slice,
    "mm": _product,
}


def orthogonal_values(capture: Capture, is_orthogonal_input: Callable[[int], bool] = lambda _: False) -> frozenset[int]:
    """Values proved to be matrices with orthonormal rows or columns, whichever are fewer.

    `is_orthogonal_input` is asked about every two-dimensional input of the step, by value index.
    """
    graph = capture.graph
    prover = _Prover(graph)
    prover.proved.update(v for v in graph.primals if len(prover.shape(v)) == 2 and is_orthogonal_input(v))
    for edge in graph.edges:
        rule = _PROVERS.get(edge.label)
        matrix = edge.gives and len(prover.shape(edge.gives[0])) == 2
        if rule is not None and matrix and edge.stage != "backward" and rule(prover, edge):
            prover.proved.add(edge.gives[0])
    return frozenset(prover.proved)
