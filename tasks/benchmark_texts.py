"""Read the texts that judge embeddings, and write what the teacher makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import corpus
from tasks.stage import StageRun

if TYPE_CHECKING:
    from torch import Tensor

TEACHER = "teacher.safetensors"  # in data/benchmarks: what the teacher makes of every text that judges
TEXTS_AT_ONCE = 16  # that the teacher embeds


@dataclass(frozen=True)
class Benchmarks:
    """The texts that judge the models; without a data folder only those for retrieval."""

    pairs: list[dict[str, Any]]
    stsb: list[dict[str, Any]]
    classification: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]

    @classmethod
    def read(cls, folder: Path) -> Benchmarks:
        """Read data/benchmarks."""
        stsb, sets = folder / "sts" / "stsb.jsonl", folder / "classification"
        return cls(
            pairs=corpus.read_jsonl(folder / "retrieval.jsonl"),
            stsb=corpus.read_jsonl(stsb) if stsb.is_file() else [],
            classification={
                path.name: (corpus.read_jsonl(path / "train.jsonl"), corpus.read_jsonl(path / "dev.jsonl"))
                for path in (sorted(sets.iterdir()) if sets.is_dir() else ())
            },
        )

    def scores(self) -> Tensor:
        """Return people's scores of the pairs of STS-B, [N]."""
        import torch

        return torch.tensor([row["score"] for row in self.stsb])

    def texts(self) -> list[str]:
        """Return every distinct text, sorted; each model encodes it once."""
        found = {row[side] for row in self.pairs for side in ("query", "document")}
        found |= {row[side] for row in self.stsb for side in ("first", "second")}
        found |= {row["text"] for sets in self.classification.values() for part in sets for row in part}
        return sorted(found)


def embed(stage: StageRun, folder: Path, model: Any, tokenizer: Any, max_length: int) -> None:
    """Write the teacher's embeddings of the texts in `folder` (data/benchmarks) beside them, [N, D].

    The stage `prepare` does so: then runs that have a teacher in common, as those of a sweep, embed the texts once.
    """
    from safetensors.torch import save_file

    from ffn2moe.data.encode import encode
    from ffn2moe.numerics import choose_device

    embeddings_ND = encode(
        model,
        tokenizer,
        [*Benchmarks.read(folder).texts(), *corpus.general_sentences()],
        max_length=max_length,
        batch_texts=TEXTS_AT_ONCE,
        device=choose_device(stage.params.compute.device),
        track=lambda items, total, _: stage.track(items, total, "the teacher embeds the texts that judge"),
    )
    save_file({"embeddings": embeddings_ND.contiguous()}, folder / TEACHER)
