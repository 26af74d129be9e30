"""Training steps written by hand: a joint graph line by line, without torch.

On the `DEVICE` of these graphs an operation takes exactly the seconds it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moonwalk_compile.passes.analysis import Analysis
from moonwalk_compile.passes.blocks import find_blocks
from moonwalk_compile.passes.capture import Capture
from moonwalk_compile.passes.cost import Device
from moonwalk_compile.passes.graph import Edge, Graph, Kind, Operation, Ref, Role, Stage, Value

DEVICE = Device("hand", flops=1.0, bandwidth=1.0, overhead=0.0, transcendental=1.0)


@dataclass
class Hand:
    """Every call returns the index of the value it adds."""

    values: list[Value] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)

    def input(self, name: str, size: int, role: Role = "input") -> int:
        index = len(self.values)
        stage: Stage = "backward" if role == "tangent" else "forward"
        self.values.append(Value(index, name, size, index, (size,), role=role, stage=stage))
        return index

    def call(
        self,
        label: str,
        needs: Sequence[int],
        size: int = 0,
        *,
        stage: Stage = "forward",
        seconds: float = 1.0,
        expensive: bool = False,
        view: bool = False,
        random: bool = False,
        effect: bool = False,
        sequence: int | None = None,
    ) -> int:
        """One value of `size` bytes; a view lies in the storage of the first of `needs`."""
        index = len(self.values)
        storage = self.values[needs[0]].storage if view else index
        bytes_ = self.values[storage].bytes if view else size
        self.values.append(Value(index, f"{label}_{index}", bytes_, storage, (size,), stage=stage))
        found = edge([index], needs, [size], label, seconds=seconds, expensive=expensive, view=view, stage=stage)
        self.edges.append(replace(found, random=random, effect=effect, sequence=sequence))
        return index

    def graph(self, outputs: Iterable[int], gradients: Iterable[int], mutated: Iterable[int] = ()) -> Graph:
        inputs = [value for value in self.values if value.role != "computed"]
        return Graph(
            tuple(self.values),
            tuple(self.edges),
            tuple(value.index for value in inputs if value.role != "tangent"),
            tuple(value.index for value in inputs if value.role == "tangent"),
            tuple(Ref(value) for value in outputs),
            tuple(Ref(value) for value in gradients),
            frozenset(mutated),
        )


def edge(
    gives: Sequence[int],
    needs: Sequence[int],
    sizes: Sequence[int],
    label: str = "op",
    *,
    seconds: float = 1.0,
    expensive: bool = False,
    view: bool = False,
    kind: Kind = "forward",
    stage: Stage = "forward",
) -> Edge:
    """A single operation; with several results, a tuple and its items."""
    args = tuple(Ref(position) for position in range(len(needs)))
    cost = {"flops": seconds} if expensive else {"moved": seconds}
    if view:
        whole = Operation(label, args, holds=((0, 0),))
        return Edge(tuple(gives), tuple(needs), (whole,), (len(needs),), label, kind, stage)
    holds = tuple((-1, position) for position in range(len(sizes)))
    whole = Operation(label, args, new=tuple(sizes), holds=holds, **cost)
    operations, results = [whole], [len(needs)]
    if len(gives) > 1:
        tuple_slot = len(needs)
        operations += [Operation("item", (Ref(tuple_slot), i), holds=((tuple_slot, i),)) for i in range(len(gives))]
        results = [tuple_slot + 1 + i for i in range(len(gives))]
    return Edge(tuple(gives), tuple(needs), tuple(operations), tuple(results), label, kind, stage, seconds)


def analysis_of(
    graph: Graph,
    inverse: Mapping[int, Sequence[Edge]] | None = None,
    vijp: Mapping[int, Sequence[Edge]] | None = None,
) -> Analysis:
    """The blocks of a graph, with inverse edges by block and nothing packed."""
    blocks = find_blocks(graph)
    nothing: tuple[tuple[()], ...] = tuple(() for _ in blocks)
    return Analysis(
        capture=Capture(graph, {}),
        graph=graph,
        device=DEVICE,
        blocks=blocks,
        packs={},
        inverse=tuple(tuple((inverse or {}).get(block.index, ())) for block in blocks),
        vijp=tuple(tuple((vijp or {}).get(block.index, ())) for block in blocks),
        shortcuts=nothing,
        signs=nothing,
        strict_signs=nothing,
        fragments=nothing,
        watches=tuple((None, None) for _ in blocks),
        fakes={value.index: f"{value.dtype}{list(value.shape)}" for value in graph.values},
    )


@dataclass(frozen=True)
class Layer:
    """One block of a chain: an expensive operation to `inner` bytes, then a cheap one to `outer` bytes.

    With `inverse` its input can be solved from its output, with `vijp` its output cotangent from its input cotangent.
    With `result` its backward pass reads the outer value in place of the inner one.
    """

    inner: int = 8
    outer: int = 4
    seconds: float = 5.0
    inverse: bool = False
    vijp: bool = False
    result: bool = False


def chain(layers: Sequence[Layer], source: int = 4, weight: int = 2) -> Analysis:
    """y = act(mm(x, w)) for each layer. Backward: the act reads what the mm gave, the mm its input and its weight."""
    hand = Hand()
    x = hand.input("x", source)
    weights = [hand.input(f"w{i}", weight, "parameter") for i in range(len(layers))]
    tangent = hand.input("h", layers[-1].outer, "tangent")
    reads, value = [], x
    for i, layer in enumerate(layers):
        inner = hand.call("mm", [value, weights[i]], layer.inner, seconds=layer.seconds, expensive=True, sequence=2 * i)
        outer = hand.call("act", [inner], layer.outer, sequence=2 * i + 1)
        reads.append((value, inner, outer))
        value = outer
    cotangent, gradients, spine = tangent, [0] * len(layers), []
    for i in reversed(range(len(layers))):
        before, inner, outer = reads[i]
        read = outer if layers[i].result else inner
        middle = hand.call("act_backward", [cotangent, read], layers[i].inner, stage="backward", sequence=2 * i + 1)
        gradients[i] = hand.call("mm", [middle, before], weight, stage="backward", seconds=layers[i].seconds,
                                 expensive=True, sequence=2 * i)  # fmt: skip
        size = hand.values[before].bytes
        lower = hand.call("mm", [middle, weights[i]], size, stage="backward", seconds=layers[i].seconds, expensive=True,
                          sequence=2 * i)  # fmt: skip
        spine.append((i, cotangent, lower, inner))
        cotangent = lower
    graph = hand.graph([value], [cotangent, *gradients])
    inverse = {
        i: [
            edge([inner], [outer], [layers[i].inner], "inverse of act", kind="inverse"),
            edge([before], [inner, weights[i]], [hand.values[before].bytes], "inverse of mm", seconds=layers[i].seconds,
                 expensive=True, kind="inverse"),
        ]
        for i, (before, inner, outer) in enumerate(reads)
        if layers[i].inverse
    }  # fmt: skip
    vijp = {
        i: [edge([upper], [lower, inner], [layers[i].outer], "inverse", kind="inverse", stage="backward")]
        for i, upper, lower, inner in spine
        if layers[i].vijp
    }
    return analysis_of(graph, inverse, vijp)
