from __future__ import annotations

import dataclasses
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moonwalk_compile.errors import BudgetError, CaptureError, MoonwalkError, OptionError, UsageError
from moonwalk_compile.options import STRATEGIES, Budget, Options, format_bytes, parse_bytes
from moonwalk_compile.units import format_seconds

KIB, MIB, GIB = 2**10, 2**20, 2**30


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (123, 123),
        (np.int64(7), 7),
        ("123", 123),
        (" 123 ", 123),
        ("1B", 1),
        ("3KiB", 3 * KIB),
        ("512MiB", 512 * MIB),
        ("2GiB", 2 * GIB),
        ("2 GiB", 2 * GIB),
        ("2gib", 2 * GIB),
        ("0.5GiB", GIB // 2),
        ("1.5GB", 1_500_000_000),
        ("0.1GB", 100_000_000),
        ("1TB", 10**12),
        ("1TiB", 2**40),
    ],
)
def test_sizes(value, expected):
    assert parse_bytes(value) == Budget(bytes=expected)
    assert parse_bytes(value).resolve(plain_peak=1) == expected


@pytest.mark.parametrize(
    ("text", "plain", "expected"),
    [("40%", 1000, 400), ("40 %", 1000, 400), ("12.5%", 1000, 125), ("33%", 10, 3), ("100%", 7, 7), ("0%", 9, 0)],
)
def test_fractions_of_the_plain_peak(text, plain, expected):
    assert parse_bytes(text).resolve(plain) == expected


def test_a_percentage_is_exact():
    assert parse_bytes("7%").fraction == Fraction(7, 100)
    assert parse_bytes("7%").resolve(10**18) == 7 * 10**16


BAD_BUDGETS = [
    *("", " ", "abc", "-1", "-5MiB", "-40%", "+5", "1.5", "2G", "2 gigs", "2XiB", "GiB", "%", "1e9", "0x10", "1,5GB"),
    *("nan", "inf", "4 0%", "40%%", "1_000", "9" * 5000, "\u0662GiB", "5\n%"),
    *(True, False, -1, 1.5, 2.0, math.nan, None, [], b"2GiB", object(), {"bytes": 1}, 1 + 0j),
]


@pytest.mark.parametrize("value", BAD_BUDGETS, ids=lambda value: repr(value)[:20])
def test_bad_budgets(value):
    with pytest.raises(OptionError, match="budget") as caught:
        parse_bytes(value)
    assert "512MiB" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def test_budget_is_bytes_or_fraction():
    for arguments in ({}, {"bytes": 1, "fraction": Fraction(1, 2)}, {"bytes": -1}, {"fraction": Fraction(-1, 2)}):
        with pytest.raises(OptionError):
            Budget(**arguments)


def test_budget_as_text():
    assert [str(parse_bytes(text)) for text in ("40%", "12.5%", "2GiB")] == ["40%", "12.5%", "2.0 GiB"]


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (80845209, "77.1 MiB"),
        (MIB - 1, "1.0 MiB"),
        (-2 * MIB, "-2.0 MiB"),
        (3 * 2**40, "3.0 TiB"),
        (5000 * 2**50, "5000.0 PiB"),
    ],
)
def test_format_bytes(n, text):
    assert format_bytes(n) == text


