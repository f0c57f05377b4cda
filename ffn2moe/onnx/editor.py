"""Edit an ONNX graph in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

BATCH, SEQUENCE = "batch", "sequence"

# --- editing a graph ------------------------------------------------------------------------------------------------


class Editor:
    """Adds nodes and constants to a graph; what is left without a use goes in `finish`."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.at: ir.Node | None = None  # new nodes come before this one; at the end when None

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """An initializer of that name; asked for twice, it is the same one."""
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
        """Adds one node and gives its outputs."""
        node = ir.node(op, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        if self.at is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.at, node)
        return node.outputs

    def node(
        self, op: str, *inputs: ir.Value | None, domain: str = "", name: str | None = None, **attributes: Any
    ) -> ir.Value:
        """Adds one node with one output and gives that."""
        return self.nodes(op, inputs, domain=domain, name=name, **attributes)[0]


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The array behind a constant value, else None."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def replace(old: ir.Value, new: ir.Value) -> None:
    """Every use of `old`, as an input of a node or an output of the graph, becomes one of `new`."""
    new.shape, new.type = old.shape, old.type
    if old.is_graph_output():
        new.name, old.name = old.name, None
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def only_use(value: ir.Value) -> ir.Node | None:
    """The one node that uses the value; None if there are more or fewer, or if the graph gives it out."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def produced_by(value: ir.Value | None, op: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op else None
