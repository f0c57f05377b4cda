"""Test the operators of a plan on this machine before its results are believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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


def one_node(
    op: str, inputs: Mapping[str, int], constants: Mapping[str, np.ndarray], attributes: Mapping[str, Any]
) -> bytes:
    """Return a model of one node of `op`, DOMAIN.TYPE, as plans hold it.

    `inputs` are names and widths of float32 inputs [tokens, width]; the output `y` is as wide as the first.
    """
    from onnx import TensorProto, helper, numpy_helper

    domain, _, kind = op.rpartition(".")
    given = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", width]) for name, width in inputs.items()
    ]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", next(iter(inputs.values()))])
    node = helper.make_node(kind, [*inputs, *constants], ["y"], domain=domain, **attributes)
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
    graph = helper.make_graph([node], "self_test", given, [y], tensors)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
