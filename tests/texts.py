"""Made-up texts in the words of the tiny tokenizer: a first line, and a rest that shares words with it."""

from __future__ import annotations

import random
from pathlib import Path

from tasks.params import load_params
from tasks.stage import StageRun
from tests.conftest import WORDS

PARAMS = Path(__file__).parent.parent / "params.yaml"


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Distinct texts like docstrings, each with a summary line and a rest."""
    generator = random.Random(seed)
    texts = []
    for _ in range(count):
        topic = generator.sample(WORDS, 6)
        rest = generator.choices(topic, k=8) + generator.choices(WORDS, k=8)
        texts.append(f"{' '.join(topic)}.\n\n{' '.join(rest)}.")
    return texts


def write_corpus(path: Path, texts: list[str]) -> Path:
    from tasks.corpus import write_jsonl

    write_jsonl(path, ({"text": text} for text in texts))
    return path


# More than one expert a token: what the stages are tested with, whatever the committed numbers are.
TWO_OF_EIGHT = ("decompose.num_experts=8", "decompose.num_active=2")


def make_stage(name: str, root: Path, *overrides: str) -> StageRun:
    """A stage in `root`, with the committed parameters, two experts of eight, and overrides."""
    return StageRun(name, load_params(PARAMS, [*TWO_OF_EIGHT, *overrides]), root)
