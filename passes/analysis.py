"""Everything that is known about the step before planning: blocks, and the edges by which each can be recovered."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, count
from typing import Any

from torch import Tensor

from ._torch_compat import TANGENTS_ARE_FREED
from .bits import pack_bits, pack_signs, strict_sign, take_marked, unpack_signs, unpack_two
from .blocks import Block, find_blocks
from .capture import Capture
from .cost import Device, edge_seconds
from .drift import Watch, comparer, sampler
from .graph import Edge, Graph, Stage, Value
from .inverse import CONTRACTION, INVERTED, inverse_edges, make_call, packing_of_reader, packing_of_value
from .inverse.constants import Constants
from .inverse.rule import Packing
from .sizes import exact_bytes, storage_bytes
from .statistics import TINY, with_statistics
from .trace import trace_operations

STRICT_SIGN = "strict sign"


@dataclass(frozen=True)
class Pack:
    """`value` kept as `kept` (bits, or a copy of an input that the forward pass overwrites)."""

    value: int
    kept: int
    encode: Edge
    decode: Edge


@dataclass(frozen=True)
class Analysis:
    """`packs` are exact stand-ins by value; `signs` maps (backward edge, need) to what a one-bit reader may be given.

    `inverse[b]` solves forward values of block b, `vijp[b]` its cotangents, `shortcuts[b]` are cheaper ways through
    its cotangent spine, `fragments[b]` take what some of `vijp[b]` need of the cotangents that the spine sees.
    """

    capture: Capture
    graph: Graph
    device: Device
    blocks: tuple[Block, ...]
    packs: Mapping[int, Pack]
    inverse: tuple[tuple[Edge, ...], ...]
    vijp: tuple[tuple[Edge, ...], ...]
    shortcuts: tuple[tuple[Edge, ...], ...]
    signs: tuple[tuple[Pack, ...], ...]
    strict_signs: tuple[tuple[Edge, ...], ...]
    fragments: tuple[tuple[Edge, ...], ...]
    watches: tuple[tuple[Watch | None, Watch | None], ...]  # of each block's input: a value, a cotangent it receives
    fakes: Mapping[int, Any]
    normalized: Mapping[int, Edge] = field(default_factory=dict)  # by output: with the statistics at hand

    @cached_property
    def block_of(self) -> dict[int, int]:
        """The block that produces each forward or late value."""
        return {v: b.index for b in self.blocks for edge in (*b.forward, *b.late) for v in edge.gives}

    @cached_property
    def definition(self) -> dict[int, Edge]:
        """The edge that gives each value; packed twins and watched samples, which are not in the graph, included."""
        packs = (*self.packs.values(), *(pack for packs in self.signs for pack in packs))
        watches = (watch for watch, _ in self.watches if watch is not None)
        return {
            **self.graph.definition,
            **{pack.kept: pack.encode for pack in packs},
            **{watch.kept: watch.sample for watch in watches},
        }

    def recover(self, block: Block) -> tuple[Edge, ...]:
        """The ways to compute forward values of a block forward: random operations cannot be drawn again."""
        edges = (*block.forward, *block.late)
        return (
            *(edge for edge in edges if not edge.random and not edge.effect),
            *(replay for edge in edges if (replay := self.replays.get(edge.gives)) is not None),
            *(self.normalized[value] for edge in edges for value in edge.gives if value in self.normalized),
        )

    def statistics(self, block: Block) -> frozenset[int]:
        """The tiny ones of normalizations, which are kept whatever is done with the block."""
        values = self.graph.values
        again = [self.normalized[v] for edge in block.forward for v in edge.gives if v in self.normalized]
        found = {(edge.gives[0], value) for edge in again for value in edge.needs[:2]}
        return frozenset(value for output, value in found if values[value].bytes * TINY <= values[output].bytes)

    @cached_property
    def replays(self) -> dict[tuple[int, ...], Edge]:
        """Dropout with its mask at hand: the output is computed again without drawing."""
        found: dict[tuple[int, ...], Edge] = {}
        for edge in self.graph.edges:
            if edge.label == "native_dropout" and len(edge.gives) == 2 and _dropout_arguments(self.capture, edge)[2]:
                found[edge.gives] = _replay_dropout(self.capture, edge, self.device)
        return found

    @cached_property
    def held(self) -> tuple[int, ...]:
        """What stays alive through the whole backward pass: the outputs, which the user holds, and the gradient of a
        scalar loss, which the autograd engine holds (in torch 2.11, any that it passes)."""
        graph = self.graph
        held = (v for v in graph.tangents if not (TANGENTS_ARE_FREED and graph.values[v].shape))
        return (*graph.output_values, *held)

    @cached_property
    def charges(self) -> dict[int, tuple[int, int]]:
        """(storage, bytes) of each value as an input of a program: what existed before the step costs nothing."""
        graph = self.graph
        existing = set(graph.primals)
        return {
            value.index: (value.storage, 0 if value.storage in existing else graph.values[value.storage].bytes)
            for value in graph.values
        }


def _dropout_arguments(capture: Capture, edge: Edge) -> tuple[Any, ...]:
    """Source, rate, and whether it draws at all."""
    return tuple(capture.nodes[edge.gives[0]].args[0].args)  # type: ignore[union-attr]


def _replay_dropout(capture: Capture, edge: Edge, device: Device) -> Edge:
    output, mask = edge.gives
    _, rate, _ = _dropout_arguments(capture, edge)
    factor = 0.0 if rate == 1 else 1.0 / (1.0 - rate)

    def function(source: Tensor, mask: Tensor) -> Tensor:
        if source.device.type == "cpu" and source.itemsize < 4:  # rounds the scaled mask first, as its kernel does
            return source * (mask.to(source.dtype) * factor)
        return source * mask * factor

    operations, results, _ = trace_operations(function, (capture.fake(edge.needs[0]), capture.fake(mask)))
    replayed = Edge(
        (output,), (edge.needs[0], mask), operations, results, "native_dropout, mask kept", stage=edge.stage
    )
    return replace(replayed, seconds=edge_seconds(replayed, device))


class _Packer:
    """Adds the packed twins of values to the graph."""

    def __init__(self, capture: Capture, device: Device) -> None:
        self.capture, self.device = capture, device
        self.values = list(capture.graph.values)
        self.fakes = {value.index: capture.fake(value.index) for value in capture.graph.values}
        self.names = {value.name for value in self.values}
        self.traces: dict[Any, Any] = {}
        self.watches: dict[int, Watch] = {}

    def add_value(self, like: int, fake: Any, suffix: str, stage: Stage) -> int:
        index = len(self.values)
        name = self._new_name(f"{self.values[like].name}_{suffix}")
        shape, dtype = tuple(fake.shape), str(fake.dtype).removeprefix("torch.")
        self.values.append(Value(index, name, storage_bytes(fake), index, shape, dtype, "computed", stage))
        self.fakes[index] = fake
        return index

    def _new_name(self, wanted: str) -> str:
        """A value may be packed in several ways; arguments of generated functions are named after their values."""
        numbered = (f"{wanted}_{number}" for number in count(1))
        name = next(name for name in chain([wanted], numbered) if name not in self.names)
        self.names.add(name)
        return name

    def trace(self, key: Any, function: Callable[..., Any], *inputs: Any) -> Any:
        """`trace_operations`, once for inputs of equal layout; `key` stands for the function."""
        layouts = tuple((tuple(fake.shape), fake.stride(), fake.dtype, fake.device) for fake in inputs)
        if (key, layouts) not in self.traces:
            self.traces[key, layouts] = trace_operations(function, inputs)
        return self.traces[key, layouts]

    def edge(
        self, key: Any, function: Callable[..., Any], source: int, fake: Any, target: int | None, label: str
    ) -> tuple[Edge, Any]:
        operations, results, fakes = self.trace(key, function, fake)
        given = self.add_value(source, fakes[0], label, "late") if target is None else target
        edge = Edge((given,), (source,), operations, results, label, "codec", "late")
        return replace(edge, seconds=edge_seconds(edge, self.device)), fakes[0]

    def pack(self, value: int, packing: Packing, exact: bool) -> Pack | None:
        fake = self.capture.fake(value)
        source = self.capture.graph.definition[value].needs[0] if packing.of_argument else value
        read = self.capture.fake(source)
        if not (fake.is_contiguous() and read.is_contiguous() and fake.shape == read.shape):
            return None
        shape = tuple(fake.shape)
        between = packing.between
        encode, bits = self.edge(("bits", between), lambda v: pack_bits(v, *between), source, read, None, "bits")
        target = value if exact else None
        decode, decoded = self.edge(
            ("unpacked", shape, packing.high, packing.low, fake.dtype),
            lambda p: unpack_two(p, shape, packing.high, packing.low, fake.dtype),
            encode.gives[0],
            bits,
            target,
            "unpacked",
        )
        if (decoded.dtype, decoded.shape, decoded.stride()) != (fake.dtype, fake.shape, fake.stride()):
            return None
        return Pack(value, encode.gives[0], encode, decode)

    def signs(self, value: int) -> Pack | None:
        """A sign, exact also at zero: two bits per element."""
        fake, source = self.capture.fake(value), self.capture.graph.definition[value].needs[0]
        read = self.capture.fake(source)
        if not (fake.is_floating_point() and fake.is_contiguous() and read.is_contiguous()):
            return None
        shape, dtype = tuple(fake.shape), fake.dtype
        encode, bits = self.edge("signs", lambda v: pack_signs(v), source, read, None, "bits")
        decode, _ = self.edge(
            ("signed", shape, dtype), lambda p: unpack_signs(p, shape, dtype), encode.gives[0], bits, value, "unpacked"
        )
        return Pack(value, encode.gives[0], encode, decode)

    def copy(self, value: int) -> Pack:
        fake = self.capture.fake(value)
        encode, copied = self.edge("copy", lambda v: v.clone(), value, fake, None, "copy")
        decode, _ = self.edge("original", lambda v: v.view(v.shape), encode.gives[0], copied, value, "original")
        return Pack(value, encode.gives[0], encode, decode)

    def copy_of_view(self, value: int, whole: Pack) -> Pack:
        """A view of an overwritten input: the same view of that input's copy, where the copy is laid out alike."""
        view, base, copied = self.capture.fake(value), self.capture.fake(whole.value), self.fakes[whole.kept]
        alike = copied.stride() == base.stride() and exact_bytes(copied) == exact_bytes(base)
        if not alike or view.dtype != base.dtype:
            return self.copy(value)
        place = (tuple(view.shape), view.stride(), view.storage_offset())
        decode, _ = self.edge(place, lambda v: v.as_strided(*place), whole.kept, copied, value, "view of original")
        return Pack(value, whole.kept, whole.encode, decode)

    def watch(self, values: Sequence[int]) -> Watch | None:
        """A watch on the largest of these values; those of equal layout are traced once."""
        fakes = [(value, self.capture.fake(value)) for value in values]
        floats = [(value, fake) for value, fake in fakes if fake.is_floating_point() and fake.numel() > 1]
        if not floats:
            return None
        value, fake = max(floats, key=lambda item: item[1].numel())
        if value not in self.watches:
            self.watches[value] = self._watch(value, fake)
        return self.watches[value]

    def _watch(self, value: int, fake: Tensor) -> Watch:
        stage = self.values[value].stage
        shape, ties = tuple(fake.shape), stage == "backward"
        take, taken_slots, sample = self.trace("sample", sampler(shape), fake)
        ask, ask_slots, answer = self.trace(("drift", ties), comparer(shape, ties), sample[0], fake)
        later: Stage = "backward" if ties else "late"
        kept = self.add_value(value, sample[0], "sample", later)
        drift = self.add_value(value, answer[0], "drift", "backward")
        return Watch(
            value,
            Edge((kept,), (value,), take, taken_slots, "sample", "codec", later),
            Edge((drift,), (kept, value), ask, ask_slots, "drift", "codec", "backward"),
        )


