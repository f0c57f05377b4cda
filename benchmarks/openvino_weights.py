"""Run dense FFNs in OpenVINO with weights of 8 or 4 bits: baselines that no plan of an export has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.ffn import EPSILON
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.runtime.engines.openvino import import_openvino

# name -> bits, weights that share a scale (None: a row), arithmetic, activations that share a scale (0: they are not
# quantised)
COMPRESSED: dict[str, tuple[int, int | None, str, int]] = {
    "ov-weights8": (8, None, "f32", 32),
    "ov-weights8-bf16": (8, None, "bf16", 0),
    "ov-weights4": (4, 128, "f32", 128),
    "ov-weights4-bf16": (4, 128, "bf16", 0),
}

Run = Callable[[np.ndarray], np.ndarray]  # x [n, D] -> y [n, D]


def compressed(
    ffns: Sequence[DenseFFN], bits: int, group: int | None, precision: str, quantised: int, threads: int
) -> tuple[Run, int]:
    """Open dense FFNs in OpenVINO with symmetric weights of 8 or 4 bits; return how to run them and the bits.

    `group` weights of a row share a scale (None: all of them). Activations are quantised at run time in groups of
    `quantised`; 0 leaves them.
    """
    width = ffns[0].w_in_FD.shape[1]
    if group is not None and (width % group or ffns[0].ffn_width % group):
        raise ValueError(f"groups of {group} weights do not divide its matrices")
    ov = import_openvino()
    import openvino.opset13 as ops

    given_nD = y_nD = ops.parameter([-1, width], np.float32)
    for ffn in ffns:
        x_nD = _norm(y_nD) if len(ffns) > 1 else y_nD
        up_nF = _linear(x_nD, ffn.w_in_FD, bits, group, ffn.b_in_F)
        gate_nF = ops.swish(_linear(x_nD, ffn.w_gate_FD, bits, group)) if ffn.gated else None
        h_nF = ops.gelu(up_nF, "erf") if gate_nF is None else ops.multiply(gate_nF, up_nF)
        made_nD = _linear(h_nF, ffn.w_out_DF, bits, group, ffn.b_out_D)
        y_nD = ops.add(y_nD, made_nD) if len(ffns) > 1 else made_nD
    model = ov.Model([ops.result(y_nD)], [given_nD], "ffn")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": quantised,
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()

    return lambda x_nD: request.infer([x_nD], share_inputs=True, share_outputs=True)[0].copy(), bits


def _linear(x: Any, weight: torch.Tensor | None, bits: int, group: int | None, bias: torch.Tensor | None = None) -> Any:
    """Return x times a compressed weight [N, K], as NNCF writes it (Convert, Multiply, Reshape, MatMul), plus bias."""
    import openvino.opset13 as ops

    ov = import_openvino()
    assert weight is not None
    N, K = weight.shape
    blocks_NBg = weight.detach().numpy().reshape(N, -1, group or K)
    largest = 2 ** (bits - 1) - 1
    scales_NB1 = np.maximum(np.abs(blocks_NBg).max(-1, keepdims=True) / largest, np.finfo(np.float32).tiny)
    steps_NBg = np.rint(blocks_NBg / scales_NB1).astype(np.int8)
    if bits == 4:
        nibbles = (steps_NBg.view(np.uint8) & 15).reshape(-1)
        packed = nibbles[0::2] | (nibbles[1::2] << 4)
        tensor = ov.Tensor(packed, ov.Shape(list(steps_NBg.shape)), ov.Type.i4)
    else:
        tensor = ov.Tensor(steps_NBg)
    constant = ov.op.Constant(tensor, shared_memory=False)
    scaled = ops.multiply(ops.convert(constant, "f32"), ops.constant(scales_NB1.astype(np.float32)))
    y = ops.matmul(x, ops.reshape(scaled, np.array([N, K]), False), False, True)
    return y if bias is None else ops.add(y, ops.constant(bias.detach().numpy()))


def _norm(x: Any) -> Any:
    import openvino.opset13 as ops

    mean_n1 = ops.reduce_mean(ops.power(x, ops.constant(np.float32(2))), ops.constant([-1]), keep_dims=True)
    inverse_n1 = ops.power(ops.add(mean_n1, ops.constant(np.float32(EPSILON))), ops.constant(np.float32(-0.5)))
    return ops.multiply(x, inverse_n1)
