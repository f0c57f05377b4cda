"""The table of plans: every way to execute an export. A plan's graph is the canonical graph, rewritten step by step.

The canonical graph holds one `ffn2moe.Mixture` node a layer (`ffn2moe.onnx.graph`). `dense` and its relatives start
from the teacher's graph instead, which has no such node. Adding a plan is adding a row here, or a file to this folder:
docs/extend/plan.md.

A variant of a mixture has plans of its own, named after these rows: `sorted-k1` runs one expert a token, `sorted-d0-2`
keeps layers 0 to 2 dense (`ffn2moe.moe.variants`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from ffn2moe.choices import HEADS
from ffn2moe.runtime.engines import ENGINES, EngineMissing
from ffn2moe.runtime.files import read_plan
from ffn2moe.table import Table

# A function, or "module:function": the second is imported when it is first needed, so that the runtime loads neither
# torch nor onnx_ir.
Reference = str | Callable[..., Any]

READS_AT_ONCE = tuple(head.name for head in HEADS.rows() if not head.generates)  # heads without a cache
DECODES = tuple(head.name for head in HEADS.rows() if head.generates)  # heads that read token by token, with a cache
# The default before a benchmark, float32 and standard ops, good everywhere: of a mixture, of a student without experts.
UNMEASURED_PLANS = ("sorted", "student")


@dataclass(frozen=True)
class Operator:
    """An operator outside standard ONNX, tested on this machine before a plan that needs it is opened."""

    name: str  # domain.type
    self_test: Reference  # (plan, activation, gated, providers) -> largest difference; raises RuntimeError
    library: Reference | None = None  # () -> the file to load it from; raises FileNotFoundError where it is not built


@dataclass(frozen=True)
class Plan:
    """One way to execute an export.

    `bits` are those of the weights of linear maps, 16 means bfloat16, 32 means what the engine computes in.
    `activations` names what tokens are rounded to before those maps, None where they are not.
    """

    name: str
    summary: str  # one line, for docs
    engine: str  # a row of `ffn2moe.runtime.engines.ENGINES`
    heads: tuple[str, ...]  # models with these heads get the plan by default
    on_request: tuple[str, ...] = ()  # models with these heads get it when it is asked for
    bits: int = 32
    activations: str | None = None  # "bf16", "int16" or "int8"
    dense: bool = False  # computes the teacher
    without_experts: bool = False  # computes a student that has no experts; no other plan of a student does
    operator: Operator | None = None
    steps: tuple[Reference, ...] = ()  # (graph, plan) -> None: rewrite the canonical graph in place, in this order
    same_graph_as: str | None = None  # runs the file of another plan, in its own engine
    calibrated: bool = False  # rounds activations in ranges that are measured on calibration texts
    exact: bool = True  # its float arithmetic is PyTorch's; not so where an operator has another form of GELU
    raced: bool = True  # timed by default on the CPU
    portable: bool = False  # of standard ONNX ops alone: any ONNX runtime opens its graph

    @property
    def is_quantised(self) -> bool:
        """Whether weights have fewer bits than a float: its quality is measured, not proven."""
        return self.bits < 16

    @property
    def is_rounded(self) -> bool:
        """Whether it rounds more than float32 does, on any machine."""
        return self.bits < 32


PLANS: Table[Plan] = Table("plan", __name__)  # the rows below, and a `ROW` for each further file of this folder


def register_plan(plan: Plan) -> Plan:
    """Add a plan to the table, or replace the one of its name; return it."""
    return PLANS.register(plan.name, plan)


# --- what rows are made of ------------------------------------------------------------------------------------------

MOE = Operator("com.microsoft.MoE", "ffn2moe.runtime.microsoft:check_plan")
QMOE = Operator("com.microsoft.QMoE", "ffn2moe.runtime.microsoft:check_plan")
EXPERTS = Operator(
    "ffn2moe.RoutedExperts", "ffn2moe.runtime.native.selftest:check_plan", "ffn2moe.runtime.native:library"
)

SORTED = "ffn2moe.onnx.sorted:sort_tokens"
MOE_NODES = "ffn2moe.onnx.microsoft:use_moe"
QMOE_NODES = "ffn2moe.onnx.microsoft:use_qmoe"
ROUTED_NODES = "ffn2moe.onnx.routed:use_routed_experts"
DYNAMIC_INT8 = "ffn2moe.onnx.quantise:quantise_dynamically"
STATIC_INT8 = "ffn2moe.onnx.static:quantise_statically"
BLOCKS = "ffn2moe.onnx.quantise:quantise_in_blocks"
INT8_WEIGHTS = "ffn2moe.onnx.quantise:compress_weights"
HALF_TABLES = "ffn2moe.onnx.quantise:halve_large_matrices"

_EVERY = (*READS_AT_ONCE, *DECODES)


def _in_openvino(name: str, summary: str, *, on_request: tuple[str, ...] = ("causal",), **how: Any) -> Plan:
    return Plan(name, summary, "openvino", READS_AT_ONCE, on_request, **how)


def _native(name: str, bits: int, activations: str, summary: str) -> Plan:
    steps = (ROUTED_NODES, HALF_TABLES)
    return _in_openvino(name, summary, bits=bits, activations=activations, operator=EXPERTS, steps=steps)


def _in_blocks(name: str, summary: str, engine: str = "onnxruntime", **how: Any) -> Plan:
    """Return a plan of few bits for decoding: its weights are in blocks, its kernels quantise the activations."""
    if engine == "openvino":
        return Plan(name, summary, engine, ("causal",), activations="int8", **how)
    return Plan(name, summary, engine, DECODES, on_request=READS_AT_ONCE, activations="int8", **how)


# --- the rows -------------------------------------------------------------------------------------------------------

for _plan in (
    Plan(
        "dense",
        "the teacher: what a user would deploy without this package",
        "onnxruntime",
        _EVERY,
        dense=True,
        portable=True,
    ),
    Plan(
        "dense8",
        "`dense` with its linear maps in int8, quantised as they run",
        "onnxruntime",
        _EVERY,
        bits=8,
        activations="int8",
        dense=True,
        portable=True,
        steps=(DYNAMIC_INT8, HALF_TABLES),
    ),
    _in_blocks(
        "dense4",
        "`dense` with every linear map a `MatMulNBits` of 4 bits",
        bits=4,
        dense=True,
        steps=(BLOCKS, HALF_TABLES),
    ),
    _in_blocks(
        "dense8b",
        "`dense` with every linear map a `MatMulNBits` of 8 bits",
        bits=8,
        dense=True,
        steps=(BLOCKS, HALF_TABLES),
    ),
    Plan(
        "fused",
        "one `com.microsoft.MoE` node a layer; on a CPU it is never the fastest, so it is timed only by name there",
        "onnxruntime",
        _EVERY,
        operator=MOE,
        steps=(MOE_NODES,),
        exact=False,
        raced=False,
    ),
    _in_blocks(
        "qmoe8",
        "one `com.microsoft.QMoE` node a layer, other linear maps are `MatMulNBits`: 8 bits a weight",
        bits=8,
        operator=QMOE,
        steps=(QMOE_NODES, BLOCKS),
    ),
    _in_blocks("qmoe4", "the same with 4 bits a weight", bits=4, operator=QMOE, steps=(QMOE_NODES, BLOCKS)),
    Plan(
        "sorted",
        "standard ops only: tokens sorted by expert, and each expert a `Gemm`, an activation and a `Gemm`",
        "onnxruntime",
        _EVERY,
        portable=True,
        steps=(SORTED,),
    ),
    Plan(
        "sorted8",
        "`sorted` with its linear maps in int8, quantised as they run",
        "onnxruntime",
        _EVERY,
        bits=8,
        activations="int8",
        portable=True,
        steps=(SORTED, DYNAMIC_INT8, HALF_TABLES),
    ),
    # OpenVINO computes in bfloat16 where the CPU multiplies it, else in float32.
    _in_openvino("ov-dense", "the graph of `dense` in OpenVINO", dense=True, same_graph_as="dense"),
    _in_openvino(
        "ov-dense8",
        "`dense` with weights of 8 bits in OpenVINO, multiplied in what `ov-dense` multiplies in",
        bits=8,
        dense=True,
        steps=(INT8_WEIGHTS, HALF_TABLES),
    ),
    _in_openvino(
        "ov-dense8s",
        "`dense` in static int8 in OpenVINO: weights of 7 bits, activations of 8, their ranges from calibration texts",
        on_request=(),
        bits=8,
        activations="int8",
        dense=True,
        calibrated=True,
        steps=(STATIC_INT8, HALF_TABLES),
    ),
    # With weights in blocks OpenVINO computes in float32, and its kernels quantise the activations.
    _in_blocks(
        *("ov-dense4", "the graph of `dense4` in OpenVINO", "openvino"), bits=4, dense=True, same_graph_as="dense4"
    ),
    _in_blocks(
        *("ov-dense8b", "the graph of `dense8b` in OpenVINO", "openvino"), bits=8, dense=True, same_graph_as="dense8b"
    ),
    _in_openvino("ov-sorted", "the graph of `sorted` in OpenVINO", same_graph_as="sorted"),
    _native(
        *("ov-native", 16, "bf16"),
        "one `ffn2moe.RoutedExperts` node a layer in OpenVINO (make native builds it): bfloat16",
    ),
    _native("ov-native8", 8, "int16", "the same with experts of 8 bits a weight and activations of 16"),
    _native(
        *("ov-native8a8", 8, "int8"),
        "the same with experts of 8 bits a weight and activations of 8, one scale a token",
    ),
    _native(
        *("ov-native4", 4, "int8"),
        "the same with experts of 4 bits a weight and activations of 8, one scale a token",
    ),
    _in_openvino(
        "ov-native4s",
        "`ov-native4` with every other linear map in static int8, as `ov-dense8s` has them",
        on_request=(),
        bits=4,
        activations="int8",
        calibrated=True,
        operator=EXPERTS,
        steps=(ROUTED_NODES, STATIC_INT8, HALF_TABLES),
    ),
    _in_openvino(
        "ov-native8s",
        "`ov-native8a8` with every other linear map in static int8, as `ov-dense8s` has them",
        on_request=(),
        bits=8,
        activations="int8",
        calibrated=True,
        operator=EXPERTS,
        steps=(ROUTED_NODES, STATIC_INT8, HALF_TABLES),
    ),
    _in_blocks(
        "ov-native8b",
        "`ov-native8a8` with every other linear map a `MatMulNBits` of 8 bits: for decoding",
        "openvino",
        bits=8,
        operator=EXPERTS,
        steps=(ROUTED_NODES, BLOCKS, HALF_TABLES),
    ),
    _in_blocks(
        "ov-native4b",
        "`ov-native4` with every other linear map a `MatMulNBits`, of 4 bits: for decoding",
        "openvino",
        bits=4,
        operator=EXPERTS,
        steps=(ROUTED_NODES, BLOCKS, HALF_TABLES),
    ),
):
    register_plan(_plan)


def _of_student(plan: Plan) -> Plan:
    """Return the plan that computes a student without experts as a dense plan computes the teacher."""
    same = plan.same_graph_as
    return replace(
        plan,
        name=plan.name.replace("dense", "student"),
        summary=f"a student without experts, as `{plan.name}` runs the teacher",
        dense=False,
        without_experts=True,
        same_graph_as=same and same.replace("dense", "student"),
    )


for _plan in PLANS.rows():
    if _plan.dense:
        register_plan(_of_student(_plan))


# --- looking up -----------------------------------------------------------------------------------------------------


def form_of(name: str) -> str:
    """Return the row's name of a plan, whatever its variant: `sorted` for `sorted-k1` and `sorted-d0-2`."""
    return name if name in PLANS else re.split(r"-[kd](?=\d)", name, maxsplit=1)[0]