def _copies(packer: _Packer, graph: Graph) -> dict[int, Pack]:
    """Inputs that the forward pass overwrites, and their views: what is kept of them is a copy."""
    packs = {value: packer.copy(value) for value in sorted(graph.mutated)}
    for value in graph.values:
        if value.storage in graph.mutated and value.index not in packs and value.stage != "backward":
            packs[value.index] = packer.copy_of_view(value.index, packs[value.storage])
    return packs


def _exact_packs(packer: _Packer, graph: Graph, blocks: Iterable[Block]) -> dict[int, Pack]:
    packs = _copies(packer, graph)
    wanted = {value for block in blocks for edge in (*block.forward, *block.late) for value in edge.gives}
    for value in sorted(wanted):
        edge = graph.definition[value]
        packing = packing_of_value(make_call(packer.capture, edge), edge.gives.index(value))
        if packing is None:
            continue
        pack = packer.pack(value, packing, exact=True) if packing.exact else packer.signs(value)
        if pack is not None:
            packs[value] = pack
    return packs


def _inexact_packs(packer: _Packer, graph: Graph, block: Block) -> list[Pack]:
    packs = []
    for value in block.demanded:
        edge = graph.definition.get(value)
        packing = packing_of_value(make_call(packer.capture, edge), edge.gives.index(value)) if edge else None
        if packing is not None and not packing.exact and (pack := packer.pack(value, packing, exact=True)) is not None:
            packs.append(pack)
    return packs


