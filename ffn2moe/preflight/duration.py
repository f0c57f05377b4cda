"""Estimate how long a conversion takes on this machine: its work by the speed of a matrix product, measured now."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from ffn2moe import progress
from ffn2moe.data.corpus import INSTALLED
from ffn2moe.decompose.gradients import FISHER_TOKENS
from ffn2moe.decompose.width_costs import COST_TOKENS
from ffn2moe.decompose.widths import experts_are_chosen
from ffn2moe.dense.families import positions
from ffn2moe.numerics import WIDEST_MOMENTS, bf16_supported
from ffn2moe.planning.measure import RUNGS
from ffn2moe.preflight.case import Case
from ffn2moe.preflight.texts import image_files
from ffn2moe.runtime.engines import cores
from ffn2moe.runtime.plans import precision_of
from ffn2moe.runtime.workload import usual_shapes

PROBE_SECONDS, PROBE_TOKENS = 0.1, 256  # of each precision
# Shares of the product's speed that whole steps reach, and seconds that no product explains: measured in conversions
# with one thread (docs/results/check.md).
WRITING, DECOMPOSING, JUDGING, TRAINING, RACING = 0.5, 1.0, 0.6, 0.5, 0.5
DOCSTRING_SECONDS = 60  # of one core, to parse the sources of the packages
TOKENISE_SECONDS = 1e-6  # of one core, a character
IMAGE_SECONDS = 0.05  # an image, read and resized
GRAPH_SECONDS, GRAPH_BYTES = 1.5, 2**26  # a plan: traced, lowered, written and compared; bytes a second on top
# At most, of a language model: that `convert` judges, that the pipeline judges, and its plans.
JUDGED_TOKENS, PIPELINE_TOKENS, PLAN_TOKENS = 2**13, 2**15, 2**14
ONE_TOKEN = 8  # tokens that take as long as one alone: both wait for the weights
ROUTER_TOKENS = 200 * 1024  # that a layer's router is fitted on
FINALISTS = 3  # plans that are raced to the end
PASSES = 8  # over a layer's experts, on the calibration tokens
ROUTING_PASSES = 16  # over a layer's FFN, on the tokens of the pipeline's routers, where each expert stays what it is


def duration(case: Case) -> Iterator[str]:
    """Say how long each step takes."""
    steps = {name: seconds for name, seconds in estimated(case).items() if seconds > 0}
    parts = ", ".join(f"{name} {progress.clock(seconds)}" for name, seconds in steps.items())
    yield f"about {progress.clock(sum(steps.values()))} ({parts}): estimated, for this machine with nothing else to do"


def estimated(case: Case) -> dict[str, float]:
    """Return the seconds of each step, by its name."""
    shape = max(case.spec.stacks, key=lambda one: one.ffn_width)
    exact, rounded = speed(shape.width, shape.ffn_width, case.device)
    train, both = case.training_minutes * 60, case.multiplied + case.multiplied_by_student
    if case.steps is not None:
        per_token = 2 * (case.multiplied + 3 * case.multiplied_by_student)
        train = case.steps * case.batch_tokens * per_token / (TRAINING * rounded)
    judged = 2 * _judged_tokens(case) * both if train else 0
    if case.dense.head == "causal":  # by questions, each by teacher, training-free mixture and student
        judged += case.request.question_tokens * (both + case.multiplied_by_student)
    decomposing, routing = _layers(case, exact, rounded)
    return {
        "texts": _texts(case, exact, rounded),
        "decomposing": decomposing,
        "routing": routing,
        "distilling": train,
        "judging": 2 * judged / (JUDGING * exact),
        "graphs": sum(GRAPH_SECONDS + size / GRAPH_BYTES for size in case.graph_bytes.values())
        + _judging_plans(case, exact),
        "racing plans": _racing(case, exact),
    }


def _judged_tokens(case: Case) -> int:
    most = case.request.judged_texts * case.max_length
    if case.dense.head != "causal":
        return most
    return min(most, PIPELINE_TOKENS if case.request.rounds else JUDGED_TOKENS)


def _judging_plans(case: Case, exact: float) -> float:
    """Return the seconds in which the plans that round are judged again: the pipeline does that, and then races them.

    Their bytes make up for what a product of this size does not tell.
    """
    if not case.request.rounds:
        return 0
    rounding = [name for name in _made(case) if precision_of(name, "float32") != "float32"]
    tokens = min(_judged_tokens(case), PLAN_TOKENS) if case.dense.head == "causal" else _judged_tokens(case)
    return len(rounding) * 2 * tokens * case.multiplied / exact


def _made(case: Case) -> list[str]:
    return [name for name, reason in case.plans.items() if reason is None]


def _racing(case: Case, exact: float) -> float:
    """Return the seconds in which plans are timed in turn, with one thread.

    Most plans are hopeless after a few rounds (`ffn2moe.planning.measure`); half of the rounds decide among a few.
    """
    asked, head = case.request, case.dense.head
    shapes = asked.timed
    if shapes is None:
        longest = positions(case.dense.config) if head == "causal" else case.max_length
        shapes = usual_shapes(head, longest, asked.decode_tokens)
    decoded = asked.decode_tokens if head == "causal" else 0
    tokens = sum(batch * length + max(batch, ONE_TOKEN) * decoded for batch, length in shapes)
    batches = min(asked.rounds, RUNGS[0]) * len(_made(case)) + FINALISTS * asked.rounds / 2
    threads = torch.get_num_threads() if case.device == "cpu" else 1
    return batches * tokens * 2 * case.multiplied * threads / (RACING * exact)


def _texts(case: Case, exact: float, rounded: float) -> float:
    """Return the seconds in which texts are read, tokenised, or written by the model."""
    if "images" in case.dense.reads:
        return IMAGE_SECONDS * len(image_files(case.corpus, case.request))
    each = case.max_length * 2 * case.multiplied / WRITING  # operations, of a text that the model writes
    if case.corpus == "generated":
        most, fewest = case.most_texts * each / rounded, case.fewest_texts * each / rounded
        return most if case.writing_seconds is None else max(fewest, min(most, case.writing_seconds))
    if case.model_makes_texts:
        return case.most_texts * each / exact
    parsing = DOCSTRING_SECONDS if case.corpus in INSTALLED else 0
    return (parsing + TOKENISE_SECONDS * case.characters) / min(cores(), 8)


def _layers(case: Case, exact: float, rounded: float) -> tuple[float, float]:
    """Return the seconds in which all layers are decomposed, and those in which the pipeline fits routers afterwards.

    The pipeline fills experts for clusters of tokens when it fits their routers.
    """
    tokens = case.request.router_tokens
    if not tokens or case.spec.is_dense:
        return _decompose(case, case.calibration_tokens, exact, rounded), 0
    if experts_are_chosen(case.spec):
        return 2 * case.calibration_tokens * case.multiplied / exact, _decompose(case, tokens, exact, rounded)
    ffns = sum(one.num_layers * (3 if one.gated else 2) * one.width * one.ffn_width for one in case.spec.stacks)
    routing = 2 * tokens * (case.multiplied + ROUTING_PASSES * ffns) / exact
    return _decompose(case, case.calibration_tokens, exact, rounded), routing


def _decompose(case: Case, tokens: int, exact: float, rounded: float) -> float:
    """Return the seconds in which all layers are decomposed and routed; none where the student's are the teacher's."""
    if case.spec.is_dense and not any(shape.teacher_ffn_width for shape in case.spec.stacks):
        return 0
    seconds = 2 * tokens * case.multiplied / exact
    for shape in case.spec.stacks:
        wide, D, F = shape.ffn_width > WIDEST_MOMENTS, shape.width, shape.ffn_width
        ffn = (3 if shape.gated else 2) * D * F
        # Moments of the neurons and of what the experts give; their eigenvectors, or a factor alone; in float64.
        moments = (4 if wide else 6) * tokens * F**2
        solving = F**3 + 4 * F**2 * D if wide else 10 * F**3
        router = 6 * ROUTER_TOKENS * D * case.spec.num_experts
        judging = 2 * PASSES * tokens * ffn / (rounded if wide else exact)
        seconds += shape.num_layers * ((moments + solving + router) / exact + judging)
    if case.weighs_neurons:
        seconds += 3 * 2 * min(tokens, FISHER_TOKENS) * case.multiplied / exact
    return (seconds + (_widths(case) / exact if case.widths_by_need else 0)) / DECOMPOSING


def _widths(case: Case) -> float:
    """Return the operations in which each layer's width is found: moments and an elimination."""
    tokens, work = min(case.calibration_tokens, COST_TOKENS), 0
    for shape in case.spec.stacks:
        D, F = shape.width, shape.dense_ffn_width
        neurons = 2 * 2 * tokens * D * F
        wide = F > WIDEST_MOMENTS
        work += shape.num_layers * (neurons if wide else neurons + 2 * tokens * F**2 + 8 * F**3)
    return work