def plan_of(name: str) -> Plan:
    """Return the row of a plan, whatever its variant. UnknownName, a ValueError, where there is none."""
    return PLANS[form_of(name)]


def is_dense(name: str) -> bool:
    """Return whether a plan computes the teacher, in any engine and precision."""
    return plan_of(name).dense


def graph_of(name: str) -> str:
    """Return the plan whose file a plan runs: plans of several engines share a graph of standard ops."""
    form = form_of(name)
    return (PLANS[form].same_graph_as or form) + name.removeprefix(form)


def precision_of(name: str, computes_in: str) -> str:
    """Return what a plan multiplies in: `float32`, `bfloat16`, `int8` or `int4` (the weights, at least).

    `computes_in` is the precision of its open graph.
    """
    plan = plan_of(name)
    if plan.is_quantised:
        return f"int{plan.bits}"
    return "bfloat16" if plan.bits == 16 else computes_in


def plans_of(head: str, engines: Sequence[str] = ("onnxruntime",), *, without_experts: bool = False) -> tuple[str, ...]:
    """Return the plans that models with this head get by default in these engines; a student may have no experts."""
    return tuple(
        name
        for name, plan in PLANS.items()
        if head in plan.heads and plan.engine in engines and _fits(plan, without_experts)
    )


def plans_on_request(head: str, *, without_experts: bool = False) -> tuple[str, ...]:
    """Return the plans that models with this head get only when they are asked for.

    Plans of few bits pay for decoding, those of more bits for batches of texts.
    """
    return tuple(name for name, plan in PLANS.items() if head in plan.on_request and _fits(plan, without_experts))


