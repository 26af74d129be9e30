"""Rules of your own: how to solve for what a custom operation has read.

    @register_inverse("mylib::scale")
    def scale(call):
        yield Recipe(solves=(0,), function=lambda y, factor: y / factor, reads=(1,))

`docs/writing-a-rule.md` says what a rule is, and `moonwalk_compile.testing.check_rule` tests one.
"""

from __future__ import annotations

from typing import Any

import torch

from .errors import UsageError
from .passes.cost import qualified_name
from .passes.inverse import CUSTOM, RULES, Call, Recipe, Rule

__all__ = ["Call", "Recipe", "Rule", "register_inverse", "register_vijp"]


def register_inverse(operation: Any, rule: Rule | None = None) -> Any:
    """Say how an operation's input follows from its output; usable as a decorator.

    Args:
        operation: "namespace::name", or the operation itself (`torch.ops.mylib.scale`).
        rule: a function of a `Call` that yields `Recipe`s; nothing where it does not apply.

    A rule holds for models that are compiled afterwards; a second one for the same operation takes the first one's
    place. Raises UsageError for an operation that does not exist, and for one of torch's own that has a rule already.
    """
    name = _name_of(operation)
    if name in RULES:
        what = f"{name} has a rule of moonwalk_compile's own"
        raise UsageError("The rule cannot be registered", what, "register rules for operations of your own")

    def register(rule: Rule) -> Rule:
        CUSTOM[name] = rule
        return rule

    return register if rule is None else register(rule)


def register_vijp(operation: Any, rule: Rule | None = None) -> Any:
    """Say how the output cotangent follows from the input cotangent (the vector-inverse-Jacobian product).

    `operation` is the one that the custom operation's backward pass calls: it is linear in its cotangent, and the rule
    solves for that. To the engine it is an inverse like any other; everything said of `register_inverse` holds.
    """
    return register_inverse(operation, rule)


def _name_of(operation: Any) -> str:
    if isinstance(operation, str):
        namespace, _, name = operation.partition("::")
        operation = getattr(getattr(torch.ops, namespace), name, None) if name else None
        if operation is None:
            raise UsageError("Unknown operation", "no operation of that name is registered", _TODO)
    if not isinstance(operation, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        raise UsageError("Unknown operation", f"{operation!r} is no operation of torch.ops", _TODO)
    if isinstance(operation, torch._ops.OpOverloadPacket):
        operation = getattr(operation, operation.overloads()[0])
    return qualified_name(operation)


_TODO = 'give "namespace::name" or torch.ops.namespace.name, after it was defined'
