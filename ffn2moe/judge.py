"""Judge a language model by questions and by a text, alone or beside its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from ffn2moe import metrics
from ffn2moe.containers.checks import open_native
from ffn2moe.containers.table import CONTAINERS
from ffn2moe.data.corpus import read_file
from ffn2moe.dense.families import positions
from ffn2moe.dense.load import load_dense, read_config
from ffn2moe.dense.plain import plain_folder
from ffn2moe.dense.weights import weight_headers
from ffn2moe.judges.answers import Compared, by_group, kept, kept_interval, right, standard_error
from ffn2moe.judges.asked import ask, first_token
from ffn2moe.judges.items import TASKS, Item, spread
from ffn2moe.judges.likelihood import log_likelihoods
from ffn2moe.judges.reading import BLOCK, FLOAT32, Reading, blocks, logits_bytes, read
from ffn2moe.moe import checkpoint
from ffn2moe.numerics import choose_device
from ffn2moe.preflight.room import available_memory
from ffn2moe.progress import Say, Track, silent, untracked

GIB = 2**30
MODEL, TEACHER = "model", "teacher"  # in what is returned


def judge(
    source: str,
    *,
    teacher: str | None = None,
    tasks: Mapping[str, Path],
    text: Path | None = None,
    most: int | None = None,
    block: int = BLOCK,
    device: str = "auto",
    say: Say = silent,
    track: Track = untracked,
) -> dict[str, Any]:
    """Return the figures of a language model, and what it keeps of its teacher's.

    `source` and `teacher` are an export, a checkpoint, a native container, or any source of `load_dense`. `tasks` are
    files of questions by the names of `ffn2moe.judges.items.TASKS`, of each of which at most `most` are asked; `text`
    is a file whose perplexity is measured in blocks of `block` tokens. ValueError or FileNotFoundError, with cause and
    remedy, before a weight is read where that is possible.
    """
    if not tasks and text is None:
        raise ValueError(f"there is nothing to judge by: name a file of {', '.join(TASKS.names())}, or a text")
    sets = {name: spread(TASKS[name].read(path), most) for name, path in tasks.items()}
    written = None if text is None else _text_of(text)
    named = {MODEL: Subject.of(source, say)} | ({TEACHER: Subject.of(teacher, say)} if teacher else {})
    device = choose_device(device)
    longest = min((one.positions for one in named.values() if one.positions is not None), default=None)
    block = block if longest is None else min(block, longest)
    _require_same_vocabulary(named)
    if device == "cpu":
        _require_memory(named, block)
    tokenizers, models = {}, {}
    for name, subject in named.items():
        model, tokenizers[name] = subject.open()
        models[name] = model.to(device).eval()
    tokenizer = _one_tokenizer(tokenizers, named)
    found: dict[str, Any] = {name: subject.source for name, subject in named.items()} | {"tasks": {}}
    compared = []
    for name, items in sets.items():
        figures, both = _answers(models, tokenizer, name, items, longest, say, track)
        found["tasks"][name] = figures
        compared += [both] if both is not None else []
    if compared:
        found["kept"] = kept(compared)
        found["kept_interval"] = asdict(kept_interval(compared))
    if written is not None:
        found["text"] = _text_figures(models, blocks(tokenizer, written, block), track)
    return found


@dataclass(frozen=True)
class Subject:
    """A language model to judge, before its weights are read."""

    source: str
    folder: Path
    config: Any

    @classmethod
    def of(cls, source: str, say: Say) -> Subject:
        """Return the model of a source. ValueError or FileNotFoundError for what is no language model."""
        folder = Path(source).expanduser()
        if (folder / "checkpoint" / checkpoint.SPEC_FILE).is_file():  # an export
            folder = folder / "checkpoint"
        if (folder / checkpoint.SPEC_FILE).is_file():
            head = checkpoint.load_spec(folder).head
            if head != "causal":
                raise ValueError(f"{source} gives {head}, and these judges are for language models (causal)")
        else:
            folder = plain_folder(source, say=say)
        return cls(source, folder, read_config(source, folder))

    @property
    def positions(self) -> int | None:
        """The longest text in tokens; None where nothing limits it."""
        return positions(self.config)

    @property
    def vocabulary(self) -> int:
        """The tokens that have a logit."""
        return int(self.config.get_text_config(decoder=True).vocab_size)

    @property
    def bytes(self) -> int:
        """The memory of the weights in float32."""
        return FLOAT32 * sum(prod(header.shape) for header in weight_headers(self.folder).values())

    def open(self) -> tuple[Any, Any]:
        """Return the model, float32, and its tokenizer."""
        if self.config.model_type in CONTAINERS:  # it may hold a spec, too
            return open_native(self.folder), self._tokenizer()
        if (self.folder / checkpoint.SPEC_FILE).is_file():
            return checkpoint.load(self.folder), self._tokenizer()
        return load_dense(str(self.folder), head="causal")

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        beside = self.folder.parent / "tokenizer"  # of an export
        folder = beside if (beside / "tokenizer.json").is_file() else self.folder
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{self.source} has no tokenizer that can be read ({reason}): copy its files") from None


def _text_of(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: name a text in UTF-8")
    return read_file(path)


def _require_same_vocabulary(named: Mapping[str, Subject]) -> None:
    """ValueError where the distributions of two models cannot be compared."""
    sizes = {subject.source: subject.vocabulary for subject in named.values()}
    if len(set(sizes.values())) > 1:
        told = " and ".join(f"{source} has {size} tokens" for source, size in sizes.items())
        raise ValueError(f"{told}: a teacher is the dense model that the student was made of")


def _one_tokenizer(tokenizers: Mapping[str, Any], named: Mapping[str, Subject]) -> Any:
    """Return the tokenizer of the model. ValueError where its teacher has another."""
    if TEACHER in tokenizers and tokenizers[TEACHER].get_vocab() != tokenizers[MODEL].get_vocab():
        raise ValueError(
            f"{named[MODEL].source} and {named[TEACHER].source} have different tokenizers: a teacher is the dense "
            "model that the student was made of"
        )
    return tokenizers[MODEL]


def _require_memory(named: Mapping[str, Subject], block: int) -> None:
    """ValueError where memory does not hold the weights and the logits of a block."""
    available = available_memory()
    weights = sum(subject.bytes for subject in named.values())
    vocabulary = named[MODEL].vocabulary
    logits = logits_bytes(vocabulary, block, len(named))
    if available is not None and weights + logits > available:
        raise ValueError(
            f"judging takes about {(weights + logits) / GIB:.1f} GiB of memory, and {available / GIB:.1f} GiB are "
            f"available: {weights / GIB:.1f} for the weights and {logits / GIB:.1f} for the logits of {block} tokens "
            f"over a vocabulary of {vocabulary}; lower --block, close other programs, or judge without --teacher"
        )


def _answers(
    models: Mapping[str, Any],
    tokenizer: Any,
    name: str,
    items: list[Item],
    longest: int | None,
    say: Say,
    track: Track,
) -> tuple[dict[str, Any], Compared | None]:
    """Return the figures of one task, and what tells how much of a teacher's a student keeps."""
    task, sheet = TASKS[name], ask(items, tokenizer, longest)
    if sheet.cut:
        say(f"{task.title}: {sheet.cut} contexts exceed the model's {longest} positions: their beginning is cut")
    if any(item.context is None for item in items):
        say(f"{task.title}: every sentence follows {tokenizer.convert_ids_to_tokens(first_token(tokenizer))!r}")
    found: dict[str, Any] = {
        "questions": len(items),
        "cut": sheet.cut,
        "chance": sum(item.chance for item in items) / len(items),
    }
    rights = {}
    for model in models:
        nats_A = log_likelihoods(models[model], sheet.asked, track=track, what=f"{model}: {task.title}")
        rights[model] = {figure: right(items, nats_A, figure) for figure in task.figures}
        found[model] = {
            figure: {"value": right_N.mean().item(), "standard_error": standard_error(right_N)}
            for figure, right_N in rights[model].items()
        }
        groups = by_group(items, rights[model][task.figures[0]])
        found[model] |= {"groups": groups} if groups else {}
    if TEACHER not in rights:
        return found, None
    both = Compared.of(items, *(rights[model][task.figures[0]] for model in (MODEL, TEACHER)))
    if not both.known:
        say(f"{task.title}: the teacher is not above chance beyond the noise, so that there is nothing to keep")
        return found, None
    return found | {"kept": both.kept(), "kept_interval": asdict(kept_interval([both]))}, both


