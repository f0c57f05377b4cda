"""Put the linear maps of a graph in int8, weights and activations, with ranges that are measured beforehand."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from ffn2moe.onnx.editor import Editor, replace
from ffn2moe.onnx.mixture import PlanRefused
from ffn2moe.onnx.parity import Sample
from ffn2moe.onnx.quantise import int8, linear_maps
from ffn2moe.runtime.at_once import TOKEN_TYPES
from ffn2moe.runtime.engines.onnxruntime import session
from ffn2moe.runtime.plans import Plan

RANGES = "ffn2moe.ranges"  # where a graph's `meta` holds the least and largest number of each linear map's input
LARGEST_WEIGHT = 63  # 7 bits: two products of bytes then fit 16 bits, where CPUs without VNNI add them
MOST_ROWS = 128  # texts or images that ranges are measured on: more move them by little


def measure_ranges(model: ir.Model, samples: Iterable[Sample], computes: ir.Model) -> None:
    """Note the least and the largest number that the first samples bring to each linear map, by its name.

    `computes` is the same model in standard operators, which runs on the samples. Padding is left out, as no output
    depends on it. The extremes themselves are the range, not quantiles: the few tokens with extreme numbers carry
    attention (docs/decisions/0018). Runs on one thread, so that the numbers are the same every time.
    """
    wanted = {one.name for one in linear_maps(model)}
    measuring = computes.clone()
    editor = Editor(measuring)
    last_axis = editor.constant("last_axis", np.array([-1]))
    maps_of: dict[ir.Value, list[str]] = {}
    for one in linear_maps(measuring):
        if one.name in wanted:
            maps_of.setdefault(one.node.inputs[0], []).append(one.name)
    names = []
    for value in maps_of:
        for reduction in ("ReduceMin", "ReduceMax"):
            of_rows = editor.node(reduction, value, last_axis, keepdims=0)
            of_rows.name, of_rows.type = f"{value.name}.{reduction}", ir.TensorType(ir.DataType.FLOAT)
            measuring.graph.outputs.append(of_rows)
            names.append(of_rows.name)
    opened = session(ir.to_proto(measuring).SerializeToString(), threads=1)
    rows = 0
    ranges: dict[str, tuple[float, float]] = {}
    for sample in samples:
        if rows >= MOST_ROWS:
            break
        first, mask = next(iter(sample.values())), sample.get("attention_mask")
        rows += len(first)
        given = {TOKEN_TYPES: np.zeros_like(first), **sample}  # as `runtime.at_once` fills them in
        found = opened.run(names, {value.name: given[value.name] for value in measuring.graph.inputs})
        for maps, least, largest in zip(maps_of.values(), found[::2], found[1::2], strict=True):
            counts = mask.ravel() != 0 if mask is not None and mask.size == least.size else slice(None)
            low, high = float(least.ravel()[counts].min()), float(largest.ravel()[counts].max())
            for name in maps:
                before = ranges.get(name, (low, high))
                ranges[name] = min(low, before[0]), max(high, before[1])
    model.graph.meta[RANGES] = ranges


def quantise_statically(model: ir.Model, plan: Plan) -> None:
    """Put linear maps in int8: weights per output channel, activations per tensor, in the ranges that were measured.

    The form is standard ONNX (`QuantizeLinear`, `DequantizeLinear`), which engines fuse into products of bytes. An
    input of several maps is quantised once. Raises PlanRefused where nobody has measured ranges.

    Weights have 7 bits, so that the plan computes the same on every CPU: without VNNI a product of 8 bits by 8 may
    saturate.
    """
    editor = Editor(model)
    maps = linear_maps(model)
    ranges: dict[str, tuple[float, float]] = model.graph.meta.get(RANGES, {})
    if not ranges.keys() >= {one.name for one in maps}:
        raise PlanRefused(
            f"{plan.name}: it rounds activations in ranges that are measured on calibration texts, and it got none"
        )
    rounded: dict[ir.Value, ir.Value] = {}
    for node, name, weight, bias in maps:
        editor.at = node
        x = node.inputs[0]
        if x not in rounded:
            scale, zero = _unsigned(editor, name, *ranges[name])
            steps = editor.node("QuantizeLinear", x, scale, zero)
            rounded[x] = editor.node("DequantizeLinear", steps, scale, zero)
        widened = editor.node("DequantizeLinear", *int8(editor, name, weight, LARGEST_WEIGHT), axis=1)
        y = editor.node("MatMul", rounded[x], widened)
        if bias is not None:
            y = editor.node("Add", y, bias)
        replace(node.outputs[0], y)


def _unsigned(editor: Editor, name: str, low: float, high: float) -> tuple[ir.Value, ir.Value]:
    """Return the scale and the zero of unsigned bytes that hold a range, and 0 exactly."""
    low, high = float(min(low, 0)), float(max(high, 0))
    scale = max((high - low) / 255, float(np.finfo(np.float32).tiny))
    zero = round(-low / scale)
    return (
        editor.constant(f"{name}.input_scale", np.array(scale, dtype=np.float32)),
        editor.constant(f"{name}.input_zero", np.array(zero, dtype=np.uint8)),
    )
