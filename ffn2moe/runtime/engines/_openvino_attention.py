"""Put the operator's attention into a model that OpenVINO has read, where this processor computes it faster."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

HEAD_STEP = 32  # the size of a head is a multiple of it
OP_TYPE = "SelfAttention"
SWAPPED = [0, 2, 1, 3]  # texts, tokens, heads, size <-> texts, heads, tokens, size


@cache
def has_attention(library: Path) -> bool:
    """Return whether the operator's library has a path of `SelfAttention` for this processor: that of AMX."""
    found = getattr(ctypes.CDLL(str(library)), "ffn2moe_has_attention", None)  # None: of an earlier version
    return found is not None and bool(found())


def fuse_attention(model: Any, library: Path) -> int:
    """Replace the attention of an encoder by the operator's, on bfloat16 numbers; return in how many layers.

    The operator reads queries, keys and values as the linear maps write them, so that the transpositions around the
    attention go, too. It looks at the tokens alone that the mask keeps. What it does not compute stays as it is: masks
    that differ from token to token or are numbers, attention that looks back only, keys that heads share, and heads
    whose size is no multiple of 32. Where the library has no path for this processor, everything stays.
    """
    if not has_attention(library):
        return 0
    done = 0
    for node in model.get_ordered_ops():
        given = _inputs(node) if node.get_type_name() == "ScaledDotProductAttention" else None
        out = None if given is None else _turned_out(node)
        if given is None or out is None:
            continue
        for value in given.values:
            _round(value)
        keep = [] if given.keep is None else [given.keep]
        fused = _factory(library).create(OP_TYPE, [*given.values, *keep], {"scale": given.scale})
        fused.set_friendly_name(node.get_friendly_name())
        out.output(0).replace(fused.output(0))
        _widen(fused.output(0))
        done += 1
    if done:
        model.validate_nodes_and_infer_types()
    return done


@cache
def _factory(library: Path) -> Any:
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory()
    factory.add_extension(str(library))
    return factory


@dataclass(frozen=True)
class _Inputs:
    """Hold what attention reads."""

    values: list[Any]  # queries, keys and values, [B, L, H, N]
    keep: Any | None  # the tokens that are kept, boolean [B, 1, 1, L]; None: all
    scale: float


def _inputs(node: Any) -> _Inputs | None:
    """Return what the operator reads in place of this node; None where it cannot compute the same."""
    values = [_turned_in(node.input_value(index)) for index in range(3)]
    if node.get_attributes()["causal"] or any(value is None for value in values):
        return None
    sizes = {_heads(value) for value in values}
    if len(sizes) != 1:
        return None
    [(heads, size)] = sizes
    if not heads or not size or size % HEAD_STEP:
        return None
    masked = node.get_input_size() > 3
    keep = _kept(node.input_value(3)) if masked else None
    scale = _number(node.input_value(4)) if node.get_input_size() > 4 else 1 / math.sqrt(size)
    if (masked and keep is None) or scale is None:
        return None
    return _Inputs(values, keep, scale)


def _round(value: Any) -> None:
    """Make numbers bfloat16 before they are reshaped: next to a linear map, OpenVINO has the map write them so.

    It would rather copy them by a kernel that it makes for small operations, of six axes at most. So here are seven.
    """
    from openvino import opset13

    first = value.get_node()
    above = first.input_value(0)
    while above.get_node().get_type_name() == "Reshape" and _users(above) == [first]:
        first = above.get_node()
        above = first.input_value(0)
    shape = first.get_input_partial_shape(0)
    if shape.rank.is_dynamic:
        first.input(0).replace_source_output(opset13.convert(above, "bf16").output(0))
        return
    size = opset13.shape_of(above)
    deep = opset13.unsqueeze(above, opset13.constant(np.arange(7 - len(shape))))
    half = opset13.reshape(opset13.convert(deep, "bf16"), size, False)
    first.input(0).replace_source_output(half.output(0))


def _widen(value: Any) -> None:
    """Make bfloat16 numbers float32 after they are reshaped: next to a rounding, OpenVINO makes that a part of it."""
    from openvino import opset13

    while len(users := _users(value)) == 1 and users[0].get_type_name() == "Reshape":
        value = users[0].output(0)
    targets = value.get_target_inputs()
    wide = opset13.convert(value, "f32").output(0)
    for target in targets:
        target.replace_source_output(wide)


def _users(value: Any) -> list[Any]:
    return [target.get_node() for target in value.get_target_inputs()]


def _is_swap(node: Any) -> bool:
    if node.get_type_name() != "Transpose":
        return False
    order = node.input_value(1).get_node()
    return bool(order.get_type_name() == "Constant" and order.data.tolist() == SWAPPED)


def _turned_in(value: Any) -> Any | None:
    """Return what is turned to [B, H, L, N]; None where nothing is."""
    node = value.get_node()
    return node.input_value(0) if _is_swap(node) else None


def _turned_out(node: Any) -> Any | None:
    """Return the node that turns the output back, the only one that reads it; None where there is none."""
    users = _users(node.output(0))
    return users[0] if len(users) == 1 and _is_swap(users[0]) else None


def _heads(value: Any) -> tuple[int, int]:
    """Return H and N of numbers [B, L, H, N]; 0 for what is not known before the model runs.

    Their last axis may be free, as the shape of a batch is: then what they are reshaped from tells it.
    """
    shape = value.get_partial_shape()
    if shape.rank.is_dynamic or len(shape) != 4 or shape[2].is_dynamic:
        return 0, 0
    heads = shape[2].get_length()
    if shape[3].is_static:
        return heads, shape[3].get_length()
    node = value.get_node()
    while node.get_type_name() == "Reshape":
        node = node.input_value(0).get_node()
        shape = node.get_output_partial_shape(0)
        if shape.rank.is_static and len(shape) and shape[len(shape) - 1].is_static:
            return heads, shape[len(shape) - 1].get_length() // heads
    return heads, 0


def _kept(mask: Any) -> Any | None:
    """Return the boolean [B, 1, 1, L] that a mask is made of; None where each token has a mask of its own."""
    node = mask.get_node()
    if node.get_type_name() == "Select":  # numbers to add, of booleans (`plain_attention`)
        if _number(node.input_value(1)) != 0:
            return None
        mask = node.input_value(0)
        node = mask.get_node()
    if node.get_type_name() == "Broadcast":
        mask = node.input_value(0)
    shape = mask.get_partial_shape()
    if mask.get_element_type().get_type_name() != "boolean" or shape.rank.is_dynamic or len(shape) != 4:
        return None
    alike = all(axis.is_static and axis.get_length() == 1 for axis in (shape[1], shape[2]))
    return mask if alike else None


def _number(value: Any) -> float | None:
    """Return a constant number; None for what is no such constant."""
    node = value.get_node()
    if node.get_type_name() in ("Convert", "ConvertLike"):
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant" or np.size(node.data) != 1:
        return None
    return float(np.reshape(node.data, -1)[0])
