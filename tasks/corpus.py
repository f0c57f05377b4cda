"""Read folders of labelled sets, and split texts into train, calibration and evaluation.

A split depends on the content of the texts alone (sha256), so the same texts are split in the same way everywhere. No
text is in two splits, even after whitespace and letter case are normalised. No text that judges a model (a dev
sentence, a query or a document of the retrieval benchmark) is among those that it learns from.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ffn2moe.data.corpus import INSTALLED as INSTALLED
from ffn2moe.data.corpus import PACKAGES as PACKAGES
from ffn2moe.data.corpus import clean, read_documents, read_jsonl_column, read_lines, read_table
from ffn2moe.data.corpus import docstrings as docstrings
from ffn2moe.data.corpus import read_corpus as read_corpus

SHORTEST_QUERY, SHORTEST_DOCUMENT = 3, 10  # words
DOCUMENT_KEY = 400  # characters: every encoder reads them, so two documents that agree there are one text
FEWEST_OWN_PAIRS = 100  # a corpus with fewer pairs cannot be its own retrieval benchmark
LARGEST_PAIR_SHARE = 0.25  # of a corpus, held out for its own retrieval benchmark
FEWEST_TRAIN_TEXTS = 32
AG_NEWS_DEV_SHARE = 0.25
MOST_WRITTEN_TOKENS = 2**19  # that a language model writes: as many as it usually learns from
MOST_CLASSIFIER_TEXTS = 1000  # to fit a classifier on: enough for a stable accuracy, quick to embed


@dataclass(frozen=True)
class Pair:
    """One query of the retrieval benchmark, and its one right answer."""

    query: str
    document: str


@dataclass(frozen=True)
class LabelledText:
    label: str
    text: str


@dataclass(frozen=True)
class ScoredPair:
    """Two sentences and how similar people rate them (STS-B: 0 to 5)."""

    score: float
    first: str
    second: str


@dataclass(frozen=True)
class LabelledFolder:
    """The content of a data folder: texts to learn from, and sets to judge by."""

    texts: list[str]
    sources: dict[str, str] = field(default_factory=dict)  # text -> the set that it comes from
    stsb: list[ScoredPair] = field(default_factory=list)
    classification: dict[str, tuple[list[LabelledText], list[LabelledText]]] = field(default_factory=dict)
    held_out: list[str] = field(default_factory=list)  # texts that judge a language model

    def judged(self) -> list[str]:
        """Return every text of a dev set, which must not be learnt from."""
        sentences = [side for pair in self.stsb for side in (pair.first, pair.second)]
        return [*sentences, *(row.text for _, dev in self.classification.values() for row in dev), *self.held_out]


@dataclass(frozen=True)
class Splits:
    train: list[str]
    calibration: list[str]
    evaluation: list[str]
    pairs: list[Pair]


def texts_to_write(most: int, length: int) -> int:
    """Return how many texts of `length` tokens a language model writes, where at most so many are wanted."""
    return min(most, max(1, MOST_WRITTEN_TOKENS // length))


# --- identity of a text ---------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Return the normal form of a text, without differences in whitespace and letter case."""
    return " ".join(text.split()).casefold()


def content_hash(text: str) -> str:
    """Return the sha256 of the normal form, in hexadecimal."""
    return hashlib.sha256(normalise(text).encode()).hexdigest()


def document_key(document: str) -> str:
    """Return the key of a document: the beginning of its normal form, which every encoder reads."""
    return normalise(document)[:DOCUMENT_KEY]


def pair_of(text: str) -> Pair | None:
    """Return the first line as a query and the rest as its document; None if either is too short.

    A text of one line is split after its first sentence.
    """
    query, newline, document = text.partition("\n")
    if not newline:
        sentence = re.match(r"(.+?[.!?])\s+(?=\S)", text)
        if sentence is None:
            return None
        query, document = sentence.group(1), text[sentence.end() :]
    query, document = query.strip(), document.strip()
    if len(query.split()) < SHORTEST_QUERY or len(document.split()) < SHORTEST_DOCUMENT:
        return None
    return Pair(query, document)


