"""Rewrite a model that OpenVINO has read from ONNX, so that it computes the same faster, in less memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

MASKED = -1e9  # added to the score of a masked token: its share is 0 in float32 and bfloat16, and nothing is infinite
BEAMS = "beam_idx"  # input [B]: which text of the batch before each one continues
PAST, PRESENT = "past_key_values.", "present."  # the cache, as inputs and as outputs


def has_blocks(model: Any) -> bool:
    """Return whether linear maps have weights of 8 or 4 bits in blocks (`MatMulNBits`).

    Other unsigned numbers are the zeros of quantised activations, each alone.
    """
    packed = ("u4", "u8")
    return any(
        node.get_type_name() == "Constant"
        and len(node.shape) > 1
        and node.get_output_element_type(0).get_type_name() in packed
        and any(target.get_node().get_type_name() == "Convert" for target in node.output(0).get_target_inputs())
        for node in model.get_ordered_ops()
    )


def keep_cache(model: Any) -> Mapping[str, str]:
    """Let the model keep keys and values between runs; return the output of each such input, {} where there is none.

    The inputs `PAST` and outputs `PRESENT` become state. Attention then writes new keys and values behind the old ones
    in place, where a model without state copies all of them at each token. OpenVINO finds that form if the cache is
    gathered by an input `BEAMS`. An empty cache has the batch of `input_ids`.
    """
    from openvino import opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    names = [port.any_name for port in model.inputs if port.any_name.startswith(PAST)]
    if not names:
        return {}
    beams_B = opset13.parameter([-1], np.int32, BEAMS)
    beams_B.output(0).get_tensor().add_names({BEAMS})
    model.add_parameters([beams_B])
    zero = opset13.constant(np.int64(0))
    for name in names:
        past = model.input(name).get_node().output(0)
        users = past.get_target_inputs()
        chosen = opset13.gather(past, beams_B, zero)
        for user in users:
            user.replace_source_output(chosen.output(0))
    model.validate_nodes_and_infer_types()
    outputs = {name: name.replace(PAST, PRESENT) for name in names}
    apply_make_stateful_transformation(model, outputs)
    batch_1 = opset13.gather(opset13.shape_of(model.input("input_ids").get_node()), opset13.constant([0]), zero)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ReadValue":
            sizes = [opset13.constant([axis.min_length]) for axis in list(node.get_output_partial_shape(0))[1:]]
            empty = opset13.broadcast(opset13.constant(np.float32(0)), opset13.concat([batch_1, *sizes], 0))
            node.set_arguments([empty])
    model.validate_nodes_and_infer_types()
    return outputs


def share_weights(model: Any) -> None:
    """Transpose the matrices of products once, to [out, in] in float32, as OpenVINO wants them.

    Otherwise it does so whenever it compiles the model, and every compiled model has a copy of its own.
    """
    from openvino import opset13

    for product in model.get_ordered_ops():
        if product.get_type_name() != "MatMul":
            continue
        weight, turned = product.input_value(1).get_node(), product.get_attributes()
        if weight.get_type_name() == "Convert":  # the plan keeps them in float16
            weight = weight.input_value(0).get_node()
        if weight.get_type_name() != "Constant" or turned["transpose_b"] or len(weight.shape) != 2:
            continue
        weight_NK = opset13.constant(np.ascontiguousarray(weight.data.T, dtype=np.float32))
        same = opset13.matmul(product.input_value(0), weight_NK, turned["transpose_a"], True)
        same.set_friendly_name(product.get_friendly_name())
        product.output(0).replace(same.output(0))


def plain_attention(model: Any) -> None:
    """Rewrite attention so that OpenVINO computes it, and fast; the numbers stay those of ONNX's operator.

    - Masks are numbers to add, made of booleans once and not in every layer, and finite: so nothing is NaN that ONNX
      wants as 0, and the two nodes that look for NaN go.
    - Keys and values that several heads share are repeated: OpenVINO 2026.4 takes such a model, and then finds batches
      of products that do not fit (on one thread without a word, and the outputs stay empty).
    """
    from openvino import opset13

    def number(value: Any, kind: type = np.int64) -> Any:
        return opset13.constant(np.array(value, dtype=kind))

    masks: dict[Any, Any] = {}  # of booleans -> of numbers
    for node in model.get_ordered_ops():
        if node.get_type_name() != "ScaledDotProductAttention" or node.get_input_size() < 4:
            continue
        query, key, value, mask = (node.input_value(index) for index in range(4))
        if mask.get_element_type().get_type_name() == "boolean":
            source = (mask.get_node().get_friendly_name(), mask.get_index())
            if source not in masks:
                masks[source] = opset13.select(mask, number(0, np.float32), number(MASKED, np.float32))
            node.input(3).replace_source_output(masks[source].output(0))
            for checked in [target.get_node() for target in node.output(0).get_target_inputs()]:
                if checked.get_type_name() == "Select":
                    checked.output(0).replace(node.output(0))
        heads, shared = query.get_partial_shape()[1], key.get_partial_shape()[1]
        if heads.is_static and shared.is_static and heads.get_length() == shared.get_length():
            continue
        heads_1 = opset13.gather(opset13.shape_of(query), number([1]), number(0))
        for index, one in ((1, key), (2, value)):
            size = opset13.shape_of(one)
            before, held, after = (opset13.gather(size, number(axes), number(0)) for axes in ([0], [1], [2, 3]))
            times = opset13.divide(heads_1, held)
            repeats = opset13.concat([number([1, 1]), times, number([1, 1])], 0)
            repeated = opset13.broadcast(opset13.unsqueeze(one, number(2)), repeats, broadcast_spec="BIDIRECTIONAL")
            whole = opset13.reshape(repeated, opset13.concat([before, heads_1, after], 0), False)
            node.input(index).replace_source_output(whole.output(0))
    model.validate_nodes_and_infer_types()