def _text_figures(models: Mapping[str, Any], found: list[list[int]], track: Track) -> dict[str, Any]:
    """Return the figures of the text."""
    teacher = TEACHER if TEACHER in models else None
    readings = read(models, found, teacher=teacher, track=track, what="reading the text")
    positions_N = readings[MODEL].positions_N
    told: dict[str, Any] = {"blocks": len(found), "positions": int(positions_N.sum())}
    told |= {name: _perplexity(reading) for name, reading in readings.items()}
    if teacher is not None:
        model, guide = readings[MODEL], readings[TEACHER]
        interval = metrics.perplexity_ratio_interval(guide.nats_N, model.nats_N, positions_N)
        told |= {
            "kept": told[TEACHER]["perplexity"] / told[MODEL]["perplexity"],
            "kept_interval": asdict(interval),
        }
        for key, sums_N in (("divergence", model.divergence_N), ("agreement", model.agreed_N)):
            told[key] = (sums_N.sum() / positions_N.sum()).item()
            told[f"{key}_interval"] = asdict(metrics.mean_ratio_interval(sums_N, positions_N))
    return told


def _perplexity(reading: Reading) -> dict[str, Any]:
    interval = metrics.perplexity_interval(reading.nats_N, reading.positions_N)
    return {"perplexity": metrics.perplexity(reading.nats_N, reading.positions_N), "interval": asdict(interval)}