def _strict_signs(capture: Capture, block: Block, device: Device) -> list[Edge]:
    """Signs as the sweep must take them: an exact zero counts as negative, as it did when the sign was packed."""
    edges = []
    for edge in block.late:
        if edge.label in ("sgn", "sign"):
            operations, results, _ = trace_operations(lambda x: strict_sign(x), [capture.fake(edge.needs[0])])
            strict = Edge(edge.gives, edge.needs, operations, results, STRICT_SIGN, stage="late")
            edges.append(replace(strict, seconds=edge_seconds(strict, device)))
    return edges


def _sign_packs(packer: _Packer, graph: Graph, block: Block) -> tuple[list[Pack], list[Edge]]:
    """One-bit stand-ins that the spine may read, and the backward edges that read the stand-in.

    A sign is such a stand-in for itself: at exact zeros it is another subgradient than torch's.
    """
    packs, edges = _inexact_packs(packer, graph, block), []
    made: dict[tuple[int, str], Pack | None] = {}
    for edge in block.backward:
        for position, value in enumerate(edge.needs):
            if graph.values[value].stage == "backward" or value in graph.static:
                continue
            packing = packing_of_reader(make_call(packer.capture, edge), position)
            if packing is None:
                continue
            key = (value, packing.note)
            if key not in made:
                made[key] = packer.pack(value, packing, exact=False)
            if (pack := made[key]) is not None:
                packs.append(pack)
                needs = tuple(pack.decode.gives[0] if need == value else need for need in edge.needs)
                edges.append(replace(edge, needs=needs, label=f"{edge.label} from bits"))
    return packs, edges


