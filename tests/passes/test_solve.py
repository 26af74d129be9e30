"""The engine alone, on hypergraphs of numbers."""

from __future__ import annotations

from moonwalk_compile.passes.graph import Edge
from moonwalk_compile.passes.inverse import Solution, solve

from .hand import edge


def way(gives: list[int], needs: list[int], seconds: float = 1.0, label: str = "") -> Edge:
    return edge(gives, needs, [1] * len(gives), label, seconds=seconds)


def labels(solution: Solution, wanted: list[int]) -> list[str]:
    return [step.label for step in solution.program(wanted)]


def assert_in_order(solution: Solution, wanted: list[int]) -> None:
    known = set(solution.known)
    for step in solution.program(wanted):
        assert known.issuperset(step.needs)
        known.update(step.gives)
    assert known.issuperset(wanted)


def test_the_lightest_of_two_ways():
    edges = [way([1], [0], 5, "dear"), way([1], [0], 2, "cheap")]
    assert labels(solve(edges, [0], [1]), [1]) == ["cheap"]
    assert labels(solve(edges[::-1], [0], [1]), [1]) == ["cheap"]


def test_a_long_way_round_may_be_lighter():
    edges = [way([2], [0], 5, "direct"), way([1], [0], 1, "a"), way([2], [1], 1, "b")]
    assert labels(solve(edges, [0], [2]), [2]) == ["a", "b"]


def test_the_heaviest_need_counts():
    """Two needs of weight 1 and 6: 7 in all, so the direct way of 6.5 is lighter."""
    edges = [way([1], [0], 1, "a"), way([2], [0], 6, "b"), way([3], [1, 2], 1, "join"), way([3], [0], 6.5, "direct")]
    assert labels(solve(edges, [0], [3]), [3]) == ["direct"]
    assert labels(solve(edges[:3], [0], [3]), [3]) == ["a", "b", "join"]


def test_missing_values_are_named_in_the_order_of_the_wish():
    solution = solve([way([1], [0]), way([3], [1, 2])], [0], [3, 1, 2])
    assert solution.missing == (3, 2)
    assert labels(solution, [1]) == [""]


def test_known_values_need_no_edge():
    solution = solve([way([0], [1], label="never")], [0, 1], [0])
    assert solution.missing == () and solution.program([0]) == []


def test_a_known_value_that_nobody_reads_is_not_missing():
    assert solve([], [7], [7]).missing == ()


def test_a_diamond_is_walked_once():
    edges = [
        way([1], [0], label="root"),
        way([2], [1], label="l"),
        way([3], [1], label="r"),
        way([4], [2, 3], label="j"),
    ]
    solution = solve(edges, [0], [4])
    assert sorted(labels(solution, [4])) == ["j", "l", "r", "root"]
    assert_in_order(solution, [4])


def test_an_edge_that_gives_several_values_is_emitted_once():
    edges = [way([1, 2], [0], label="split"), way([3], [2], label="after")]
    solution = solve(edges, [0], [1, 3])
    assert labels(solution, [1, 3]) == ["split", "after"]
    assert solution.edge[1] is solution.edge[2]


def test_only_one_of_several_results_may_come_from_a_lighter_edge():
    edges = [way([1, 2], [0], 3, "split"), way([1], [0], 1, "alone")]
    solution = solve(edges, [0], [1, 2])
    assert {value: step.label for value, step in solution.edge.items()} == {1: "alone", 2: "split"}
    assert_in_order(solution, [1, 2])


def test_a_need_that_stands_twice_is_waited_for_once():
    assert solve([way([1], [0, 0])], [0], [1]).missing == ()


def test_an_edge_without_needs_is_always_there():
    solution = solve([way([1], [], label="constant")], [], [1])
    assert labels(solution, [1]) == ["constant"]


def test_forward_and_inverse_edges_of_the_same_operation_make_no_circle():
    edges = [way([1], [0], label="forward"), way([0], [1], label="inverse"), way([2], [1], label="next")]
    assert labels(solve(edges, [0], [2]), [2]) == ["forward", "next"]
    assert labels(solve(edges, [1], [0, 2]), [0, 2]) == ["inverse", "next"]
    assert solve(edges, [], [0, 1]).missing == (0, 1)


def test_an_additive_coupling_is_inverted_by_propagation():
    """y1 = x1 + F(x2), y2 = x2 + G(y1): values x1 0, x2 1, F 2, y1 3, G 4, y2 5."""
    edges = [
        way([2], [1], 9, "F"), way([3], [0, 2], 1, "add"), way([4], [3], 9, "G"), way([5], [1, 4], 1, "add"),
        way([0], [3, 2], 1, "x1 = y1 - F"), way([2], [3, 0], 1, "F = y1 - x1"),
        way([1], [5, 4], 1, "x2 = y2 - G"), way([4], [5, 1], 1, "G = y2 - x2"),
    ]  # fmt: skip
    solution = solve(edges, [3, 5], [0, 1])
    assert solution.missing == ()
    assert labels(solution, [0, 1]) == ["G", "x2 = y2 - G", "F", "x1 = y1 - F"]
    assert solve(edges, [3], [0, 1]).missing == (0, 1)


def test_the_program_of_a_long_chain_needs_no_recursion():
    edges = [way([i + 1], [i]) for i in range(20_000)]
    assert len(solve(edges, [0], [20_000]).program([20_000])) == 20_000
