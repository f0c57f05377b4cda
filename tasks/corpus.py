"""Where texts come from, and how they are split.

Sources are the docstrings of installed packages, files of text, and folders of labelled sets. A split is a
function of the content of the texts alone (sha256), so the same texts are split the same way everywhere. No
text is in two splits, also after whitespace and letter case are normalised, and nothing that is used to judge
a model (a dev sentence, a query or a document of the retrieval benchmark) is in what it learns from.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import importlib.util
import json
import os
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Import name -> distribution name of the packages whose docstrings are the default corpus, beside the
# standard library. An explicit list, so that the corpus is a function of the Python version and of
# constraints.txt; large, written for people, and needed by ffn2moe or by torch in any case.
PACKAGES: dict[str, str] = {
    "numpy": "numpy",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "pandas": "pandas",
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "sympy": "sympy",
    "torch": "torch",
    "transformers": "transformers",
}

SHORTEST_DOCSTRING = 8  # words; shorter ones ("Return self.") say nothing about themselves
LONGEST_TEXT = 4000  # characters; far beyond what an encoder reads, and a bound on memory
SHORTEST_QUERY, SHORTEST_DOCUMENT = 3, 10  # words
DOCUMENT_KEY = 400  # characters of a document that an encoder surely reads: two that agree there are one text
FEWEST_OWN_PAIRS = 100  # with fewer pairs than this, a corpus cannot be its own retrieval benchmark
LARGEST_PAIR_SHARE = 0.25  # of a corpus that is held out for its own retrieval benchmark
FEWEST_TRAIN_TEXTS = 32
AG_NEWS_DEV_SHARE = 0.25
MOST_CLASSIFIER_TEXTS = 1000  # that a classifier is fitted on: a stable accuracy, quickly embedded

_NOT_DOCUMENTATION = {"test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "__pycache__"}

Track = Callable[[Iterable[Any], int, str], Iterable[Any]]


@dataclass(frozen=True)
class Pair:
    """One question of the retrieval benchmark, and its one right answer."""

    query: str
    document: str


@dataclass(frozen=True)
class LabelledText:
    label: str
    text: str


@dataclass(frozen=True)
class ScoredPair:
    """Two sentences and how similar people found them (STS-B: 0 to 5)."""

    score: float
    first: str
    second: str


@dataclass(frozen=True)
class LabelledFolder:
    """What a data folder holds: texts to learn from, and sets to judge by."""

    texts: list[str]
    stsb: list[ScoredPair] = field(default_factory=list)
    classification: dict[str, tuple[list[LabelledText], list[LabelledText]]] = field(default_factory=dict)

    def judged(self) -> list[str]:
        """Every text of a dev set: none of them may be learnt from."""
        sentences = [side for pair in self.stsb for side in (pair.first, pair.second)]
        return sentences + [row.text for _, dev in self.classification.values() for row in dev]


@dataclass(frozen=True)
class Splits:
    train: list[str]
    calibration: list[str]
    evaluation: list[str]
    pairs: list[Pair]


# --- identity of a text ---------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Whitespace and letter case removed as differences: two texts with one normal form are one text."""
    return " ".join(text.split()).casefold()


def content_hash(text: str) -> str:
    """sha256 of the normal form, in hexadecimal."""
    return hashlib.sha256(normalise(text).encode()).hexdigest()


def document_key(document: str) -> str:
    """What identifies a document to an encoder: the beginning of its normal form."""
    return normalise(document)[:DOCUMENT_KEY]


def clean(text: str) -> str:
    """The text without surrounding space, NUL and lone surrogates (UTF-8 has none), and not too long."""
    return text.encode("utf-8", "ignore").decode().replace("\0", "")[:LONGEST_TEXT].strip()


