"""Run FFNs alone, as graphs: dense and as mixtures, by every plan of every engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ffn2moe.decompose.layer import dense_ffn, mixture
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.onnx.editor import Editor
from ffn2moe.onnx.graph import OPSET, ExportedMoE, save_graph
from ffn2moe.onnx.lower import lower
from ffn2moe.onnx.mixture import activate
from ffn2moe.onnx.names import DOMAIN, MIXTURE, PARTS
from ffn2moe.onnx.quantise import linear_maps
from ffn2moe.onnx.static import MOST_ROWS, measure_ranges
from ffn2moe.runtime.engines import Graph
from ffn2moe.runtime.export import open_graphs
from ffn2moe.runtime.plans import graph_of, is_dense, plan_of
from ffn2moe.sentence import SentenceModules
from ffn2moe.spec import FFNShape, MoESpec

IR_VERSION = 10  # the exporter writes ONNX files of this version
EPSILON = 1e-5  # in the norms between stacked FFNs


def random_spec(
    width: int, ffn_width: int, experts: int, active: int, *, gated: bool = True, **changes: Any
) -> MoESpec:
    """Return the spec of one layer: SwiGLU as in LLaMA if `gated`, else GELU with biases as in BERT.

    `shared` (neurons of the shared expert), `layers` and fields of MoESpec go into `changes`. ValueError for sizes that
    do not fit.
    """
    if min(width, ffn_width, experts, active) < 1:
        raise ValueError("width, FFN width, experts and active experts start at 1")
    shared, layers = changes.pop("shared", 0), changes.pop("layers", 1)
    if (ffn_width - shared) % experts or active > experts:
        raise ValueError(
            f"{experts} experts, {active} active, do not divide {ffn_width - shared} neurons: choose others"
        )
    activation = "silu" if gated else "gelu"
    shape = FFNShape("layers", layers, width, ffn_width, (ffn_width - shared) // experts, shared, gated, activation)
    values: dict[str, Any] = {
        "family": "llama" if gated else "bert",
        "model_class": "random",
        "head": "causal" if gated else "embedding",
        "stacks": (shape,),
        "num_experts": experts,
        "num_active": active,
        "gate": "unit",
        "router_bias": True,
        "container": None,
        "partition": "coactivation",
        "teacher": "random weights",
        "sentence": None if gated else SentenceModules(),
        "max_length": 2048,
    }
    return MoESpec(**values | changes)


def random_mixture(spec: MoESpec, seed: int = 0) -> MoEFFN:
    """Return a mixture with random weights and a random router; the shared expert has the first neurons."""
    generator = torch.Generator().manual_seed(seed)
    gated = spec.stacks[0].gated
    moe = MoEFFN(spec, b_in=not gated, b_out=not gated)
    E, M = moe.neurons.shape
    shared = len(moe.shared_neurons)
    moe.shared_neurons.copy_(torch.arange(shared))
    moe.neurons.copy_(shared + torch.arange(E * M).reshape(E, M))
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            if parameter.dim() and name != "router.bias":
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return moe.eval()


def one_expert(ffn: DenseFFN) -> MoEFFN:
    """Return a dense FFN as a mixture of one expert, which every token uses."""
    F, D = ffn.w_in_FD.shape
    neurons_1F = torch.arange(F).unsqueeze(0)
    return mixture(ffn, neurons_1F, neurons_1F.new_zeros(0), random_spec(D, F, 1, 1, gated=ffn.gated), 0)


def ffn_graph(ffns: Sequence[MoEFFN | DenseFFN]) -> ir.Model:
    """Return the canonical graph of one FFN, or of several in sequence: x [tokens, D] -> y [tokens, D].

    Each of several FFNs computes x + FFN(norm(x)), as in a model without attention.
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
    """Set the shape of a value to [tokens, D]."""
    value.shape, value.type = like.shape, like.type
    return value


def _mixture(editor: Editor, x_TD: ir.Value, moe: MoEFFN, name: str) -> ir.Value:
    exported = ExportedMoE(moe)
    parts = [
        None if part is None else editor.constant(f"{name}.{key}", part.detach().numpy())
        for key, part in ((key, getattr(exported, key)) for key in PARTS)
    ]
    attributes: dict[str, Any] = exported.attributes
    y_TD = editor.node(MIXTURE, x_TD, *parts, domain=DOMAIN, **attributes)
    if len(moe.shared_neurons):
        shared = dense_ffn(moe).narrow(moe.shared_neurons)
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
    """Hold the canonical graphs of FFNs, dense and as mixtures: one graph each, or one for all if `stacked`."""

    def __init__(self, mixtures: Sequence[MoEFFN], *, stacked: bool = False) -> None:
        if any(moe.reader is not None for moe in mixtures):
            raise ValueError("the routers read whole texts: an FFN alone has none")
        kinds: dict[str, Sequence[MoEFFN | DenseFFN]] = {
            "mixture": mixtures,
            "dense": [dense_ffn(moe) for moe in mixtures],
        }
        self._graphs = {
            kind: [ffn_graph(ffns)] if stacked else [ffn_graph([ffn]) for ffn in ffns] for kind, ffns in kinds.items()
        }

    def open(self, plan: str, threads: int, folder: Path) -> list[Graph]:
        """Open the graphs by one plan, from files in `folder`; ValueError if the plan or its engine cannot run them."""
        canonical = self._graphs["dense" if is_dense(plan) else "mixture"]
        name = graph_of(plan)
        files = [folder / f"{name}-{layer}.onnx" for layer in range(len(canonical))]
        for file, graph in zip(files, canonical, strict=True):
            if not file.is_file():
                if plan_of(name).calibrated and linear_maps(graph):
                    measure_ranges(graph, [random_rows(graph)], lower(graph, "sorted"))
                save_graph(lower(graph, name), file)
        return open_graphs(files, plan, threads=threads)


def random_rows(graph: ir.Model) -> dict[str, np.ndarray]:
    """Return normal numbers for the input of an FFN's graph: speed does not depend on the ranges."""
    (x_TD,) = graph.graph.inputs
    assert x_TD.shape is not None and x_TD.name is not None
    rows = np.random.default_rng(0).standard_normal((MOST_ROWS, int(x_TD.shape[1])))
    return {x_TD.name: rows.astype(np.float32)}


class TrainedFFN(nn.Module):
    """Train the weights of a dense FFN as those of experts: the baseline of a mixture."""

    def __init__(self, ffn: DenseFFN) -> None:
        super().__init__()
        for name, value in vars(ffn).items():
            if isinstance(value, Tensor):
                self.register_parameter(name, nn.Parameter(value.detach().clone()))
        self._ffn = replace(ffn, **dict(self.named_parameters()))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self._ffn(x)
        return found
