"""Read the texts to calibrate and train on: docstrings of packages, text files, sets of the datasets library."""

from __future__ import annotations

import ast
import codecs
import csv
import importlib.util
import io
import json
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ffn2moe.data import general
from ffn2moe.progress import Track, untracked

# Import name -> distribution name of the packages whose docstrings, with those of the standard library, are the default
# corpus. The list is fixed so that the corpus depends only on the Python version and constraints.txt. The packages are
# large, their docstrings are written for people, and ffn2moe or torch requires them in any case.
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

INSTALLED = ("general", "docstrings")  # corpora that are made from installed packages, without a file
USUAL_TEXTS = 40000  # of the general corpus
SHORTEST_DOCSTRING = 8  # words; shorter ones ("Return self.") carry no information
END_OF_TEXT = "<|endoftext|>"  # a line between texts of several lines, as in TinyStories and WebText
LONGEST_TEXT = 4000  # characters; bounds memory, far above what an encoder reads

_SET_COLUMN = "set data.text_column, or --text-column"  # the remedy in messages
_NOT_DOCUMENTATION = {"test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "__pycache__"}


def clean(text: str) -> str:
    """Return the text without outer space, NUL and lone surrogates (invalid in UTF-8), truncated to LONGEST_TEXT."""
    return text.encode("utf-8", "ignore").decode().replace("\0", "")[:LONGEST_TEXT].strip()


# --- docstrings -----------------------------------------------------------------------------------


def docstrings(
    packages: Sequence[str] = tuple(PACKAGES),
    *,
    standard_library: bool = True,
    workers: int = 0,
    track: Track = untracked,
) -> list[str]:
    """Return the distinct docstrings of the standard library and of installed packages, sorted.

    Source files are parsed, never imported. `workers` = 0 takes every core. ValueError if a package is missing.
    """
    files = list(_standard_library_files()) if standard_library else []
    for package in packages:
        files += _package_files(package)
    found: set[str] = set()
    # Processes are spawned: a fork would copy the locks of the parent's threads (progress, BLAS).
    count = min(workers or os.cpu_count() or 1, 8)
    with ProcessPoolExecutor(count, get_context("spawn"), initializer=_die_with_parent) as pool:
        parsed: Iterable[list[str]] = pool.map(_docstrings_of_file, files, chunksize=32)
        for texts in track(parsed, len(files), "reading docstrings"):
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
            f"the corpus of docstrings needs {package}, which is not installed here: "
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
    texts = (clean(ast.get_docstring(node) or "") for node in _documented(tree))
    return [text for text in texts if len(text.split()) >= SHORTEST_DOCSTRING]


def _documented(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the module and every class and function in it; unlike `ast.walk` read no expression, of which most are."""
    found: list[ast.AST] = [tree]
    while found:
        node = found.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for statements in ("body", "orelse", "finalbody", "handlers", "cases"):
            found += getattr(node, statements, ())


def _die_with_parent() -> None:
    """End this worker when its parent is killed, also by SIGKILL (Linux; elsewhere it ends with its pipe)."""
    if sys.platform == "linux":
        import ctypes
        import signal

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


# --- files ----------------------------------------------------------------------------------------


def read_corpus(
    source: str,
    column: str = "text",
    *,
    words: Sequence[str] = (),
    count: int = USUAL_TEXTS,
    workers: int = 0,
    track: Track = untracked,
    most: int | None = None,
) -> list[str]:
    """Return the texts of a corpus, cleaned, without empty ones, in the order of the source.

    The source is `docstrings`; `general`, which is `count` texts over `words`, or docstrings where no words are given
    (`ffn2moe.data.general`); a .txt file (one text a line, or texts between lines of <|endoftext|>); a .jsonl, .csv or
    .tsv file, whose `column` holds the text; or `datasets:NAME` (also `datasets:NAME:CONFIGURATION`). With `most`, only
    so many first bytes of a file are read. FileNotFoundError or ValueError with the remedy.
    """
    if source == "docstrings":
        return docstrings(workers=workers, track=track)
    if source == "general":
        return list(general.mixed(docstrings(workers=workers, track=track), words, count))
    texts = [text for text in map(clean, read_column(source, column, most)) if text]
    if not texts:
        raise ValueError(f"the corpus {source} holds no text: every line or row is empty; give another")
    return texts


def read_column(source: str, column: str, most: int | None = None) -> list[str]:
    """Return the texts of a file or of a set of the datasets library as they are, with "" where a row has none."""
    if source.startswith("datasets:"):
        return _datasets_texts(source, column)
    return _file_texts(Path(source), column, most)


def _file_texts(path: Path, column: str, most: int | None) -> list[str]:
    readers: dict[str, Callable[[], list[str]]] = {
        ".txt": lambda: read_documents(path, most),
        ".jsonl": lambda: read_jsonl_column(path, column, most),
        ".csv": lambda: _table_column(path, column, ",", most),
        ".tsv": lambda: _table_column(path, column, "\t", most),
    }
    if path.suffix.lower() not in readers:
        raise ValueError(
            f"the corpus {path} is no file of texts: use {', '.join(INSTALLED)}, datasets:NAME, "
            f"or a file that ends in {', '.join(readers)}"
        )
    return readers[path.suffix.lower()]()


def encoding_of(start: bytes) -> str:
    """Return the codec of a text that starts so: UTF-16 with a byte order mark, or UTF-8 with or without one."""
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def read_file(path: Path, most: int | None = None) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 with a byte order mark; its line ends stay as they are.

    With `most`, only the whole lines among so many first bytes. FileNotFoundError or ValueError with the remedy.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read() if most is None else stream.read(most)
            whole = most is None or not stream.read(1)
        encoding = encoding_of(raw)
        text = codecs.getincrementaldecoder(encoding)().decode(raw, final=whole)
        if encoding != "utf-16" and raw[:4096].count(0) > len(raw[:4096]) // 8:
            raise ValueError(
                f"{path} is UTF-16 without a byte order mark, or no text at all (NUL bytes); convert it, for example: "
                f"iconv -f utf-16le -t utf-8 {path.name} > utf8-{path.name}"
            )
        return text if whole else text[: 1 + max(text.rfind("\n"), text.rfind("\r"))] or text
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}; check data.corpus and data.folder, or --corpus") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder, not a file; labelled sets go in data.folder") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not {error.encoding.upper()} text (byte {error.start}); convert it, for example: "
            f"iconv -f latin1 -t utf-8 {path.name} > utf8-{path.name}"
        ) from None


def read_lines(path: Path, most: int | None = None) -> list[str]:
    r"""Return the lines of a file of text, which end in \n, \r\n or \r; other separators (U+2028, \f) are text."""
    lines = re.split(r"\r\n|\r|\n", read_file(path, most))
    return lines[:-1] if lines[-1] == "" else lines


def read_table(path: Path, most: int | None = None) -> io.StringIO:
    """Return the text of a .csv or .tsv file as the csv module takes it: a cell may hold line ends of any kind."""
    return io.StringIO(read_file(path, most), newline="")


def read_documents(path: Path, most: int | None = None) -> list[str]:
    """Return the texts of a .txt file: the lines or, where there are lines of <|endoftext|>, the parts between them."""
    lines = read_lines(path, most)
    if END_OF_TEXT not in lines:
        return lines
    texts: list[list[str]] = [[]]
    for line in lines:
        if line == END_OF_TEXT:
            texts.append([])
        else:
            texts[-1].append(line)
    return ["\n".join(text) for text in texts]


def read_jsonl_column(path: Path, column: str, most: int | None = None) -> list[str]:
    """Return a column of a .jsonl file, with "" where it is null."""
    return [_cell(row, column, where) for where, row in read_rows(path, most)]


def read_rows(path: Path, most: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of a .jsonl file after its place, PATH:LINE; empty lines are skipped. ValueError for no object."""
    for number, line in enumerate(read_lines(path, most), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON ({error.msg}); every line must be an object") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not an object; every line must be one, with a value for each column")
        yield where, row


def _table_column(path: Path, column: str, delimiter: str, most: int | None) -> list[str]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(read_table(path, most), delimiter=delimiter)
    try:
        return [_cell(row, column, f"{path}:{rows.line_num}") for row in rows]
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num} is not a row of a table: {error}; check its quoting") from None


def _cell(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        columns = ", ".join(map(repr, (key for key in row if key is not None)))
        raise ValueError(f"{where} has no column {column!r}; its columns are {columns}: {_SET_COLUMN}")
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {column!r} is not text but {value!r}; {_SET_COLUMN}")
    return value or ""


def _datasets_texts(source: str, column: str) -> list[str]:
    import datasets

    _, name, *configuration = source.split(":")
    try:
        table = datasets.load_dataset(name, *configuration, split="train")
    except Exception as error:  # the library and its dependencies raise a dozen kinds
        raise ValueError(
            f"the corpus {source}: the datasets library cannot load the train split of {name} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}); "
            "check the name and the network, or give a file"
        ) from None
    if column not in table.column_names:
        names = ", ".join(map(repr, table.column_names))
        raise ValueError(f"{source} has no column {column!r}; its columns are {names}: {_SET_COLUMN}")
    return [value if isinstance(value, str) else "" for value in table[column]]
