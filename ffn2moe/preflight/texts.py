"""Look at the beginning of a corpus: whether it can be read, and about how many texts it holds."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from ffn2moe.data.corpus import INSTALLED, PACKAGES, read_corpus
from ffn2moe.data.pairs import read_pairs
from ffn2moe.preflight.request import Request

FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SAMPLED_BYTES = 4 * 2**20
DOCSTRINGS = 40000  # texts, about, of the packages that are read


@dataclass(frozen=True)
class Sample:
    """The first texts of a corpus; `texts` is empty where nothing was read."""

    texts: list[str]
    count: int | None  # distinct texts of the whole corpus; None: not known yet
    whole: bool  # whether every text was read, so that the count is exact

    @property
    def number(self) -> str:
        """The number of texts in words."""
        if self.count is None:
            return "texts that are counted when they are read"
        return f"{self.count} texts" if self.whole else f"about {self.count} texts"


def sample(corpus: str, asked: Request) -> Sample:
    """Return the first texts of a corpus. FileNotFoundError or ValueError for one that cannot be used."""
    if corpus == "generated":
        return Sample([], None, False)
    if corpus in INSTALLED:
        missing = missing_packages()
        if missing:
            raise ValueError(
                f"{asked.call('corpus', corpus)} reads packages of which {', '.join(missing)} are not installed: "
                f"pip install {' '.join(PACKAGES[name] for name in missing)}, or name a file of texts"
            )
        return Sample([], DOCSTRINGS, False)
    if corpus.startswith("datasets:"):
        if importlib.util.find_spec("datasets") is None:
            raise ValueError(
                f"{asked.call('corpus', corpus)} needs datasets, which is not installed: pip install datasets"
            )
        return Sample([], None, False)
    return _of_file(corpus, asked)


def missing_packages() -> list[str]:
    """Return the packages that the corpora of docstrings read and that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def _of_file(corpus: str, asked: Request) -> Sample:
    if Path(corpus).is_dir():
        raise ValueError(
            f"{asked.call('corpus', corpus)} is a folder, and this model reads texts: name a .txt, .jsonl, .csv or "
            ".tsv file"
        )
    if "," in asked.text_column:
        texts = list(dict.fromkeys(map("\n".join, read_pairs(corpus, asked.text_column, SAMPLED_BYTES))))
    else:
        texts = list(dict.fromkeys(read_corpus(corpus, asked.text_column, most=SAMPLED_BYTES)))
    size = Path(corpus).stat().st_size
    whole = size <= SAMPLED_BYTES
    if whole and len(texts) < asked.fewest_texts:
        one = "1 distinct text" if len(texts) == 1 else f"{len(texts)} distinct texts"
        raise ValueError(
            f"{asked.call('corpus', corpus)} holds {one}, and at least {asked.fewest_texts} are needed, to learn from "
            "and to judge by: give more"
        )
    return Sample(texts, len(texts) if whole else round(len(texts) * size / SAMPLED_BYTES), whole)


def image_files(folder: str, asked: Request) -> list[Path]:
    """Return the images of a folder. ValueError where they are fewer than two."""
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in FORMATS)
    if len(files) < 2:
        raise ValueError(
            f"{folder} holds {len(files)} images ({', '.join(FORMATS)}): give at least two, one to learn from and one "
            f"to judge by ({asked.call('corpus')})"
        )
    return files