def pair_of(text: str) -> Pair | None:
    """The first line as a query and the rest as its document; None if either is too short to mean anything.

    A text of one line is divided after its first sentence.
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


# --- docstrings -----------------------------------------------------------------------------------


def docstrings(
    packages: Sequence[str] = tuple(PACKAGES),
    *,
    standard_library: bool = True,
    workers: int = 0,
    track: Track | None = None,
) -> list[str]:
    """The distinct docstrings of the standard library and of installed packages, sorted.

    Source files are parsed, never imported. `workers` = 0 takes every core. ValueError if a package is
    missing.
    """
    files = list(_standard_library_files()) if standard_library else []
    for package in packages:
        files += _package_files(package)
    found: set[str] = set()
    # Spawned, not forked: the parent may hold threads (progress, BLAS) that a fork would copy in mid-air.
    count = min(workers or os.cpu_count() or 1, 8)
    with ProcessPoolExecutor(count, get_context("spawn"), initializer=_die_with_parent) as pool:
        parsed: Iterable[list[str]] = pool.map(_docstrings_of_file, files, chunksize=32)
        for texts in track(parsed, len(files), "reading docstrings") if track else parsed:
            found.update(texts)
    return sorted(found)


def _standard_library_files() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names):
        if (module := root / f"{name}.py").is_file():
            yield str(module)
        elif name not in _NOT_DOCUMENTATION and (root / name).is_dir():
            yield from _python_files(root / name)


def _package_files(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"data.corpus = docstrings reads the docstrings of {package}, which is not installed here; "
            f"install it (make setup, or pip install -c constraints.txt {PACKAGES.get(package, package)})"
        )
    return [file for folder in spec.submodule_search_locations for file in _python_files(Path(folder))]


def _python_files(folder: Path) -> list[str]:
    return sorted(
        str(file)
        for file in folder.rglob("*.py")
        if not _NOT_DOCUMENTATION.intersection(file.relative_to(folder).parts)
    )


def _docstrings_of_file(path: str) -> list[str]:
    source = Path(path).read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a template or another version's syntax, shipped as .py
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (clean(ast.get_docstring(node) or "") for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in texts if len(text.split()) >= SHORTEST_DOCSTRING]


def _die_with_parent() -> None:
    """Linux: a worker ends when the stage is killed, also by SIGKILL. Elsewhere it ends with its pipe."""
    if sys.platform == "linux":
        import ctypes
        import signal

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


# --- files ----------------------------------------------------------------------------------------


def read_corpus(source: str, column: str = "text", *, workers: int = 0, track: Track | None = None) -> list[str]:
    """The texts of a corpus, cleaned, without empty ones, in the order of the source.

    `docstrings`; a .txt (one text a line), .jsonl, .csv or .tsv file (`column` is the one that holds the
    text); or `datasets:NAME` (also `datasets:NAME:CONFIGURATION`). FileNotFoundError or ValueError with the
    remedy.
    """
    if source == "docstrings":
        return docstrings(workers=workers, track=track)
    raw = _datasets_texts(source, column) if source.startswith("datasets:") else _file_texts(Path(source), column)
    texts = [text for text in map(clean, raw) if text]
    if not texts:
        raise ValueError(f"the corpus {source} holds no text: every line or row is empty; give another")
    return texts


def _file_texts(path: Path, column: str) -> list[str]:
    readers: dict[str, Callable[[Path, str], list[str]]] = {
        ".txt": lambda file, _: _read_lines(file),
        ".jsonl": _jsonl_column,
        ".csv": lambda file, name: _table_column(file, name, ","),
        ".tsv": lambda file, name: _table_column(file, name, "\t"),
    }
    if path.suffix.lower() not in readers:
        raise ValueError(
            f"data.corpus = {path} is not something texts can be read from; use docstrings, datasets:NAME, "
            f"or a file that ends in {', '.join(readers)}"
        )
    return readers[path.suffix.lower()](path, column)


def _read(path: Path) -> str:
    """A UTF-8 file, with the remedy in the error."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}; check data.corpus and data.folder") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder, not a file; labelled sets go in data.folder") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, for example: "
            f"iconv -f latin1 -t utf-8 {path.name}"
        ) from None


def _read_lines(path: Path) -> list[str]:
    return _read(path).splitlines()


def _jsonl_column(path: Path, column: str) -> list[str]:
    texts = []
    for number, line in enumerate(_read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON ({error.msg}); every line must be an object") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} is not an object; every line must be one, with a {column!r}")
        texts.append(_cell(row, column, f"{path}:{number}"))
    return texts


