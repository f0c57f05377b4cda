"""Make the graph of a plan: the canonical graph, rewritten by the steps of the plan's row.

Which plan is fastest depends on the machine and on batch x sequence, so it is measured (`tasks.benchmark`), not known.
"""

from __future__ import annotations

import onnx_ir as ir

from ffn2moe.onnx.mixture import PlanRefused
from ffn2moe.onnx.names import DOMAIN, MIXTURE
from ffn2moe.onnx.simplify import finish
from ffn2moe.runtime import native
from ffn2moe.runtime.microsoft import MICROSOFT
from ffn2moe.runtime.plans import graph_of, plan_of, resolve

__all__ = ["PlanRefused", "lower"]


def lower(canonical: ir.Model, plan: str) -> ir.Model:
    """Return the graph of one plan, from the canonical graph of the mixture (of the teacher, for dense plans).

    PlanRefused, a ValueError, where the plan cannot compute what the model needs; UnknownName for an unknown plan.
    """
    row = plan_of(graph_of(plan))
    graph = canonical.clone()
    for step in row.steps:
        resolve(step)(graph, row)
    if any(node.domain == MICROSOFT for node in graph.graph):
        graph.graph.opset_imports[MICROSOFT] = 1
    graph.graph.opset_imports[native.DOMAIN] = native.VERSION  # `finish` drops it where no node uses it
    finish(graph)
    if any(node.op_type == MIXTURE and node.domain == DOMAIN for node in graph.graph):
        raise PlanRefused(f"{plan}: no step of this plan computes a mixture; give it the teacher's graph")
    return graph
