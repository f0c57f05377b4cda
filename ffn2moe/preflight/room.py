"""Estimate the memory and the disk that a conversion takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ffn2moe.choices import HEADS
from ffn2moe.decompose.layer_map import FEWEST_NUMBERS
from ffn2moe.decompose.memory import OVERHEAD, available_memory, estimate, resident
from ffn2moe.dense.families import positions
from ffn2moe.distill.vocabulary import tokens_at_once
from ffn2moe.judges.reading import BLOCK, logits_bytes
from ffn2moe.numerics import bf16_supported
from ffn2moe.preflight.case import Case
from ffn2moe.runtime.engines import cores

FLOAT32 = 4  # bytes
BYTES_BY_CHARACTER = 64  # of a text, its tokens, and the tokenizer's work on them (measured)
KEPT_BY_WIDTH, KEPT_BY_NEURON = 16, 3  # numbers of a token in a layer that a training step keeps
LOGITS = 8  # copies of a token's logits while a training step compares them
# The pipeline fits routers on inputs of every layer, all in memory, in a process for each core. Measured with SmolLM2
# and 65,536 tokens: 8.6 GB, and 0.9 to 1.2 GB for each process. Other tokens judge the routers; allocators keep gaps.
INPUTS_HELD, PROCESS_BYTES = 1.35, 3 * 2**28


@dataclass(frozen=True)
class Room:
    """What a conversion takes at most, in bytes; the memory is that of the whole process."""

    decomposing: int
    held: int  # then: teacher, student and what their training adds, or the graphs that are written
    kept: int  # the activations of a training step, on top
    judging: int  # three models and the logits of two, where a language model is judged by a data folder
    disk: int

    @property
    def memory(self) -> int:
        """The most memory of any step."""
        return max(self.decomposing, self.held + self.kept, self.judging)


def room_of(case: Case) -> Room:
    """Return what a conversion takes, from config and headers alone."""
    asked, spec, weights = case.request, case.spec, FLOAT32 * case.parameters
    read = case.corpus != "generated" and case.dense.reads == "text"
    texts = BYTES_BY_CHARACTER * case.characters if read else 0
    base = resident() + OVERHEAD + texts
    layers = sum(shape.num_layers * shape.width for shape in spec.stacks)
    if case.whole_only is None:
        found = estimate(
            case.dense.folder,
            spec,
            calibration_tokens=case.calibration_tokens,
            batch_tokens=asked.calibration_batch * case.max_length,
            dtype=torch.float32,
            by_need=case.widths_by_need,
        )
        decomposing, scratch = found.memory + texts, found.states
    else:
        decomposing, scratch = base + 2 * weights + FLOAT32 * case.calibration_tokens * layers, 0
    if case.model_makes_texts:
        decomposing += weights
    if asked.router_tokens and not spec.is_dense:
        inputs = int(INPUTS_HELD * FLOAT32 * asked.router_tokens)
        each = PROCESS_BYTES + inputs * max(shape.width for shape in spec.stacks)
        processes = min(cores(), spec.num_layers) if asked.router_tokens * layers >= FEWEST_NUMBERS else 0
        decomposing = max(decomposing, base + 3 * weights + inputs * layers + processes * each)
    graphs, held, kept = case.graph_bytes, 0, 0
    if graphs:
        held = base + 2 * weights + 2 * max(graphs.values())
    if case.steps != 0:  # of what is trained also gradients and the optimizer's two moments
        trained = weights if asked.scope == "all" else FLOAT32 * case.ffn_weights
        held, kept = max(held, base + 2 * weights + 3 * trained), case.batch_tokens * _kept_bytes(case) + _logits(case)
    padded = max((one.shared_width + spec.num_experts * one.expert_width) / one.ffn_width for one in spec.stacks)
    forms = asked.checkpoints + (case.container is not None)
    written = asked.stored * (forms * weights + sum(graphs.values()))
    judging = base + 3 * weights + _judged_logits(case) if asked.question_tokens and spec.head == "causal" else 0
    return Room(decomposing, held, kept, judging, int(padded * written) + scratch)


def _kept_bytes(case: Case) -> int:
    """Return the bytes that a training step keeps of a token for its gradient."""
    spec, kept = case.spec, 0
    for shape in spec.stacks:
        neurons = (shape.shared_width + spec.num_active * shape.expert_width) * (2 if shape.gated else 1)
        kept += shape.num_layers * (KEPT_BY_WIDTH * shape.width + KEPT_BY_NEURON * neurons)
    return kept * (FLOAT32 // 2 if bf16_supported(case.device) else FLOAT32)


def _judged_logits(case: Case) -> int:
    """Return the bytes of the logits of a block of text for the models that are compared."""
    config = case.dense.config
    longest = positions(config)
    length = BLOCK if longest is None else min(BLOCK, longest)
    return logits_bytes(config.get_text_config(decoder=True).vocab_size, length, 3)


def _logits(case: Case) -> int:
    """Return the bytes of the logits that a training step compares at once: those of a language model in parts."""
    head = case.spec.head
    if not HEADS[head].generates:
        return 0
    vocabulary = case.dense.config.get_text_config(decoder=True).vocab_size
    tokens = min(case.batch_tokens, tokens_at_once(vocabulary)) if head == "causal" else case.batch_tokens
    return LOGITS * FLOAT32 * tokens * vocabulary


def all_memory() -> int | None:
    """Return memory and swap of this machine, in bytes; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return found["MemTotal"] + found["SwapTotal"]


def both_fit(parameters: int) -> bool:
    """Return whether teacher and student fit in memory together; True where the system does not tell."""
    available = available_memory()
    return available is None or 2 * FLOAT32 * parameters < available
