"""Estimate the memory and the disk that a conversion takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ffn2moe.choices import HEADS
from ffn2moe.decompose.memory import OVERHEAD, available_memory, estimate, resident
from ffn2moe.preflight.case import Case

FLOAT32 = 4  # bytes
BYTES_BY_CHARACTER = 64  # of a text, its tokens, and the tokenizer's work on them (measured)
KEPT_BY_WIDTH, KEPT_BY_NEURON = 16, 3  # numbers of a token in a layer that a training step keeps
LOGITS = 4  # copies of a token's logits in a training step


@dataclass(frozen=True)
class Room:
    """What a conversion takes at most, in bytes; the memory is that of the whole process."""

    decomposing: int
    training: int  # and writing graphs: teacher and student together
    disk: int

    @property
    def memory(self) -> int:
        """The most memory of any step."""
        return max(self.decomposing, self.training)


def room_of(case: Case) -> Room:
    """Return what a conversion takes, from config and headers alone."""
    asked, spec, weights = case.request, case.spec, FLOAT32 * case.parameters
    texts = 0 if case.corpus == "generated" or "images" in case.dense.reads else BYTES_BY_CHARACTER * case.characters
    base = resident() + OVERHEAD + texts
    layers = sum(shape.num_layers * shape.width for shape in spec.stacks)
    if case.whole_only is None:
        found = estimate(
            case.dense.folder,
            spec,
            calibration_tokens=asked.calibration_tokens,
            batch_tokens=asked.calibration_batch * case.max_length,
            dtype=torch.float32,
        )
        decomposing, scratch = found.memory + texts, found.states
    else:
        decomposing, scratch = base + 2 * weights + FLOAT32 * asked.calibration_tokens * layers, 0
    graphs = case.graph_bytes
    training = 0
    if asked.steps != 0:  # both models; of what is trained also gradients and the optimizer's two moments
        training = base + 5 * weights + FLOAT32 * case.batch_tokens * _kept(case)
    elif graphs:
        training = base + 2 * weights
    training = max(training, base + 2 * weights + 2 * max(graphs.values(), default=0) if graphs else 0)
    padded = max((one.shared_width + spec.num_experts * one.expert_width) / one.ffn_width for one in spec.stacks)
    forms = asked.checkpoints + (case.container is not None)
    written = asked.stored * (forms * weights + sum(graphs.values()))
    return Room(decomposing, training, int(padded * written) + scratch)


def _kept(case: Case) -> int:
    """Return the numbers that a training step keeps of a token for its gradient."""
    spec, kept = case.spec, 0
    if HEADS[spec.head].generates:
        kept += LOGITS * case.dense.config.get_text_config(decoder=True).vocab_size
    for shape in spec.stacks:
        neurons = (shape.shared_width + spec.num_active * shape.expert_width) * (2 if shape.gated else 1)
        kept += shape.num_layers * (KEPT_BY_WIDTH * shape.width + KEPT_BY_NEURON * neurons)
    return kept


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
