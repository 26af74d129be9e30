"""Fixtures that several test files share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def fresh_compiler():
    """No graph compiled by another test is reused, and random numbers start at a fixed seed."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
