from __future__ import annotations

import builtins
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from moonwalk_compile.errors import UsageError
from moonwalk_compile.report import Plan, Segment
from moonwalk_compile.table import fold_names

GOLDEN = Path(__file__).parent / "golden"
MIB = 2**20


def segment(name: str, strategy: str = "invert", **changes) -> Segment:
    base = Segment(name, strategy, f"{name}_first", f"{name}_last", 0, 0.0123, 2.3e-7, "inputs follow from outputs")
    return replace(base, **changes)


def deep_plan() -> Plan:
    """All that a table can show: a long run, a wrapped reason, several blocks in a segment, provisional errors."""
    why = "softmax has no inverse; the chain restarts here, before the predicted error passes the tolerance"
    exact = {"error": 0.0, "kept_bytes": 8 * MIB}
    segments = (
        segment("embedding", "keep", reason="cheap to keep", **exact),
        segment("blocks.1", "checkpoint", reason="attention", **exact),
        segment("blocks.2", "checkpoint", reason="attention", **exact),
        *(segment(f"blocks.{i}", error=1e-7 * i) for i in range(3, 63)),
        segment("blocks.63", "checkpoint", reason=why, **exact),
        segment("head", "moonwalk", kept_bytes=MIB, error=None, blocks=4, provisional=True, reason="surjective"),
        segment("tail", "moonwalk", kept_bytes=MIB, error=3e-6, provisional=True, reason="surjective"),
    )
    rising = [865 * MIB * i // 50 for i in range(1, 51)]
    return Plan(
        peak_bytes=80845209,
        plain_peak_bytes=865 * MIB,
        time_s=1.38,
        plain_time_s=1.0,
        segments=segments,
        budget_bytes=90 * MIB,
        parameter_bytes=32 * MIB,
        buffer_bytes=512,
        input_bytes=8 * MIB,
        notes=("moonwalk is provisional until the first step", "a second remark"),
        timeline=tuple(44 * MIB + (i % 4) * 11 * MIB for i in range(150)),
        plain_timeline=(*rising, *rising[::-1]),
        forward_length=50,
        plain_forward_length=50,
        planning_s=0.81,
    )


def plain_plan() -> Plan:
    """The least that a plan holds: one segment, no budget, as a model without parameters might give."""
    only = segment("model", "keep", error=0.0, kept_bytes=1000, time_s=0.0, reason="the budget allows it")
    return Plan(1000, 1000, 0.0, 0.0, (only,))


def over_budget_plan() -> Plan:
    return replace(deep_plan(), budget_bytes=70 * MIB, segments=(), notes=())


@pytest.mark.parametrize("make", [deep_plan, plain_plan, over_budget_plan], ids=lambda make: make.__name__)
def test_table(make):
    path = GOLDEN / f"{make.__name__}.txt"
    assert f"{make()}\n" == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("first", "last", "folded"),
    [
        ("blocks 3", "blocks 62", "blocks 3-62"),
        ("layers.3.mlp", "layers.62.mlp", "layers.3-62.mlp"),
        ("h9", "h10", "h9-10"),
        ("a", "b", "a .. b"),
        ("l1.m1", "l2.m2", "l1.m1 .. l2.m2"),
        ("l1.a", "l1.b", "l1.a .. l1.b"),
        ("x", "x", "x"),
        ("", "1", " .. 1"),
    ],
)
def test_fold_names(first, last, folded):
    assert fold_names(first, last) == folded


def rows(*segments: Segment) -> list[str]:
    table = str(replace(plain_plan(), segments=segments)).split("\n\n")[0]
    return table.splitlines()[2:]


@pytest.mark.parametrize(
    "change",
    [{"strategy": "keep"}, {"kept_bytes": 1}, {"reason": "other"}, {"blocks": 2}, {"error": None}],
    ids=lambda change: next(iter(change)),
)
def test_different_neighbours_are_not_folded(change):
    assert len(rows(segment("b1"), segment("b2"))) == 1
    assert len(rows(segment("b1"), replace(segment("b2"), **change))) == 2


def test_only_consecutive_segments_are_folded():
    assert len(rows(segment("b1"), segment("b2", "keep", error=0.0), segment("b3"))) == 3