def _of_fixed_size(edges: Sequence[Edge]) -> list[Edge]:
    """Without the fragments whose size only the values decide, and the inverses that need these."""
    takes = [e for e in edges if any(op.target is take_marked.default for op in e.operations)]
    dynamic = {value for edge in takes for value in edge.gives}
    return [edge for edge in edges if not dynamic.intersection((*edge.gives, *edge.needs))]


def analyse(
    capture: Capture,
    device: Device,
    constants: Constants | None = None,
    *,
    strategies: Collection[str] = INVERTED,
    fixed_sizes: bool = False,
) -> Analysis:
    """Blocks, packed twins and inverse rules of a captured step; rules may look at the values of `constants`.

    Where blocks may be inverted, what can be inverted together is one block; inverse rules are looked for where one of
    the `strategies` follows them. With `fixed_sizes`, no tensor of generated code may differ in size from its fake.
    """
    graph = capture.graph
    packer = _Packer(capture, device)
    add_value = partial(packer.add_value, stage="backward")
    edges: tuple[Edge, ...] = ()
    if not set(INVERTED).isdisjoint(strategies):
        edges = inverse_edges(capture, device, constants=constants, add_value=add_value)
    edges = tuple(_of_fixed_size(edges)) if fixed_sizes else edges
    joining = [edge for edge in edges if edge.label != CONTRACTION]  # most residual blocks are none
    blocks = find_blocks(graph, joining if "invert" in strategies else ())
    packs = _exact_packs(packer, graph, blocks)
    signs = [_sign_packs(packer, graph, block) for block in blocks]
    watches = tuple((packer.watch(block.live_in), packer.watch(block.cotangents_in)) for block in blocks)
    extended = replace(graph, values=tuple(packer.values))
    scopes = [_scope(graph, block) for block in blocks]
    homes = _by_block(graph, edges, scopes)
    normalized = {edge.gives[0]: edge for edge in with_statistics(capture, device, packer.trace)}
    return Analysis(
        capture,
        extended,
        device,
        blocks,
        packs,
        inverse=tuple(tuple(e for e in home if e.kind == "inverse" and e.stage == "forward") for home in homes),
        vijp=tuple(tuple(e for e in home if e.kind == "inverse" and e.stage == "backward") for home in homes),
        shortcuts=tuple(
            tuple(e for e in home if e.kind == "forward") + tuple(read)
            for home, (_, read) in zip(homes, signs, strict=True)
        ),
        fragments=tuple(
            tuple(_fragments(home, packs, readers)) for home, (packs, readers) in zip(homes, signs, strict=True)
        ),
        strict_signs=tuple(tuple(_strict_signs(capture, block, device)) for block in blocks),
        signs=tuple(tuple(packs) for packs, _ in signs),
        watches=watches,
        fakes=packer.fakes,
        normalized=normalized,
    )