def _fits(plan: Plan, without_experts: bool) -> bool:
    """Return whether a plan computes the teacher of every student, or this kind of student."""
    return plan.dense or plan.without_experts == without_experts


_BY_VALUES = "ForSequenceClassification"  # the end of the class names of encoder-decoders that look at the values


def obstacle(plan: Plan, head: str, config: Any) -> str | None:
    """Return why a plan cannot be made here for a model with this head and config; None where it can be tried."""
    if head not in (*plan.heads, *plan.on_request):
        return f"this plan is for the heads {', '.join((*plan.heads, *plan.on_request))}, not for {head}"
    named = getattr(config, "architectures", None) or ()
    if getattr(config, "is_encoder_decoder", False) and any(name.endswith(_BY_VALUES) for name in named):
        return (
            f"a {config.model_type} classifier counts the end-of-text tokens of every batch to find the one it reads, "
            "which no graph can hold"
        )
    try:
        ENGINES[plan.engine].require()
    except EngineMissing as error:
        return str(error)
    lacking = ENGINES[plan.engine].lacks(config)
    if lacking is not None:
        return lacking
    if plan.operator is not None and plan.operator.library is not None:
        try:
            resolve(plan.operator.library)()
        except FileNotFoundError as error:  # a graph that cannot be checked is not shipped
            return str(error)
    return None


