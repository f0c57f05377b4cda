"""Prepare the data of a conversion from a folder of images."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffn2moe.conversion.data import Data, held_out
from ffn2moe.data.batches import Batch
from ffn2moe.data.corpus import docstrings
from ffn2moe.preflight.texts import image_files

if TYPE_CHECKING:
    from ffn2moe.conversion.task import Task

MOST_IMAGES = 1000  # where the user names no number
BATCH = 8  # images


def image_data(task: Task) -> Data:
    """Return batches of a folder's images, with texts beside them where the model reads both."""
    files = image_files(task.corpus, task.case.request)
    random.Random(task.settings.seed).shuffle(files)
    files = files[: task.settings.texts or MOST_IMAGES]
    texts = docstrings(track=task.track) if task.dense.reads == "text and images" else []
    starts = range(0, len(files), BATCH)
    batches = [
        _batch(task.dense.reader, files[start : start + BATCH], texts, start)
        for start in task.track(starts, len(starts), "reading images")
    ]
    count = held_out(len(batches))
    learned = batches[count:] or batches
    return Data(
        calibration=learned,
        evaluation=batches[:count],
        train=lambda: _Cycle(learned, task.settings.seed),
        summary={"corpus": task.corpus, "images": len(files)},
    )


def _batch(reader: Any, files: Sequence[Path], texts: Sequence[str], start: int) -> Batch:
    from PIL import Image

    images = [Image.open(file).convert("RGB") for file in files]
    if not texts:
        return Batch(dict(reader(images=images, return_tensors="pt")), None)
    words = [texts[(start + index) % len(texts)] for index in range(len(files))]
    return Batch(dict(reader(text=words, images=images, padding=True, truncation=True, return_tensors="pt")), None)


class _Cycle:
    """Repeat the same batches, each round in another seeded order."""

    def __init__(self, batches: Sequence[Batch], seed: int) -> None:
        self._batches, self._seed = batches, seed

    def from_step(self, step: int) -> Iterator[Batch]:
        """Yield the batches from a step on."""
        count = len(self._batches)
        while True:
            round_, place = divmod(step, count)
            order = random.Random(f"{self._seed}/{round_}").sample(range(count), count)
            yield self._batches[order[place]]
            step += 1