def _fragments(home: Iterable[Edge], packs: Iterable[Pack], readers: Iterable[Edge]) -> Iterator[Edge]:
    """The edges that take fragments; also from bits, where the operation that they belong to may read these."""
    originals = {pack.decode.gives[0]: pack.value for pack in packs}
    for edge in home:
        if edge.kind != "fragment":
            continue
        yield edge
        for reader in readers:
            if f"fragment of {reader.label}" == f"{edge.label} from bits" and edge.needs[0] in reader.needs:
                bits = {originals[need]: need for need in reader.needs if need in originals}
                if bits.keys() & set(edge.needs):
                    yield replace(edge, needs=tuple(bits.get(need, need) for need in edge.needs))


def _scope(graph: Graph, block: Block) -> set[int]:
    own = {v for edge in (*block.forward, *block.late, *block.backward) for v in (*edge.gives, *edge.needs)}
    borders = {*block.live_in, *block.live_out, *block.cotangents_in, *block.cotangents_out}
    return (own | borders) - graph.static


def _by_block(graph: Graph, edges: Sequence[Edge], scopes: list[set[int]]) -> list[list[Edge]]:
    """The blocks that hold all values of an edge; an inverse that needs fragments is where these can be taken.

    What is available everywhere is not looked for, and needs no edge that gives it.
    """
    taking = {value: edge for edge in edges if edge.kind == "fragment" for value in edge.gives}

    def values(edge: Edge) -> Iterator[int]:
        for value in (*edge.gives, *edge.needs):
            if value < len(graph.values):
                yield value
            elif edge.kind != "fragment":
                yield from taking[value].needs

    holders: dict[int, set[int]] = {}
    for index, scope in enumerate(scopes):
        for value in scope:
            holders.setdefault(value, set()).add(index)
    homes: list[list[Edge]] = [[] for _ in scopes]
    for edge in edges:
        if graph.static.issuperset(edge.gives):
            continue
        common = set.intersection(*(holders.get(value, set()) for value in {*values(edge)} - graph.static))
        for index in common:
            homes[index].append(edge)
    return homes
