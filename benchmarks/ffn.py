"""One FFN alone, as a graph: dense and as a mixture, by every plan of every engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.moe.layer import MoEFFN, moe_layers
from ffn2moe.onnx.editor import Editor
from ffn2moe.onnx.graph import DOMAIN, MIXTURE, OPSET, PARTS, ExportedMoE, save_graph
from ffn2moe.onnx.lower import activate, lower
from ffn2moe.runtime.engines import Graph
from ffn2moe.runtime.export import open_graphs
from ffn2moe.runtime.plans import DENSE_PLANS, Plan, graph_of

IR_VERSION = 10  # of the ONNX files, as the exporter writes them
EPSILON = 1e-5  # of the norms between stacked FFNs


def dense_ffn(moe: MoEFFN, ffn_width: int) -> DenseFFN:
    """The neurons of all experts in a row, `ffn_width` of them: those beyond only fill up the experts."""

    def rows(stacked: Tensor | None, shared: Tensor | None) -> Tensor | None:
        if stacked is None:
            return None
        parts = [stacked.flatten(0, 1), *([] if shared is None else [shared])]
        return torch.cat(parts[::-1])[:ffn_width].detach().clone()

    w_out_ND = rows(moe.w_out.transpose(1, 2), None if moe.shared_out is None else moe.shared_out.T)
    w_in_FD = rows(moe.w_in, moe.shared_in)
    assert w_in_FD is not None and w_out_ND is not None
    return DenseFFN(
        w_in_FD=w_in_FD,
        w_out_DF=w_out_ND.T.contiguous(),
        activation=moe.activation,
        b_in_F=rows(moe.b_in, moe.shared_b_in),
        b_out_D=None if moe.b_out is None else moe.b_out.detach().clone(),
        w_gate_FD=rows(moe.w_gate, moe.shared_gate),
        b_gate_F=rows(moe.b_gate, moe.shared_b_gate),
    )


def ffn_graph(ffns: Sequence[MoEFFN | DenseFFN]) -> ir.Model:
    """The canonical graph of one FFN alone, or of several as they follow each other in a model without attention.

    `x` [tokens, D] in, `y` [tokens, D] out; each of several reads the RMS norm of x and adds to x what it makes of it.
    The routers of mixtures must read tokens, not texts.
    """
    width = ffns[0].w_in_FD.shape[1] if isinstance(ffns[0], DenseFFN) else ffns[0].w_in.shape[2]
    x_TD = ir.val("x", ir.DataType.FLOAT, ["tokens", width])
    graph = ir.Model(ir.Graph([x_TD], [], nodes=[], opset_imports={"": OPSET}, name="ffn"), ir_version=IR_VERSION)
    editor = Editor(graph)
    graph.graph.opset_imports[DOMAIN] = 1
    y_TD = x_TD
    for layer, ffn in enumerate(ffns):
        name, residual_TD = f"ffn.{layer}", y_TD
        if len(ffns) > 1:
            scale_D = editor.constant("norm", np.ones(width, dtype=np.float32))
            y_TD = _of_rows(editor.node("RMSNormalization", y_TD, scale_D, axis=-1, epsilon=EPSILON), x_TD)
        y_TD = _dense(editor, y_TD, ffn, name) if isinstance(ffn, DenseFFN) else _mixture(editor, y_TD, ffn, name)
        _of_rows(y_TD, x_TD)
        if len(ffns) > 1:
            y_TD = _of_rows(editor.node("Add", residual_TD, y_TD), x_TD)
    y_TD.name = "y"
    graph.graph.outputs.append(y_TD)
    return graph


def _of_rows(value: ir.Value, like: ir.Value) -> ir.Value:
    """The value, known to be [tokens, D]."""
    value.shape, value.type = like.shape, like.type
    return value


def _mixture(editor: Editor, x_TD: ir.Value, moe: MoEFFN, name: str) -> ir.Value:
    exported = ExportedMoE(moe)
    parts = [
        None if part is None else editor.constant(f"{name}.{key}", part.detach().numpy())
        for key, part in ((key, getattr(exported, key)) for key in PARTS)
    ]
    attributes: dict[str, Any] = exported.attributes
    y_TD = editor.node(MIXTURE, x_TD, None, *parts, domain=DOMAIN, **attributes)
    if moe.shared_in is not None and moe.shared_out is not None:
        shared = DenseFFN(
            w_in_FD=moe.shared_in,
            w_out_DF=moe.shared_out,
            activation=moe.activation,
            b_in_F=moe.shared_b_in,
            w_gate_FD=moe.shared_gate,
            b_gate_F=moe.shared_b_gate,
        )
        y_TD = editor.node("Add", y_TD, _dense(editor, x_TD, shared, f"{name}.shared"))
    return y_TD


def _dense(editor: Editor, x_TD: ir.Value, ffn: DenseFFN, name: str) -> ir.Value:
    def linear(part: str, x: ir.Value, weight_NK: Tensor, bias_N: Tensor | None) -> ir.Value:
        inputs = [editor.constant(f"{name}.{part}.weight", weight_NK.detach().numpy().T)]
        if bias_N is not None:
            inputs.append(editor.constant(f"{name}.{part}.bias", bias_N.detach().numpy()))
        return editor.node("Gemm", x, *inputs, name=f"{name}.{part}")

    h_TF = linear("in", x_TD, ffn.w_in_FD, ffn.b_in_F)
    if ffn.w_gate_FD is None:
        h_TF = activate(editor, h_TF, ffn.activation)
    else:
        gate_TF = linear("gate", x_TD, ffn.w_gate_FD, ffn.b_gate_F)
        h_TF = editor.node("Mul", activate(editor, gate_TF, ffn.activation), h_TF)
    return linear("out", h_TF, ffn.w_out_DF, ffn.b_out_D)


class Layers:
    """FFNs of a model, each alone or `stacked` in one graph: their canonical graphs, dense and as mixtures."""

    def __init__(self, mixtures: Sequence[MoEFFN], ffn_widths: Sequence[int], *, stacked: bool = False) -> None:
        if any(moe.texts is not None for moe in mixtures):
            raise ValueError("the routers read whole texts: an FFN alone has none")
        kinds: dict[str, Sequence[MoEFFN | DenseFFN]] = {
            "mixture": mixtures,
            "dense": [dense_ffn(moe, ffn_width) for moe, ffn_width in zip(mixtures, ffn_widths, strict=True)],
        }
        self._graphs = {
            kind: [ffn_graph(ffns)] if stacked else [ffn_graph([ffn]) for ffn in ffns] for kind, ffns in kinds.items()
        }

    def open(self, plan: str, threads: int, folder: Path) -> list[Graph]:
        """The graphs by one plan, written to `folder` first; ValueError where the plan or its engine cannot."""
        canonical = self._graphs["dense" if plan in DENSE_PLANS else "mixture"]
        name = graph_of(plan)
        files = [folder / f"{name}-{layer}.onnx" for layer in range(len(canonical))]
        for file, graph in zip(files, canonical, strict=True):
            if not file.is_file():
                save_graph(lower(graph, cast(Plan, name)), file)
        return open_graphs(files, plan, threads=threads)


def runner(graphs: Sequence[Graph], read: Sequence[Sequence[np.ndarray]]) -> Callable[[int], object]:
    """A call that runs all layers one after the other, on what they read in the batch of that round: `read`."""

    def run(index: int) -> None:
        for graph, x_TD in zip(graphs, read[index % len(read)], strict=True):
            graph.run(["y"], {"x": x_TD})

    return run


@torch.no_grad()
def inputs_of(model: nn.Module, ids_BL: np.ndarray, mask_BL: np.ndarray) -> list[np.ndarray]:
    """What the FFN of each layer reads for these tokens, float32 [T, D]."""
    read: list[np.ndarray] = []
    hooks = [
        moe.register_forward_pre_hook(
            lambda _, arguments: read.append(arguments[0].reshape(-1, arguments[0].shape[-1]).numpy().copy())
        )
        for moe in moe_layers(model)
    ]
    try:
        model(input_ids=torch.from_numpy(ids_BL), attention_mask=torch.from_numpy(mask_BL))
    finally:
        for hook in hooks:
            hook.remove()
    return read
