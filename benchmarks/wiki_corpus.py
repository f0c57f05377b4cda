"""Write a corpus of which one half is WikiText, and a text of the same kind that judges what is learned from it.

    python -m benchmarks.wiki_corpus ../shared/data mixed.jsonl wiki-judge.txt

The corpus is the first two thirds of wikitext2/valid.txt, up to the end of an article, and as many characters of
general_text/general.jsonl; the judge is the beginning of the last third.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.page import complain

CHUNK, JUDGED = 1600, 100_000  # characters of a text of the corpus at least, and of the judge at most
HELD_OUT = 800  # the last texts of general_text, which stay out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wiki_corpus", description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder with wikitext2/valid.txt and general_text/general.jsonl")
    parser.add_argument("corpus", type=Path, help="the .jsonl file to write")
    parser.add_argument("judge", type=Path, help="the text to write")
    options = parser.parse_args(arguments)
    try:
        wiki = (options.data / "wikitext2/valid.txt").read_text(encoding="utf-8")
        lines = (options.data / "general_text/general.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        return complain(error)
    cut = wiki.rindex("\n = ", 0, len(wiki) * 2 // 3)
    texts = list(chunks(wiki[:cut]))
    size = sum(map(len, texts))
    texts += beginning([json.loads(line)["text"] for line in lines[:-HELD_OUT]], size)
    random.Random(0).shuffle(texts)
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    options.corpus.write_text(rows, encoding="utf-8")
    rest = wiki[cut:]
    options.judge.write_text(rest[: rest.rindex("\n", 0, JUDGED) + 1], encoding="utf-8")
    return 0


def chunks(text: str) -> Iterator[str]:
    """Yield the text in pieces of whole lines."""
    now = ""
    for line in text.splitlines(keepends=True):
        now += line
        if len(now) >= CHUNK:
            yield now.strip()
            now = ""
    if now.strip():
        yield now.strip()


def beginning(texts: Sequence[str], size: int) -> list[str]:
    """Return the first texts that have `size` characters together."""
    found: list[str] = []
    while sum(map(len, found)) < size and len(found) < len(texts):
        found.append(texts[len(found)])
    return found


if __name__ == "__main__":
    sys.exit(main())