@given(st.integers(min_value=1024, max_value=2**59))
def test_format_bytes_can_be_read_back(n):
    text = format_bytes(n)
    if not text.endswith("PiB"):
        assert abs(parse_bytes(text).resolve(0) - n) <= 0.051 * n


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (1.0, "1.00 s"),
        (12.3456, "12.3 s"),
        (123.4, "123 s"),
        (7200, "7200 s"),
        (0.0123, "12.3 ms"),
        (5e-6, "5.00 us"),
        (2e-9, "0.00200 us"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_defaults_are_the_contract():
    assert Options() == Options.from_mapping({})
    expected = (None, 1.5, ("keep", "checkpoint", "invert", "moonwalk"), 1e-4, "inductor", "model")
    assert dataclasses.astuple(Options()) == expected


def test_from_mapping_parses():
    given = {"budget": "40%", "max_slowdown": 2, "strategies": ["moonwalk", "keep", "keep"], "lowering": "eager"}
    options = Options.from_mapping(given)
    assert options.budget == parse_bytes("40%")
    assert options.max_slowdown == 2.0
    assert options.strategies == ("keep", "moonwalk")
    assert options.lowering == "eager"


def test_options_are_frozen_and_hashable():
    options = Options.from_mapping({"budget": "1GiB"})
    assert hash(options) == hash(Options(budget=Budget(bytes=GIB)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.lowering = "eager"  # type: ignore[misc]


@pytest.mark.parametrize("value", [("moonwalk",), "moonwalk", {"moonwalk"}, ["moonwalk", "moonwalk"]])
def test_one_strategy_alone(value):
    assert Options(strategies=value).strategies == ("moonwalk",)


def test_strategies_as_text():
    assert Options(strategies="checkpoint, keep").strategies == ("keep", "checkpoint")
    assert Options(strategies=(name for name in STRATEGIES)).strategies == STRATEGIES


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("bugdet", "budget"), ("Budget", "budget"), ("strategy", "strategies"), ("max_slow_down", "max_slowdown")],
)
def test_an_unknown_option_names_the_nearest(name, nearest):
    with pytest.raises(OptionError, match=f'did you mean "{nearest}"'):
        Options.from_mapping({name: 1})


@pytest.mark.parametrize("name", ["zzz", "", 3, None])
def test_an_unknown_option_far_from_any(name):
    with pytest.raises(OptionError, match="use one of budget, max_slowdown") as caught:
        Options.from_mapping({name: 1})
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("options", [None, [], "budget", 3])
def test_options_that_are_no_mapping(options):
    with pytest.raises(OptionError, match="write a dict"):
        Options.from_mapping(options)


BAD_VALUES = {
    "budget": ["abc", True, -1],
    "max_slowdown": [0.99, 0, -1, math.nan, -math.inf, "2", "abc", None, True, [], 1j],
    "tolerance": [0, -1e-4, math.nan, math.inf, "1e-4", None, True, []],
    "strategies": [(), [], "", ",", "keep,", "invrt", ("keep", "Keep"), ("keep", None), None, 3, True, {"keep": 1}],
    "lowering": ["Eager", "", None, 3, "aot_eager", ("eager",)],
    "profile": ["measured", "", None, 1, True, ("model",)],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values])
def test_bad_values(name, value):
    with pytest.raises(OptionError, match=name) as caught:
        Options.from_mapping({name: value})
    assert len(str(caught.value).splitlines()) == 3
    assert isinstance(caught.value, ValueError)


def test_a_misspelt_strategy_names_the_nearest():
    with pytest.raises(OptionError, match='did you mean "invert"'):
        Options(strategies=("invrt",))


def test_an_unlimited_slowdown_is_allowed():
    assert Options(max_slowdown=math.inf).max_slowdown == math.inf


ERRORS = [
    MoonwalkError("title", "what", "todo"),
    MoonwalkError("title", "what", "todo", where="model.py:3"),
    CaptureError("title", "what", "todo"),
    OptionError("title", "what", "todo"),
    UsageError("title", "what", "todo"),
    BudgetError(10 * MIB, 77 * MIB + 5, ("output", "grad of w")),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_survive_pickling(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_error_message():
    assert str(ERRORS[0]) == "title\n  what happened: what\n  what to do: todo"
    assert str(ERRORS[1]).splitlines()[2] == "  where: model.py:3"


def test_budget_error_says_what_would_do():
    error = BudgetError(10 * MIB, 77 * MIB + 5, tuple("abcdefg"))
    assert (error.budget_bytes, error.smallest_peak_bytes, error.pinned) == (10 * MIB, 77 * MIB + 5, tuple("abcdefg"))
    text = str(error)
    assert "10.0 MiB" in text and f"budget={77 * MIB + 5}" in text
    assert "pinned by a, b, c, d, e and 2 more" in text
    assert len(text.splitlines()) == 3
    assert "pinned" not in str(BudgetError(1, 2))


@pytest.mark.parametrize(
    "strategies, lowering, expected",
    [
        (STRATEGIES, "inductor", True),
        (STRATEGIES, "eager", False),
        (("keep", "checkpoint"), "inductor", False),
        (("checkpoint", "split"), "eager", True),
        (("moonwalk", "split"), "inductor", False),
    ],
)
def test_when_large_tensors_may_be_split(strategies: tuple[str, ...], lowering: str, expected: bool) -> None:
    assert Options(strategies=strategies, lowering=lowering).splits is expected


def test_split_alone_is_no_strategy() -> None:
    with pytest.raises(OptionError, match="no strategy is left"):
        Options(strategies=("split",))
