"""Take what judges language models from a data folder: questions, and a text that nothing learns from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from ffn2moe.data.corpus import clean, read_file
from ffn2moe.judges.items import TASKS, Item, spread
from tasks import corpus

BYTES_BY_TOKEN = 4  # of a file, about
MOST_CHARACTERS = 2**17  # of the text: about 32,000 tokens


@dataclass(frozen=True)
class LanguageSets:
    """Questions by the names of `TASKS`, and a text in its raw form."""

    questions: dict[str, list[Item]] = field(default_factory=dict)
    text: str | None = None

    def __bool__(self) -> bool:
        return bool(self.questions) or self.text is not None

    def judged(self) -> list[str]:
        """Return every text that must not be learnt from, in the form that texts to learn from have."""
        found = [] if self.text is None else corpus.wikitext_paragraphs(self.text.split("\n"))
        for items in self.questions.values():
            for item in items:
                if item.context is None:
                    found += item.choices
                else:
                    found += [item.context, f"{item.context} {item.choices[item.label]}"]
        return [clean(text) for text in found]

    def write(self, folder: Path) -> None:
        """Write the sets to a folder that `read` takes."""
        for name, items in self.questions.items():
            corpus.write_jsonl(folder / f"{name}.jsonl", (vars(item) for item in items))
        if self.text is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "text.json").write_text(json.dumps(self.text) + "\n", encoding="utf-8")


def read(folder: Path) -> LanguageSets:
    """Return the sets that `write` wrote; none where there is no folder."""
    questions = {
        name: [Item(**row | {"choices": tuple(row["choices"])}) for row in corpus.read_jsonl(path)]
        for name in TASKS
        if (path := folder / f"{name}.jsonl").is_file()
    }
    text = folder / "text.json"
    return LanguageSets(questions, json.loads(text.read_text(encoding="utf-8")) if text.is_file() else None)


def of_folder(folder: Path) -> LanguageSets:
    """Return the sets of a data folder: `TASK/*.jsonl`, and the beginning of wikitext2/test.txt, or of valid.txt there.

    ValueError or FileNotFoundError, with file and line, for a set that cannot be used.
    """
    questions = {name: TASKS[name].read(_file_of(folder / name)) for name in TASKS if (folder / name).is_dir()}
    files = [folder / "wikitext2" / name for name in ("test.txt", "valid.txt")]
    text = next((_whole_lines(read_file(file)) for file in files if file.is_file()), None)
    return LanguageSets(questions, text)


def about_tokens(folder: Path, most: int) -> int:
    """Return about how many tokens a language model is judged by, with at most `most` questions of each file."""
    asked = [_bytes_asked(file, most) for name in TASKS for file in (folder / name).glob("*.jsonl")]
    text = MOST_CHARACTERS if (folder / "wikitext2").is_dir() else 0
    return (sum(asked) + text) // BYTES_BY_TOKEN


def _bytes_asked(file: Path, most: int) -> int:
    """Return the bytes of at most `most` lines of a file, evenly spread."""
    with file.open("rb") as lines:
        sizes = [len(line) for line in lines]
    return sum(spread(sizes, most))


def _file_of(folder: Path) -> Path:
    """Return the file of questions in a folder."""
    files = sorted(folder.glob("*.jsonl"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{folder} must hold one .jsonl file of questions to judge by, and has {names}")
    return files[0]


def _whole_lines(text: str) -> str:
    """Return the lines that fit into `MOST_CHARACTERS`."""
    return text if len(text) <= MOST_CHARACTERS else text[: text.rfind("\n", 0, MOST_CHARACTERS) + 1]
