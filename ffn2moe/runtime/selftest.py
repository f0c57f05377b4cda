"""Test the operators of a plan on this machine before its results are believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ffn2moe.runtime.engines import CPU
from ffn2moe.runtime.plans import plan_of, resolve


def self_tests(plan: str, spec: Mapping[str, Any], providers: Sequence[str] = CPU) -> float | None:
    """Test a plan's operator for every kind of FFN of the model; return the largest difference, None without operator.

    `spec` is the manifest's. RuntimeError where the operator computes something else than the export expects.
    """
    row = plan_of(plan)
    if row.operator is None:
        return None
    test = resolve(row.operator.self_test)
    kinds = sorted({(stack["activation"], stack["gated"]) for stack in spec["stacks"]})
    return max(float(test(row, activation, gated, providers)) for activation, gated in kinds)