def decodes(head: str) -> bool:
    """Return whether models with this head read token by token, with a cache."""
    return head in DECODES


def resolve(reference: Reference) -> Callable[..., Any]:
    """Return the function behind a reference, importing its module if it is named as "module:function"."""
    if callable(reference):
        return reference
    module, _, name = reference.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


def library_of(plan: Plan) -> Path | None:
    """Return the library of operators to open a plan's graphs with; None where there is none to use.

    A plan with an operator needs it: FileNotFoundError where it is not built. Other graphs of OpenVINO take their
    attention from it, where it is built.
    """
    if plan.operator is not None and plan.operator.library is not None:
        return Path(resolve(plan.operator.library)())
    if plan.engine != "openvino" or EXPERTS.library is None:
        return None
    try:
        return Path(resolve(EXPERTS.library)())
    except FileNotFoundError:
        return None


def default_plan(path: Path, plans: Mapping[str, Any]) -> str:
    """Return the plan that the benchmark chose; where none has run, the student's plan of standard ops."""
    if not plans:
        raise ValueError(
            f"{path} has no ONNX graphs: make it without --no-onnx, or open {path / 'checkpoint'} with ffn2moe.load"
        )
    chosen = read_plan(path)
    if chosen:
        return str(chosen["default_plan"])
    return next((plan for plan in UNMEASURED_PLANS if plan in plans), min(plans))