def _table_column(path: Path, column: str, delimiter: str) -> list[str]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(_read(path).splitlines(keepends=True), delimiter=delimiter)
    try:
        return [_cell(row, column, f"{path}:{rows.line_num}") for row in rows]
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num} is not a row of a table: {error}; check its quoting") from None


def _cell(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        columns = ", ".join(map(repr, (key for key in row if key is not None)))
        raise ValueError(f"{where} has no column {column!r}; its columns are {columns}: set data.text_column")
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {column!r} is not text but {value!r}; set data.text_column")
    return value or ""


def _datasets_texts(source: str, column: str) -> list[str]:
    import datasets

    _, name, *configuration = source.split(":")
    try:
        table = datasets.load_dataset(name, *configuration, split="train")
    except Exception as error:  # the library raises a dozen kinds, of its own and of its dependencies
        raise ValueError(
            f"data.corpus = {source}: the datasets library cannot load the train split of {name} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}); "
            "check the name and the network, or give a file"
        ) from None
    if column not in table.column_names:
        names = ", ".join(map(repr, table.column_names))
        raise ValueError(f"{source} has no column {column!r}; its columns are {names}: set data.text_column")
    return [value if isinstance(value, str) else "" for value in table[column]]


# --- a folder of labelled sets --------------------------------------------------------------------


def read_folder(folder: Path) -> LabelledFolder:
    """The sets of a data folder; each may be missing, but not all.

    `stsb/{train,dev}.csv` (tab-separated, no quoting, columns 5 to 7: score, two sentences),
    `ag_news/sample.csv` (class, title, body; split by content), `sst2/{train,dev}.tsv` (sentence, label),
    `wikitext2/valid.txt`, and any `*.txt` (a text a line) and `*.jsonl` (column `text`) beside them.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"data.folder = {folder} is not a folder; give one, or null for none")
    texts: list[str] = []
    stsb: list[ScoredPair] = []
    classification: dict[str, tuple[list[LabelledText], list[LabelledText]]] = {}

    if (file := folder / "stsb" / "train.csv").is_file():
        texts += [side for pair in _read_stsb(file) for side in (pair.first, pair.second)]
    if (file := folder / "stsb" / "dev.csv").is_file():
        stsb = _read_stsb(file)
    if (file := folder / "ag_news" / "sample.csv").is_file():
        classification["ag_news"] = _divide(_read_ag_news(file))
    sst2 = [folder / "sst2" / name for name in ("train.tsv", "dev.tsv")]
    if all(file.is_file() for file in sst2):
        train, dev = map(_read_sst2, sst2)
        classification["sst2"] = (train, dev)
    elif sst2[0].is_file():
        texts += [row.text for row in _read_sst2(sst2[0])]
    if (file := folder / "wikitext2" / "valid.txt").is_file():
        texts += _read_wikitext(file)
    for file in sorted(folder.glob("*.txt")):
        texts += _read_lines(file)
    for file in sorted(folder.glob("*.jsonl")):
        texts += _jsonl_column(file, "text")

    texts += [row.text for train, _ in classification.values() for row in train]
    texts = [text for text in map(clean, texts) if text]
    if not texts and not stsb:
        raise ValueError(
            f"data.folder = {folder} holds none of stsb/*.csv, ag_news/sample.csv, sst2/*.tsv, "
            "wikitext2/valid.txt, *.txt, *.jsonl; see README.md for the layout"
        )
    classification = {name: _fit_set(train, dev) for name, (train, dev) in classification.items()}
    return LabelledFolder(texts, stsb, classification)


def _read_stsb(path: Path) -> list[ScoredPair]:
    pairs = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
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
    for number, cells in enumerate(csv.reader(_read(path).splitlines(keepends=True)), 1):
        if len(cells) != 3:
            raise ValueError(f"{path}: row {number} has {len(cells)} columns, not three: class, title, body")
        # The set writes line breaks as backslashes.
        title, body = (cell.replace("\\", " ") for cell in cells[1:])
        rows.append(LabelledText(cells[0], clean(f"{title.strip()}. {body}")))
    return rows


def _read_sst2(path: Path) -> list[LabelledText]:
    rows = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        text, tab, label = line.rstrip("\r").rpartition("\t")
        if not tab or not text.strip():
            raise ValueError(f"{path}:{number} is not a row of SST-2: a sentence, a tab and a label")
        rows.append(LabelledText(label.strip(), clean(text)))
    return rows


def _read_wikitext(path: Path) -> list[str]:
    """Paragraphs, without headings and the marks of WikiText's tokeniser."""
    paragraphs = (line.strip() for line in _read_lines(path))
    texts = []
    for paragraph in paragraphs:
        if paragraph and not paragraph.startswith("= "):
            text = re.sub(r" @([-,.])@ ", r"\1", paragraph.replace("<unk>", ""))
            texts.append(re.sub(r"\s+", " ", re.sub(r" ([.,;:!?)])", r"\1", text)))
    return texts


def _divide(rows: Sequence[LabelledText]) -> tuple[list[LabelledText], list[LabelledText]]:
    """One sample as train and dev, by content."""
    border = int(AG_NEWS_DEV_SHARE * 16**8)
    train: list[LabelledText] = []
    dev: list[LabelledText] = []
    for row in rows:
        (dev if int(content_hash(row.text)[:8], 16) < border else train).append(row)
    return train, dev


def _fit_set(
    train: Sequence[LabelledText], dev: Sequence[LabelledText]
) -> tuple[list[LabelledText], list[LabelledText]]:
    """The examples to fit a classifier on, none of them in dev, and dev without repeats."""
    judged = {normalise(row.text): row for row in dev if row.text}
    fitted = {normalise(row.text): row for row in train if row.text and normalise(row.text) not in judged}
    ordered = sorted(fitted.values(), key=lambda row: content_hash(row.text))
    return ordered[:MOST_CLASSIFIER_TEXTS], list(judged.values())


# --- splits ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    """Texts that go to one split together: a text, and its first line as a text of its own."""

    key: str
    texts: tuple[str, ...]


def benchmark_pairs(texts: Sequence[str], count: int, judged: Iterable[str] = ()) -> dict[str, Pair]:
    """Up to `count` pairs for retrieval, as text -> pair, by content hash.

    Every query and every document in it is the only one of its kind in all of `texts`, so that each query has
    one right answer. None of `judged` is used.
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
    """How many pairs a corpus gives to its own retrieval benchmark; 0 if too few to mean much."""
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
) -> Splits:
    """Train, calibration and evaluation texts, in the order of their content hash (a fixed shuffle).

    `pairs` (from `benchmark_pairs`, of this corpus or another) are held out with the texts they come from.
    `joined` are further texts to learn from; they get at most half of `max_texts` where both are large.
    `evaluation_texts` more texts are held out where the pairs come from another corpus. ValueError if what is
    left is too small to train on.
    """
    leaks = _LeakGuard(pairs.values(), judged)
    evaluation = sorted({text for text in texts if text in pairs}, key=content_hash)
    seen: set[str] = set()
    own = _units([text for text in texts if text not in pairs], leaks, seen, with_queries=True)
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
    """Knows what a model is judged by, and recognises it in a text."""

    def __init__(self, pairs: Iterable[Pair], judged: Iterable[str]) -> None:
        pairs = list(pairs)
        self._whole = {normalise(text) for text in judged}
        self._whole |= {normalise(side) for pair in pairs for side in (pair.query, pair.document)}
        self._documents = {document_key(pair.document) for pair in pairs}

    def leaks(self, text: str) -> bool:
        if normalise(text) in self._whole or document_key(text) in self._documents:
            return True
        pair = pair_of(text)
        if pair is not None and document_key(pair.document) in self._documents:
            return True
        return any(normalise(line) in self._whole for line in text.split("\n"))


def _units(texts: Iterable[str], leaks: _LeakGuard, seen: set[str], *, with_queries: bool) -> list[_Unit]:
    """Texts as units in hash order; `seen` holds the normal forms that are taken, and grows."""
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
    """Units from the front whose texts number at most `count`."""
    taken, total = [], 0
    for unit in units:
        total += len(unit.texts)
        if total > count:
            break
        taken.append(unit)
    return taken


# --- JSON lines, as the stages hand texts to each other -------------------------------------------


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file that `write_jsonl` wrote."""
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def read_texts(path: str | Path) -> list[str]:
    """The texts of a split."""
    return [row["text"] for row in read_jsonl(path)]