@cache
def speed(width: int, ffn_width: int, device: str) -> tuple[float, float]:
    """Return the speed of products of this size, in operations a second: in float32, and in what training uses."""
    exact = _probe(width, ffn_width, device, torch.float32)
    return exact, _probe(width, ffn_width, device, torch.bfloat16) if bf16_supported(device) else exact


def _probe(width: int, ffn_width: int, device: str, dtype: torch.dtype) -> float:
    x_TD = torch.ones(PROBE_TOKENS, width, device=device, dtype=dtype)
    w_DF = torch.ones(width, ffn_width, device=device, dtype=dtype)
    operations = 2 * PROBE_TOKENS * width * ffn_width
    if torch.device(device).type != "cpu":
        return operations * _products_a_second(x_TD, w_DF, time.perf_counter)
    # On a CPU one thread's own time counts. What else runs now may have ended when the work begins, and several threads
    # that wait for each other use time, too.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return operations * threads * _products_a_second(x_TD, w_DF, time.process_time)
    finally:
        torch.set_num_threads(threads)


def _products_a_second(x_TD: Tensor, w_DF: Tensor, clock: Callable[[], float]) -> float:
    x_TD @ w_DF  # the first product is slower
    done, start = 0, clock()
    while (seconds := clock() - start) < PROBE_SECONDS or not done:
        float((x_TD @ w_DF)[0, 0])  # waits for the device
        done += 1
    return done / seconds