def test_a_folded_row_sums_and_shows_the_largest_error():
    (row,) = rows(
        *(segment(f"b{i}", kept_bytes=MIB, time_s=0.5, error=e, blocks=2) for i, e in enumerate((1e-7, 3e-6)))
    )
    assert " ".join(row.split()) == "b0-1 x2 0-3 invert 2.0 MiB 1.00 s 3.0e-06 inputs follow from outputs"


def test_error_column():
    assert " exact " in rows(segment("a", "keep", error=0.0))[0]
    assert " 2.3e-07 " in rows(segment("a"))[0]
    assert " provisional " in rows(segment("a", error=None))[0]
    assert " 2.3e-07 (provisional) " in rows(segment("a", provisional=True))[0]


def test_json_has_the_contract_keys():
    values = json.loads(deep_plan().to_json())
    contract = {"peak_bytes", "plain_peak_bytes", "time_s", "plain_time_s", "segments", "budget_bytes"}
    assert contract <= values.keys()
    assert not {"timeline", "plain_timeline"} & values.keys()
    of_segments = {"name", "strategy", "first", "last", "kept_bytes", "time_s", "error", "reason"}
    assert all(of_segments <= segment.keys() for segment in values["segments"])
    assert values["segments"][-2]["error"] is None
    assert json.loads(plain_plan().to_json())["budget_bytes"] is None


def test_json_round_trip():
    plan = deep_plan()
    assert Plan.from_json(plan.to_json(timelines=True)) == plan
    assert Plan.from_json(plan.to_json()) == replace(plan, timeline=(), plain_timeline=())
    assert hash(Plan.from_json(plan.to_json()))


def test_json_is_strict_about_numbers():
    plan = replace(plain_plan(), time_s=math.nan, segments=(segment("a", error=math.inf),))
    assert "NaN" not in plan.to_json() and "Infinity" not in plan.to_json()
    assert Plan.from_json(plan.to_json()).segments[0].error is None


def test_unknown_json_keys_are_ignored():
    values = json.loads(plain_plan().to_json())
    values["later"] = 1
    values["segments"][0]["later"] = 1
    assert Plan.from_json(json.dumps(values)) == plain_plan()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '"peak_bytes"', '{"peak_bytes": 1}'])
def test_bad_json(text):
    with pytest.raises(UsageError, match="Not a plan"):
        Plan.from_json(text)


@pytest.mark.parametrize("segments", [None, 3, [3], [{}], [{"name": "a"}], {"a": 1}])
def test_bad_json_segments(segments):
    values = {**json.loads(plain_plan().to_json()), "segments": segments}
    with pytest.raises(UsageError, match="Not a plan"):
        Plan.from_json(json.dumps(values))


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_plot(tmp_path, suffix, magic):
    path = tmp_path / f"plan{suffix}"
    deep_plan().plot(path)
    assert path.read_bytes().startswith(magic)
    deep_plan().plot(str(path))


@pytest.mark.parametrize("changes", [{"budget_bytes": None}, {"budget_bytes": 2**40}, {"plain_time_s": 0.0}])
def test_plot_of_unusual_plans(tmp_path, changes):
    replace(deep_plan(), **changes).plot(tmp_path / "plan.png")


def test_plot_of_an_empty_step(tmp_path):
    replace(plain_plan(), peak_bytes=0, plain_peak_bytes=0, timeline=(0,), plain_timeline=(0,)).plot(tmp_path / "p.png")


def test_plot_without_timelines(tmp_path):
    with pytest.raises(UsageError, match="carries no timelines"):
        plain_plan().plot(tmp_path / "plan.png")


@pytest.mark.parametrize("name", ["plan.jpeg", "plan", "no/such/folder/plan.png", "folder.png", ""])
def test_plot_to_a_bad_path(tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError, match="cannot be plotted"):
        deep_plan().plot(tmp_path / name)


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    def without_matplotlib(name, *arguments, real=builtins.__import__):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(UsageError, match=r"moonwalk-compile\[plot\]"):
        deep_plan().plot(tmp_path / "plan.png")
