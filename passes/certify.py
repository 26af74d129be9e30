"""Certificates: how far inversion may be trusted, measured on real values.

For every block, a local error and a growth are measured along the chain that the backward pass will really walk.
Recovering a block twice (recover, apply the block, recover again) shows the noise it adds itself; one random
perturbation, carried through the whole chain and never redrawn, shows how it amplifies what it is given. A probe that
is redrawn at each block misses operators that are aligned with each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from .analysis import Analysis, Pack
from .certificates import Certificate
from .emit import Segment
from .graph import Edge
from .interpret import run_edge
from .inverse import CONTRACTION, INVERTED
from .solutions import Facts, drawn, swept

TIES = 1e-5  # the part of a tensor's elements that may lie exactly on a kink (x = 0 in |x|, a = b in max(a, b))
DROWNED = 1e-2  # relative noise beyond which recovered values say nothing of the true ones
MOST_GROWTH = 1.2  # of a block of a moonwalk chain
PROBE = 1e-3  # relative size of the carried perturbation; 1e-2 to 1e-4 give the same growth
ROUNDING = 1e-7  # relative size of the noise for which it stands

State = dict[int, Tensor]


class Values:
    """An environment that runs edges on demand and forgets what is not asked for again."""

    def __init__(self, analysis: Analysis, primals: Mapping[int, Tensor]) -> None:
        self.analysis, self.primals = analysis, dict(primals)

    def run(
        self, edges: Iterable[Edge], start: Mapping[int, Tensor], wanted: Iterable[int], fixed: Set[int] = frozenset()
    ) -> State:
        """The `wanted` values after running `edges` in order from `start`; each other value dies after its last use.

        The `fixed` ones stay as they are at the start, whatever an edge makes of them.
        """
        edges, wanted = list(edges), set(wanted)
        last = {value: position for position, edge in enumerate(edges) for value in edge.needs}
        reached: State = dict(start)
        for position, edge in enumerate(edges):
            needs = [self._value(value, reached) for value in edge.needs]
            given = zip(edge.gives, self._run(edge, needs), strict=True)
            reached.update((value, tensor) for value, tensor in given if value not in fixed)
            del needs
            for value in edge.needs:
                if last[value] == position and value not in wanted:
                    reached.pop(value, None)
        return {value: reached[value] for value in wanted if value in reached}

    def _run(self, edge: Edge, needs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if not (len(edge.operations) == 1 and isinstance(edge.operations[0].target, str)):
            return run_edge(edge, needs)
        # A constant of the captured graph, `torch.tensor(...)` in the user's code.
        module = self.analysis.capture.nodes[edge.gives[0]].graph.owning_module
        found: Tensor = getattr(module, str(edge.operations[0].target))
        return (found,)

    def _value(self, value: int, reached: State) -> Tensor:
        if value in reached:
            return reached[value]
        if value in self.primals:
            return self.primals[value]
        edge = self.analysis.graph.definition[value]  # a view of an input
        return dict(zip(edge.gives, self._run(edge, [self._value(v, reached) for v in edge.needs]), strict=True))[value]


@dataclass(frozen=True)
class _Link:
    """One block of a chain: `recover` walks it as the backward pass will, `apply` undoes that exactly."""

    block: int
    recover: Callable[[State], State]
    apply: Callable[[State, State], State]
    noisy: tuple[int, ...]  # the values after `recover` that carry the noise
    inner: tuple[int, ...] = ()  # what is solved on the way, and read by gradients; `apply` gives the true ones
    off: float = 0.0  # how far what it recovers of true values was from the truth, where that was looked at


def _norm(tensors: Iterable[Tensor]) -> float:
    norms = [
        tensor.float().norm() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.norm()
        for tensor in tensors
    ]
    return float(torch.stack([norm.double() for norm in norms]).norm()) if norms else 0.0


def together(differences: State, values: State) -> float:
    """The relative size of differences, over all values. It serves cotangents: a gradient is linear in their noise."""
    return _norm(differences.values()) / max(_norm(values[value] for value in differences), 1e-300)


def worst_sample(differences: State, values: State) -> float:
    """The largest relative size of a difference, over values and samples (the first dimension).

    A gradient may depend on the values of one sample, or of the smallest of several streams, alone. Samples that are
    much smaller than most count as a tenth of those.
    """
    found = [_worst(_samples(d), _samples(values[value])) for value, d in differences.items() if d.numel()]
    return max(found, default=0.0, key=lambda size: math.inf if math.isnan(size) else size)


def _differences(first: State, second: State, among: Iterable[int]) -> State:
    return {value: first[value] - second[value] for value in among if first[value].is_floating_point()}


def _samples(tensor: Tensor) -> Tensor:
    """The norm of each sample."""
    tensor = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    return tensor.flatten(1).norm(dim=1) if tensor.dim() > 1 else tensor.norm().view(-1)


def _worst(differences: Tensor, sizes: Tensor) -> float:
    usual = sizes.median() if sizes.median() > 0 else sizes.norm() / math.sqrt(len(sizes))
    floor = usual / 10 if usual > 0 else 1.0
    return float((differences / sizes.clamp_min(floor)).max())


def _trimmed(difference: Tensor, ties: float) -> Tensor:
    """Without the few largest elements: at an exact tie torch takes another subgradient, which is no noise."""
    count = math.ceil(ties * difference.numel())
    if not count:
        return difference
    flat = difference.flatten()
    return flat.index_fill(0, _largest(flat.abs(), min(count, flat.numel() // 4)), 0).view(difference.shape)


def _largest(values: Tensor, count: int, row: int = 1024) -> Tensor:
    """Where the `count` largest elements are: they lie in the rows that have the largest maxima, or behind all rows."""
    rows = len(values) // row
    if rows <= count:
        return values.topk(count).indices
    chosen = values[: rows * row].view(rows, row).amax(1).topk(count).indices
    inside = (chosen[:, None] * row + torch.arange(row, device=values.device)).flatten()
    places = torch.cat([inside, torch.arange(rows * row, len(values), device=values.device)])
    return places[values[places].topk(count).indices]


def _perturbed(state: State, generator: torch.Generator) -> State:
    """Each sample, by the same part of its size."""

    def noisy(tensor: Tensor) -> Tensor:
        if not (tensor.is_floating_point() and tensor.numel()):
            return tensor
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)
        scale = PROBE * _samples(tensor) / _samples(noise).clamp_min(1e-30)
        return tensor + noise * scale.to(tensor.dtype).view([-1, *[1] * (tensor.dim() - 1)] if tensor.dim() else [])

    return {value: noisy(tensor) for value, tensor in state.items()}


def measure_chain(
    links: Sequence[_Link],
    start: State,
    carried: State,
    known: Mapping[int, Certificate] | None = None,
    size: Callable[[State, State], float] = worst_sample,
) -> Iterator[tuple[int, Certificate]]:
    """Walk a chain with a probe. `carried` are the values (of `start`) that the probe perturbs, `size` measures noise.

    The noise that each block adds joins the probe, magnified alike: it is of another kind than what is drawn, and a
    chain may amplify one much more than the other.
    Ends early where the noise of the chain itself drowns the values that it recovers.
    With `known` certificates only the growth is measured anew; local errors are taken to grow along with it.
    """
    generator = torch.Generator().manual_seed(0)
    state, probe = start, {**start, **_perturbed(carried, generator)}
    before, noise, magnified = size(_differences(carried, probe, carried), carried), 0.0, PROBE / ROUNDING
    for link in links:
        reached, moved = link.recover(state), link.recover(probe)
        after = size(_differences(reached, moved, link.noisy), reached)
        within = _largest_of(_differences(reached, moved, link.inner), reached, size)
        growth = max(after, within) / before if before > 0 else 1.0
        earlier = (known or {}).get(link.block)
        if earlier is None:
            added, inside = _added_noise(link, reached, moved, state)
            local = max(size(added, reached), _largest_of(inside, reached, size), link.off)
            moved = {**moved, **{value: moved[value] + magnified * more for value, more in added.items()}}
            before = size(_differences(reached, moved, link.noisy), reached)
        else:
            before = after
            local = max(earlier.local * max(1.0, growth / max(earlier.growth, 1e-6)), link.off)
        sound = math.isfinite(local) and math.isfinite(growth) and after > 0  # zero: the signal itself has underflowed
        sound = sound and math.isfinite(_norm(t for t in reached.values() if t.is_floating_point()))
        yield link.block, Certificate(local, growth) if sound else Certificate(math.inf, math.inf)
        noise = math.hypot(noise * growth, local)
        if not noise < DROWNED:
            return  # what follows would be measured on noise that looks stable; it stays without a certificate
        if 0 < before < math.inf and not PROBE / 30 < before < PROBE * 30:  # too large, or too small, to be linear
            moved = {**moved, **_between(reached, moved, link.noisy, PROBE / before)}
            magnified, before = magnified * PROBE / before, PROBE
        state, probe = reached, moved


def _largest_of(differences: State, values: State, size: Callable[[State, State], float]) -> float:
    """Each gradient may depend on one of them alone."""
    sizes = [size({value: difference}, values) for value, difference in differences.items()]
    return max(sizes, default=0.0, key=lambda found: math.inf if math.isnan(found) else found)


def _added_noise(link: _Link, reached: State, moved: State, state: State) -> tuple[State, State]:
    """Recover, undo, recover again: what is off, of the noisy values and of the inner ones. What was recovered lies on
    the coarse grid of the rounding that it went through and would come back exactly, so a point between it and the
    probe is taken."""
    rough = {**reached, **_between(reached, moved, link.noisy, 0.37)}
    applied = link.apply(rough, state)
    again = link.recover(applied)
    return _noise(again, rough, link.noisy), _noise(again, applied, link.inner)


def _noise(found: State, true: State, among: Iterable[int]) -> State:
    return {v: _trimmed(found[v] - true[v], TIES) for v in among if true[v].is_floating_point()}


def _between(first: State, second: State, among: Iterable[int], part: float) -> State:
    """Points between two states; indices and counts stay those of the first."""
    floats = (value for value in among if first[value].is_floating_point())
    return {value: torch.lerp(first[value], second[value], part) for value in floats}


class Certifier:
    """Measures certificates for a step on real values of its inputs."""

    def __init__(self, analysis: Analysis, facts: Facts, primals: Mapping[int, Tensor]) -> None:
        self.analysis, self.facts = analysis, facts
        self.values = Values(analysis, primals)
        self.off: dict[int, float] = {}

    @torch.no_grad()
    def measure(
        self, segments: Iterable[Segment], known: Mapping[tuple[str, int], Certificate] | None = None
    ) -> dict[tuple[str, int], Certificate]:
        """Certificates by (strategy, block) for inverted segments, each walked as the backward pass will walk it.

        With the `known` ones of an earlier step it is about three times cheaper: only growth is measured.
        """
        chains = [segment for segment in segments if segment.strategy in INVERTED]
        if not chains:
            return {}
        with torch.random.fork_rng():
            kept = self._forward(self._wanted(chains), {i for s in chains if s.strategy == "invert" for i in s.span})
            found: dict[tuple[str, int], Certificate] = {}
            for segment in chains:
                walk = self._invert if segment.strategy == "invert" else self._moonwalk
                earlier = {block: c for (strategy, block), c in (known or {}).items() if strategy == segment.strategy}
                found |= {(segment.strategy, block): c for block, c in walk(segment.span, kept, earlier)}
        return found

    def _wanted(self, chains: Iterable[Segment]) -> dict[int, set[int]]:
        """What is to be kept of each block: where chains begin, and the residuals of inversions and spines."""
        wanted: dict[int, set[int]] = {}
        for segment in chains:
            if segment.strategy == "invert":
                wanted.setdefault(segment.last, set()).update(self.analysis.blocks[segment.last].live_out)
                for index in segment.span:
                    wanted.setdefault(index, set()).update(self.facts.inversion(index).residuals)
                continue
            if segment.first:
                before = self.analysis.blocks[segment.first - 1].live_out
                wanted.setdefault(segment.first - 1, set()).update(before)
            for index in segment.span:
                wanted.setdefault(index, set()).update(self.facts.spine(index).residuals)
        return wanted

    def _forward(self, wanted: Mapping[int, set[int]], inverted: Set[int]) -> dict[int, State]:
        """One forward pass; of each block, the `wanted` values are kept.

        An iteration may converge to an argument that gives the same value and is another one. That is consistent, and
        no probe shows it: so where one is `inverted` it is compared with the truth, which is at hand here.
        """
        kept: dict[int, State] = {}
        state: State = {}
        for block in self.analysis.blocks:
            edges = [*block.forward, *block.late]
            extra = wanted.get(block.index, set())
            masks = drawn(self.analysis, block)
            codecs = [p.encode for p in self._packs(block.index) if p.kept in extra]
            wanted_here = {*block.live_out, *extra, *masks}
            reached = self.values.run(_ancestors([*edges, *codecs], wanted_here), state, wanted_here)
            kept[block.index] = {value: reached[value] for value in (*extra, *masks) if value in reached}
            if block.index in inverted and self._iterates(block.index):
                again = self._inversion(block.index, kept[block.index]).recover(reached)
                off = worst_sample(_differences(again, state, block.live_in), state)
                self.off[block.index] = off if math.isfinite(off) else math.inf
            state = {value: reached[value] for value in block.live_out}
        return kept

    def _iterates(self, index: int) -> bool:
        program = self.facts.inversion(index).solution.program(self.analysis.blocks[index].live_in)
        return any(edge.label == CONTRACTION for edge in program)

    def _packs(self, index: int) -> list[Pack]:
        return [*self.analysis.signs[index], *self.analysis.packs.values()]

    def _invert(
        self, run: range, kept: Mapping[int, State], known: Mapping[int, Certificate]
    ) -> Iterator[tuple[int, Certificate]]:
        start = {value: kept[run[-1]][value] for value in self.analysis.blocks[run[-1]].live_out}
        links = [self._inversion(index, kept[index]) for index in reversed(run)]
        # The walk ends at the first block that is far off; the others need not be found one by one.
        far = {index: self.off.get(index, 0.0) for index in run}
        yield from ((index, Certificate(off, 1.0)) for index, off in far.items() if off >= DROWNED)
        yield from measure_chain(links, start, start, known)

    def _inversion(self, index: int, masks: State) -> _Link:
        block = self.analysis.blocks[index]
        inversion = self.facts.inversion(index)
        edges = [edge for edge in inversion.solution.program(block.live_in) if edge.label != "residual"]
        # What is kept of a block belongs to the point it is at; but sides stay as they are, at every point nearby.
        sides = inversion.sides
        inner = _solved_for(edges, block.live_in, inversion.backward)
        leaving = (*block.live_out, *(value for value in inversion.residuals if value not in sides), *inner)
        forward = list(self._on_sides(index, sides))

        def recover(state: State) -> State:
            wanted = (*block.live_in, *inner)
            reached = self.values.run(edges, {**masks, **state}, wanted, sides)
            return _picked(wanted, reached, state)

        def apply(state: State, _: State) -> State:
            reached = self.values.run(forward, {**masks, **state}, leaving, sides)
            return _picked(leaving, reached, state)

        return _Link(index, recover, apply, block.live_in, inner, self.off.get(index, 0.0))

    def _on_sides(self, index: int, sides: Set[int]) -> Iterator[Edge]:
        """The forward edges of a block; those that fold (abs, a sort) as they do where the sides are what they were."""
        folds = {
            edge.gives[0]: edge
            for edge in self.analysis.shortcuts[index]
            if edge.stage == "forward" and not sides.isdisjoint(edge.needs)
        }
        given = {value for edge in folds.values() for value in edge.gives}
        for edge in self._forward_edges(index):
            if edge.gives and edge.gives[0] in folds:
                yield folds[edge.gives[0]]
            elif not edge.gives or not {*sides, *given}.issuperset(edge.gives):
                yield edge

    def _forward_edges(self, index: int) -> list[Edge]:
        return [edge for edge in self.analysis.recover(self.analysis.blocks[index]) if edge.kind == "forward"]

    def _moonwalk(
        self, run: range, kept: dict[int, State], known: Mapping[int, Certificate]
    ) -> Iterator[tuple[int, Certificate]]:
        """A random cotangent goes down the spine; the sweep starts from what arrives."""
        blocks = self.analysis.blocks
        generator = torch.Generator().manual_seed(1)
        cotangents = {value: self._random(value, generator) for value in blocks[run[-1]].cotangents_in}
        for index in reversed(run):
            cotangents, fragments = self._down(index, cotangents, kept[index])
            kept[index].update(fragments)
        entry = kept.get(run[0] - 1, {})
        start = {**{value: entry[value] for value in blocks[run[0]].live_in}, **cotangents}
        links = [self._sweep(index, kept[index]) for index in run]
        for block, found in measure_chain(links, start, cotangents, known, together):
            # A random cotangent cannot vouch for a chain that amplifies: the real one may be far smaller or larger.
            yield block, found if found.growth <= MOST_GROWTH else Certificate(math.inf, math.inf)

    def _random(self, value: int, generator: torch.Generator) -> Tensor:
        fake = self.analysis.fakes[value]
        return torch.randn(tuple(fake.shape), generator=generator).to(device=fake.device, dtype=fake.dtype)

    def _down(self, index: int, cotangents: State, kept: State) -> tuple[State, State]:
        """The cotangents in front of a block, and the fragments that its sweep wants."""
        block, spine = self.analysis.blocks[index], self.facts.spine(index)
        wanted = (*block.cotangents_out, *spine.fragments)
        edges = [edge for edge in spine.solution.program(wanted) if edge.label != "residual"]
        reached = self.values.run(edges, {**kept, **cotangents}, wanted)
        fragments = {value: reached[value] for value in spine.fragments}
        return _picked(block.cotangents_out, reached, cotangents), fragments

    def _sweep(self, index: int, masks: State) -> _Link:
        block = self.analysis.blocks[index]
        solution = self.facts.sweep(index)
        up = solution.program((*block.live_out, *block.cotangents_in))
        fragments = self.facts.spine(index).fragments
        original = len(self.analysis.capture.graph.values)
        taking = [edge for edge in self.analysis.fragments[index] if all(value < original for value in edge.needs)]
        inner = _solved_for(up, block.cotangents_in, solution.program(swept(block)))
        leaving = (*block.cotangents_out, *fragments, *inner)
        true_spine = _ancestors([*block.backward, *taking], leaving)
        reads = {v for edge in true_spine for v in edge.needs}

        def recover(state: State) -> State:
            wanted = {*block.live_out, *block.cotangents_in, *inner}
            reached = self.values.run(up, {**masks, **state}, wanted)
            return _picked(wanted, reached, state)

        def apply(state: State, before: State) -> State:
            """The backward edges as they stand in the joint graph: exact zeros and ties show here. Fragments are taken
            anew, of the cotangents that are to be recovered."""
            entry = {value: before[value] for value in block.live_in}
            edges = [*self._forward_edges(index)]
            forward = self.values.run(edges, {**masks, **entry}, {*reads, *block.live_in})
            cotangents = {value: state[value] for value in block.cotangents_in}
            reached = self.values.run(true_spine, {**forward, **cotangents}, leaving)
            return entry | _picked(leaving, reached, state)

        return _Link(index, recover, apply, block.cotangents_in, inner)


def _picked(wanted: Iterable[int], reached: State, otherwise: State) -> State:
    """The wanted values: what was reached, else what passed through unchanged."""
    return {value: reached[value] if value in reached else otherwise[value] for value in wanted}


def _solved_for(path: Sequence[Edge], borders: Iterable[int], readers: Iterable[Edge]) -> tuple[int, ...]:
    """What inverse edges of a path give that stands at no border, and that others than these edges read."""
    solved = {value for edge in path if edge.kind == "inverse" for value in edge.gives} - {*borders}
    own = {id(edge) for edge in path}
    return tuple(sorted(solved.intersection(v for edge in readers if id(edge) not in own for v in edge.needs)))


def _ancestors(edges: Sequence[Edge], wanted: Iterable[int]) -> list[Edge]:
    needed, chosen = set(wanted), []
    for edge in reversed(edges):
        if needed & set(edge.gives):
            chosen.append(edge)
            needed.update(edge.needs)
    return chosen[::-1]
