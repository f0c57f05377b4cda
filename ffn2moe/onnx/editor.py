"""Edit an ONNX graph in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

BATCH, SEQUENCE = "batch", "sequence"


class Editor:
    """Add nodes and constants to a graph; `finish` removes unused ones."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.at: ir.Node | None = None  # new nodes come before this one; at the end when None

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Return the initializer of this name, adding it the first time."""
        if name not in self.graph.initializers:
            value = ir.val(name, const_value=ir.tensor(np.asarray(array, order="C"), name=name))
            self.graph.initializers[name] = value
        return self.graph.initializers[name]

    def nodes(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        *,
        outputs: int = 1,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Add one node and return its outputs."""
        node = ir.node(op, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        if self.at is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.at, node)
        return node.outputs

    def node(
        self, op: str, *inputs: ir.Value | None, domain: str = "", name: str | None = None, **attributes: Any
    ) -> ir.Value:
        """Add one node with one output and return that."""
        return self.nodes(op, inputs, domain=domain, name=name, **attributes)[0]


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """Return the array behind a constant value, else None."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def replace(old: ir.Value, new: ir.Value) -> None:
    """Replace every use of `old`, as an input of a node or an output of the graph, by `new`."""
    new.shape, new.type = old.shape, old.type
    if old.is_graph_output():
        new.name, old.name = old.name, None
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def only_use(value: ir.Value) -> ir.Node | None:
    """Return the one node that uses the value; None if there are more or fewer, or if the graph outputs it."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def produced_by(value: ir.Value | None, op: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op else None
