"""Every rule, through the one tester, with random shapes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moonwalk_compile.passes.inverse import RULES

from .cases import CASES, ON_OTHER_DEVICES
from .check import SIZES, Case, check_inverse_rule

sizes = st.fixed_dictionaries({letter: st.integers(low, high) for letter, (low, high) in SIZES.items()})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@settings(max_examples=2, deadline=None, derandomize=True)
@given(sizes=sizes, seed=st.integers(0, 1000))
def test_rule(case: Case, sizes: dict[str, int], seed: int) -> None:
    check_inverse_rule(case, sizes, seed)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@settings(max_examples=10, deadline=None)
@given(sizes=sizes, seed=st.integers(0, 1000))
def test_rule_at_more_sizes(case: Case, sizes: dict[str, int], seed: int) -> None:
    check_inverse_rule(case, sizes, seed)


@pytest.mark.slow
def test_every_rule_is_used_by_a_case() -> None:
    largest = {letter: high for letter, (_, high) in SIZES.items()}
    used = set().union(*(check_inverse_rule(case, largest, 0) for case in CASES))
    assert {name for name in RULES if f"inverse of {name}" not in used} == ON_OTHER_DEVICES