# --- a folder of labelled sets --------------------------------------------------------------------


def read_folder(folder: Path, *, language_model: bool = False, required: bool = True) -> LabelledFolder:
    """Read the sets of a data folder; some can be missing, and all where `required` is false.

    `stsb/{train,dev}.csv` (tab-separated, no quoting, columns 5 to 7: score, two sentences),
    `ag_news/sample.csv` (class, title, body; split by content), `sst2/{train,dev}.tsv` (sentence, label),
    `wikitext2/valid.txt`, and any `*.txt` (as in a corpus) and `*.jsonl` (column `text`) beside them. A language model
    is judged by wikitext2 and does not learn from it. It learns from `general_text/*.jsonl` (column `text`) and the
    files beside the sets; the sets' own sentences are short, and only stand in where there is no general text.
    FileNotFoundError or ValueError where there is nothing to read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"data.folder = {folder} is not a folder; give one, or null for none")
    found: list[tuple[str, list[str]]] = []
    stsb: list[ScoredPair] = []
    classification: dict[str, tuple[list[LabelledText], list[LabelledText]]] = {}

    if (file := folder / "stsb" / "train.csv").is_file():
        found.append(("stsb", [side for pair in _read_stsb(file) for side in (pair.first, pair.second)]))
    if (file := folder / "stsb" / "dev.csv").is_file():
        stsb = _read_stsb(file)
    if (file := folder / "ag_news" / "sample.csv").is_file():
        classification["ag_news"] = _train_and_dev(_read_ag_news(file))
    sst2 = [folder / "sst2" / name for name in ("train.tsv", "dev.tsv")]
    if all(file.is_file() for file in sst2):
        train, dev = map(_read_sst2, sst2)
        classification["sst2"] = (train, dev)
    elif sst2[0].is_file():
        found.append(("sst2", [row.text for row in _read_sst2(sst2[0])]))
    file = folder / "wikitext2" / "valid.txt"
    wikitext = wikitext_paragraphs(read_lines(file)) if file.is_file() else []
    beside = [(file.stem, read_documents(file)) for file in sorted(folder.glob("*.txt"))]
    beside += [(file.stem, read_jsonl_column(file, "text")) for file in sorted(folder.glob("*.jsonl"))]
    fitted = [(name, [row.text for row in train]) for name, (train, _) in classification.items()]
    general = [(file.stem, read_jsonl_column(file, "text")) for file in sorted(folder.glob("general_text/*.jsonl"))]
    if language_model:
        found = [*(general or [*found, *fitted]), *beside]
    else:
        found += [("wikitext2", wikitext), *beside, *fitted]
    sources: dict[str, str] = {}
    texts = []
    for source, raw in found:
        for text in map(clean, raw):
            if text:
                texts.append(text)
                sources.setdefault(text, source)
    if required and not texts and not stsb and not wikitext:
        raise ValueError(
            f"data.folder = {folder} holds none of stsb/*.csv, ag_news/sample.csv, sst2/*.tsv, wikitext2/valid.txt, "
            "general_text/*.jsonl, *.txt, *.jsonl, nor hellaswag/*.jsonl or blimp/*.jsonl for a language model; see "
            "README.md for the layout"
        )
    classification = {name: _fit_set(train, dev) for name, (train, dev) in classification.items()}
    return LabelledFolder(texts, sources, stsb, classification, list(map(clean, wikitext)) if language_model else [])


def _read_stsb(path: Path) -> list[ScoredPair]:
    pairs = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        cells = line.split("\t")
        try:
            pair = ScoredPair(float(cells[4]), clean(cells[5]), clean(cells[6]))
        except (IndexError, ValueError):
            raise ValueError(
                f"{path}:{number} is not a row of STS-B: columns 5, 6 and 7, separated by tabs, must be "
                "a score and two sentences"
            ) from None
        pairs.append(pair)
    return pairs


def _read_ag_news(path: Path) -> list[LabelledText]:
    rows = []
    for number, cells in enumerate(csv.reader(read_table(path)), 1):
        if len(cells) != 3:
            raise ValueError(f"{path}: row {number} has {len(cells)} columns, not three: class, title, body")
        # The set writes line breaks as backslashes.
        title, body = (cell.replace("\\", " ") for cell in cells[1:])
        rows.append(LabelledText(cells[0], clean(f"{title.strip()}. {body}")))
    return rows


def _read_sst2(path: Path) -> list[LabelledText]:
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        text, tab, label = line.rpartition("\t")
        if not tab or not text.strip():
            raise ValueError(f"{path}:{number} is not a row of SST-2: a sentence, a tab and a label")
        rows.append(LabelledText(label.strip(), clean(text)))
    return rows


def wikitext_paragraphs(lines: Iterable[str]) -> list[str]:
    """Return the paragraphs of WikiText, without headings and the marks of its tokeniser."""
    texts = []
    for paragraph in map(str.strip, lines):
        if paragraph and not paragraph.startswith("= "):
            text = re.sub(r" @([-,.])@ ", r"\1", paragraph.replace("<unk>", ""))
            texts.append(re.sub(r"\s+", " ", re.sub(r" ([.,;:!?)])", r"\1", text)))
    return texts


def _train_and_dev(rows: Sequence[LabelledText]) -> tuple[list[LabelledText], list[LabelledText]]:
    """Split one sample into train and dev, by content."""
    border = int(AG_NEWS_DEV_SHARE * 16**8)
    train: list[LabelledText] = []
    dev: list[LabelledText] = []
    for row in rows:
        (dev if int(content_hash(row.text)[:8], 16) < border else train).append(row)
    return train, dev


def _fit_set(
    train: Sequence[LabelledText], dev: Sequence[LabelledText]
) -> tuple[list[LabelledText], list[LabelledText]]:
    """Return the examples to fit a classifier on, without those of dev, and dev without repeats."""
    judged = {normalise(row.text): row for row in dev if row.text}
    fitted = {normalise(row.text): row for row in train if row.text and normalise(row.text) not in judged}
    ordered = sorted(fitted.values(), key=lambda row: content_hash(row.text))
    return ordered[:MOST_CLASSIFIER_TEXTS], list(judged.values())


def general_sentences() -> list[str]:
    """Return sentences about everyday life, of the project's own, that judge an encoder and that none learns from.

    In groups of four: two that mean about the same, and two more about something near. So similarities spread.
    """
    return read_lines(Path(__file__).with_name("general_sentences.txt"))


# --- splits ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    """Texts that go to one split together: a text, and its first line as another text."""

    key: str
    texts: tuple[str, ...]


def benchmark_pairs(texts: Sequence[str], count: int, judged: Iterable[str] = ()) -> dict[str, Pair]:
    """Return up to `count` pairs for retrieval, as text -> pair, in the order of the content hash.

    Every query and every document is unique in `texts`, so that each query has one right answer. Texts in `judged` are
    left out.
    """
    forbidden = {normalise(text) for text in judged}
    candidates = {text: pair for text in texts if (pair := pair_of(text))}
    queries = Counter(normalise(pair.query) for pair in candidates.values())
    documents = Counter(document_key(pair.document) for pair in candidates.values())
    chosen: dict[str, Pair] = {}
    for text in sorted(candidates, key=content_hash):
        if len(chosen) == count:
            break
        pair = candidates[text]
        query, document = normalise(pair.query), normalise(pair.document)
        unique = queries[query] == 1 and documents[document[:DOCUMENT_KEY]] == 1
        if unique and forbidden.isdisjoint({normalise(text), query, document}):
            chosen[text] = pair
    return chosen


def own_pairs(texts: Sequence[str], count: int) -> int:
    """Return how many pairs a corpus gives to its own retrieval benchmark; 0 if it has too few."""
    most = min(count, int(LARGEST_PAIR_SHARE * len(texts)))
    return most if most >= min(count, FEWEST_OWN_PAIRS) else 0


def split(
    texts: Sequence[str],
    *,
    pairs: dict[str, Pair],
    calibration_texts: int,
    max_texts: int,
    joined: Sequence[str] = (),
    judged: Iterable[str] = (),
    evaluation_texts: int = 0,
    first_lines: bool = True,
) -> Splits:
    """Split texts into train, calibration and evaluation, in the order of their content hash (a fixed shuffle).

    `pairs` (from `benchmark_pairs`, of this corpus or another) are held out with the texts they come from. `joined` are
    further texts to learn from; they get at most half of `max_texts` where both are large. `evaluation_texts` more
    texts are held out where the pairs come from another corpus. With `first_lines` the first line of a text is also a
    text, because queries are short. ValueError if too few texts are left to train on.
    """
    leaks = _LeakGuard(pairs.values(), judged)
    evaluation = sorted({text for text in texts if text in pairs}, key=content_hash)
    seen: set[str] = set()
    own = _units([text for text in texts if text not in pairs], leaks, seen, with_queries=first_lines)
    more = _units(joined, leaks, seen, with_queries=False)
    evaluation += [unit.texts[0] for unit in own[:evaluation_texts]]
    own = own[evaluation_texts:]

    room = max_texts - len(evaluation)
    more = more[: max(room // 2, room - sum(len(unit.texts) for unit in own))]
    units = sorted(_first(own, room - len(more)) + more, key=lambda unit: unit.key)
    border, calibration = 0, 0
    while border < len(units) and calibration < calibration_texts:
        calibration += len(units[border].texts)
        border += 1
    held_out, train = ([text for unit in part for text in unit.texts] for part in (units[:border], units[border:]))
    if len(train) < FEWEST_TRAIN_TEXTS:
        raise ValueError(
            f"the corpus is too small to split: {len(evaluation)} texts for evaluation and "
            f"{len(held_out)} of the {calibration_texts} for calibration leave {len(train)} to train on "
            f"(at least {FEWEST_TRAIN_TEXTS} are needed); give more texts, or lower data.calibration_texts "
            "and data.evaluation_pairs"
        )
    return Splits(train, held_out[:calibration_texts], evaluation, list(pairs.values()))


class _LeakGuard:
    """Recognise texts that judge a model inside other texts."""

    def __init__(self, pairs: Iterable[Pair], judged: Iterable[str]) -> None:
        pairs = list(pairs)
        self._whole = {normalise(text) for text in judged}
        self._whole |= {normalise(side) for pair in pairs for side in (pair.query, pair.document)}
        self._documents = {document_key(pair.document) for pair in pairs}

    def leaks(self, text: str) -> bool:
        """Return whether a text holds one that judges a model."""
        if normalise(text) in self._whole or document_key(text) in self._documents:
            return True
        pair = pair_of(text)
        if pair is not None and document_key(pair.document) in self._documents:
            return True
        return any(normalise(line) in self._whole for line in text.split("\n"))


def _units(texts: Iterable[str], leaks: _LeakGuard, seen: set[str], *, with_queries: bool) -> list[_Unit]:
    """Return texts as units in the order of their hash; their normal forms are added to `seen`."""
    units = []
    for key, text in sorted((content_hash(text), text) for text in texts):
        parts = [text]
        if with_queries and (pair := pair_of(text)):
            parts.append(pair.query)
        kept = []
        for part in parts:
            form = normalise(part)
            if form not in seen and not leaks.leaks(part):
                seen.add(form)
                kept.append(part)
        if kept:
            units.append(_Unit(key, tuple(kept)))
    return units


def _first(units: Sequence[_Unit], count: int) -> list[_Unit]:
    """Return the first units that have at most `count` texts together."""
    taken, total = [], 0
    for unit in units:
        total += len(unit.texts)
        if total > count:
            break
        taken.append(unit)
    return taken


# --- JSON lines, which carry texts between stages -------------------------------------------


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines with sorted keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a file that `write_jsonl` wrote."""
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def read_texts(path: str | Path) -> list[str]:
    """Read the texts of a split."""
    return [row["text"] for row in read_jsonl(path)]
