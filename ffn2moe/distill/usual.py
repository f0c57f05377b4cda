"""Say how a student is trained where the user does not: how many steps of how many tokens, and at what rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ffn2moe.metrics import flops_per_token
from ffn2moe.spec import MoESpec

if TYPE_CHECKING:
    from ffn2moe.distill.distiller import Scope

USUAL_STEPS = 700  # 6 to 8 minutes for a small encoder on two cores (docs/results/minilm.md)
# A language model learns for about this many operations, half an hour on two cores with AVX-512 and bfloat16. They are
# counted, not timed: the same model gets the same number of steps on every machine.
LANGUAGE_MODEL_WORK = 4e14
FEWEST_STEPS, MOST_STEPS = 50, 4000
USUAL_TOKENS = 4096  # of a step
FEWEST_TOKENS, MOST_TOKENS = 512, 2048  # of a step of a language model, which learns more from many small ones
TOKENS_BY_WIDTH = 2  # of a step, for each dimension of a language model
RATE_BY_WIDTH = 0.512  # divided by the model's width it is the learning rate, but at most ...
PEAK_RATE, PEAK_RATE_CAUSAL = 1e-3, 3e-3  # ... this, ...
PEAK_RATE_ALL = 3e-4  # ... or this where every weight of an encoder is trained (docs/decisions/0035)


def usual_steps(spec: MoESpec, config: object, batch_tokens: int) -> int:
    """Return the number of steps; `config` is the teacher's."""
    if spec.head != "causal":
        return USUAL_STEPS
    teacher, student = flops_per_token(spec, config, spec.max_length)
    step = batch_tokens * (teacher.total + 3 * student.total)  # backward takes two forward passes
    return max(FEWEST_STEPS, min(MOST_STEPS, int(LANGUAGE_MODEL_WORK / step)))


def usual_batch_tokens(head: str, width: int, length: int) -> int:
    """Return the tokens of a step, which holds a text of `length` tokens at least."""
    if head != "causal":
        return max(length, USUAL_TOKENS)
    return max(length, FEWEST_TOKENS, min(MOST_TOKENS, TOKENS_BY_WIDTH * width))


def usual_rate(spec: MoESpec, scope: Scope = "experts") -> float:
    """Return the highest learning rate for a training of the weights `scope`."""
    others = PEAK_RATE_ALL if scope == "all" else PEAK_RATE
    peak = PEAK_RATE_CAUSAL if spec.head == "causal" else others
    return min(peak, RATE_BY_WIDTH / max(shape.width for shape in spec.stacks))
