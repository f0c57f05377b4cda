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


def make_stage(name: str, root: Path, *overrides: str) -> StageRun:
    """A stage in `root`, with the committed parameters and overrides."""
    return StageRun(name, load_params(PARAMS, overrides), root)
