"""Choose the length that texts are cut to, where the user names none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ffn2moe.choices import HEADS
from ffn2moe.dense.families import positions
from ffn2moe.dense.sentence_folder import is_sentence_encoder

LONGEST_CAUSAL, LONGEST = 256, 128  # tokens
LONGEST_CLASSIFIED = 512  # of a text, or a pair, whose classes are wanted: what is cut off changes the answer


def usual_length(folder: str | Path, config: Any, head: str, tokenizer: Any) -> int:
    """Return the tokens that texts are cut to: as the authors of a sentence encoder do, else a usual number.

    `tokenizer` is that of `load_dense`; None for a model that reads images. Never more than the model has positions, or
    a classifier's tokenizer allows.
    """
    usual = LONGEST_CAUSAL if head == "causal" else LONGEST
    if HEADS[head].classifies and tokenizer is not None:
        usual = min(LONGEST_CLASSIFIED, getattr(tokenizer, "model_max_length", LONGEST))
    if head == "embedding" and is_sentence_encoder(folder):
        usual = int(tokenizer.model_max_length)
    longest = positions(config)
    return usual if longest is None else min(usual, longest)
