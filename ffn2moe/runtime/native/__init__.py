"""The fused experts operator for OpenVINO's CPU plugin: its ONNX node, its weights, and how it is built.

A node, domain `ffn2moe`, op_type `RoutedExperts`, version 1, computes a layer of experts and what stands around them,
in float32 and while a token's vector is in the cache. An expert is E_e(x) = W_out_e act(W_in_e x + b_in_e), or
W_out_e (act(W_gate_e x + b_gate_e) * (W_in_e x + b_in_e)) where gated. For each token, with
x = norm_in(given + residual), or x = given where `norm_in` is "none":

    scores_E = router_ED x + router_bias_E
    chosen_K = the K highest of scores_E + choice_bias_E (where the gate is "sigmoid", of sigmoid(scores_E) +
               choice_bias_E), the first of equal ones
    gates_K  = 1 (`unit`), softmax(scores_E) of the chosen (`softmax`), softmax of their scores (`softmax_topk`) or
               sigmoid(scores_E) of them (`sigmoid`)
    y = norm_out(added + b_out_D + sum over k of gates[k] * E_chosen[k](x))

where `added` is x ("x": a residual around the experts, as in BERT), given + residual ("sum": norms before each part of
a layer) or nothing ("none"). An expert whose gate is 0 is not computed.

| input | type | shape | |
|---|---|---|---|
| given | float32 or bfloat16 | [T, D] | tokens; T may be 0 |
| experts | uint8 constant | [E, bytes] | what `pack_experts` gives: weights, scales and input biases of each expert |
| frame | float32 constant | [numbers] | what `frame` gives: router, output bias and norms |
| residual | float32 or bfloat16 | [T, D] | only with a `norm_in` |

Output: y [T, D]. These attributes describe the experts (`experts_attributes` makes them):

| attribute | type | |
|---|---|---|
| width | int | D |
| expert_width | int | M: neurons of each expert |
| gated | int | 1 where there is a W_gate, else 0 |
| activation | string | `gelu` (erf), `gelu_tanh`, `quick_gelu`, `relu` or `silu` |
| weights | string | `bf16`, `int8` or `int4`: what `experts` holds |
| activations | string | what tokens are rounded to: `bf16` with those weights, `int16` or `int8` with others |

and these what stands around them (`frame_attributes`):

| attribute | type | |
|---|---|---|
| num_experts, num_active | int | E and K |
| gate | string | `unit`, `softmax`, `softmax_topk` or `sigmoid` |
| norm_in, norm_out | string | `layer` (LayerNorm), `rms` (RMSNorm, whose bias is 0) or `none` |
| epsilon_in, epsilon_out | float | of the norms |
| added | string | `x`, `sum` or `none` |
| output | string | what y is in: `f32` or `bf16` |

The weights stand in the file as the kernels read them, so that nothing is packed or copied when a model is loaded, and
the file is as small as its bits. Every path of the kernels reads the same layout (`pack_experts`); which one runs is
decided by the processor, or by the environment variable FFN2MOE_NATIVE, one of `PATHS`.

Precision. `bf16`: weights and activations are rounded to bfloat16 and summed in float32. `int8`: weights are whole
numbers with one scale an output row. `int4`: the same, each made of 4 bits and a whole-numbered factor for each 32 of
a row. With whole-numbered weights the activations of a token are whole numbers of 16 or 8 bits with one scale a token,
and sums are exact; the paths without such instructions compute in float32. 8 bits take half the products, and where
some columns of x are far above the others they cost precision: 6 to 7 % of the output where one is 30 times the others.
The same path gives the same bits whatever the number of threads, and whatever other tokens are in the batch.

The library has a second node, `SelfAttention`, which no file holds: `ffn2moe.runtime.engines._openvino_attention` puts
it into encoders that OpenVINO has read, on processors with AMX (docs/decisions/0036-attention-operator.md).
"""

from __future__ import annotations

from ffn2moe.runtime.activations import ACTIVATIONS
from ffn2moe.runtime.native.compiler import REMEDY, build, is_built, library
from ffn2moe.runtime.native.exact import experts_reference, reference
from ffn2moe.runtime.native.node import (
    ACTIVATIONS_OF,
    DOMAIN,
    GATES,
    OP_TYPE,
    PATHS,
    VERSION,
    WEIGHTS,
    Activations,
    Added,
    Norm,
    Weights,
    experts_attributes,
    frame,
    frame_attributes,
    weights_of,
)
from ffn2moe.runtime.native.pack import pack_experts, round_weights

__all__ = [
    "ACTIVATIONS",
    "ACTIVATIONS_OF",
    "DOMAIN",
    "GATES",
    "OP_TYPE",
    "PATHS",
    "REMEDY",
    "VERSION",
    "WEIGHTS",
    "Activations",
    "Added",
    "Norm",
    "Weights",
    "build",
    "experts_attributes",
    "experts_reference",
    "frame",
    "frame_attributes",
    "is_built",
    "library",
    "pack_experts",
    "reference",
    "round_weights",
    "weights_of",
]
