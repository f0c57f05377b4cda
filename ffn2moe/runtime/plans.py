"""Name the execution plans of an export and what each one is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from ffn2moe.runtime import native
from ffn2moe.runtime.engines import Engine, Graph

if TYPE_CHECKING:
    pass


# What they are: ffn2moe.onnx.lower. Those of OpenVINO begin with ov-.
Plan = Literal[
    "dense",
    "dense8",
    "dense4",
    "fused",
    "qmoe8",
    "qmoe4",
    "sorted",
    "sorted8",
    "ov-dense",
    "ov-dense8",
    "ov-sorted",
    "ov-native",
    "ov-native8",
    "ov-native8a8",
    "ov-native4",
]
OV = "ov-"
DECODER_PLANS: tuple[Plan, ...] = ("dense", "dense8", "dense4", "fused", "qmoe8", "qmoe4", "sorted", "sorted8")
PLANS: tuple[Plan, ...] = ("dense", "dense8", "fused", "sorted", "sorted8")  # of models that read all at once
OPENVINO_PLANS: tuple[Plan, ...] = tuple(plan for plan in get_args(Plan) if plan.startswith(OV))
DENSE_PLANS: tuple[Plan, ...] = ("dense", "dense8", "dense4", "ov-dense", "ov-dense8")
INT8_PLANS: tuple[Plan, ...] = ("dense8", "sorted8")  # by ONNX Runtime's dynamic quantisation
QUANTIZED_PLANS: tuple[Plan, ...] = (
    *INT8_PLANS,
    "dense4",
    "qmoe8",
    "qmoe4",
    "ov-dense8",
    "ov-native8",
    "ov-native8a8",
    "ov-native4",
)
ROUNDED_PLANS: tuple[Plan, ...] = (*QUANTIZED_PLANS, "ov-native")  # more than float32 does, on any machine
# What weights and activations are in where experts are the operator of ffn2moe.runtime.native.
NATIVE_PLANS: dict[str, tuple[native.Weights, native.Activations]] = {
    "ov-native": ("bf16", "bf16"),
    "ov-native8": ("int8", "int16"),
    "ov-native8a8": ("int8", "int8"),
    "ov-native4": ("int4", "int8"),
}
# Rest on an operator that is tested when it is opened.
OP_PLANS: tuple[str, ...] = ("fused", "qmoe8", "qmoe4", *NATIVE_PLANS)
UNMEASURED_PLAN = "sorted"  # where no benchmark has chosen: float32 and standard ops, good everywhere

MICROSOFT = "com.microsoft"
MASKED_LOGIT = -1e4  # of an expert that is not chosen: its softmax is 0 in float32, and nothing is infinite


def form_of(plan: str) -> str:
    """Which of the plans above a plan is, whatever the variant of the mixture: `sorted` of `sorted-k1`, `sorted-d0`."""
    return re.split(r"-[kd](?=\d)", plan, maxsplit=1)[0]


def engine_of(plan: str) -> Engine:
    """What runs a plan."""
    return "openvino" if plan.startswith(OV) else "onnxruntime"


def graph_of(plan: str) -> str:
    """The plan whose graph a plan runs: plans of several engines share one where it is standard ONNX."""
    form = form_of(plan)
    return plan.removeprefix(OV) if form in ("ov-dense", "ov-sorted") else plan


def precision_of(plan: str, graph: Graph) -> str:
    """What a plan of an open graph multiplies in: `float32`, `bfloat16`, `int8` or `int4` (the weights, at least)."""
    form = form_of(plan)
    if form in QUANTIZED_PLANS:
        return f"int{form[-1]}"
    return "bfloat16" if form in NATIVE_PLANS else graph.precision


def plans_of(head: str, engines: Sequence[Engine] = ("onnxruntime",)) -> tuple[Plan, ...]:
    """The plans that models with this head are given: those that decode token by token have plans for that."""
    of_head = DECODER_PLANS if decodes(head) else (*PLANS, *OPENVINO_PLANS)
    return tuple(plan for plan in of_head if engine_of(plan) in engines)


def plans_on_request(head: str) -> tuple[Plan, ...]:
    """The plans that models with this head can be given besides, if they are asked for.

    Of models that read all at once those of 4 and 8 bits a weight that pay for decoding; of language models those of
    OpenVINO, which copies the cache at every step.
    """
    if head == "causal":
        return OPENVINO_PLANS
    return () if decodes(head) else tuple(plan for plan in DECODER_PLANS if plan not in PLANS)


def decodes(head: str) -> bool:
    """Whether models with this head read token by token, with a cache."""
    return head in ("causal", "seq2seq")
