"""Stage 1: write the teacher, the texts to distil on, and the texts to judge by.

It reads the teacher, a corpus, and a folder of labelled sets if one is named, and checks everything before it writes.
Texts for a model with logits are written with their token ids, and with a seq2seq teacher's answers, so that later
stages do not depend on tokenising or generating them again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffn2moe.choices import HEADS, PROBLEMS, problem_of
from ffn2moe.progress import silent
from tasks import benchmark_texts, corpus, pairing
from tasks.check import check, corpus_source, teacher_source
from tasks.language_sets import LanguageSets, of_folder
from tasks.length import text_length
from tasks.stage import StageRun, main

if TYPE_CHECKING:
    from ffn2moe.data.pairs import Pair
    from ffn2moe.spec import Head

# The files that open a teacher; those of a sentence encoder come beside them. README, ONNX files and others stay.
TEACHER_FILES = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",  # SentencePiece
    "sentence_*_config.json",
    "generation_config.json",
    "chat_template*",
)
EVALUATION_SHARE = 0.1  # of a corpus that is not its own benchmark: held out too
SPLITS = ("train", "calibration", "evaluation")
ANSWERED_AT_ONCE = 64  # texts that a seq2seq teacher answers together
MOST_WRITTEN_AT_ONCE = 256  # texts that a language model writes together
CACHED_NUMBERS = 2**28  # largest cache of a language model that writes: 1 GiB


@dataclass(frozen=True)
class Teacher:
    """The opened teacher: model, tokenizer, head, and a summary for metrics/prepare.json."""

    folder: Path  # with its weights as float safetensors
    model: Any
    tokenizer: Any
    head: Head
    length: int  # tokens that texts are cut to
    pairs: bool  # whether it reads pairs of texts
    summary: dict[str, Any]


def run(stage: StageRun) -> None:
    """Write data/teacher, data/corpus, data/benchmarks and metrics/prepare.json."""
    data = stage.params.data
    check(stage.params, stage.root, silent)
    teacher = open_teacher(stage)
    questions = language_sets_of(stage, teacher)
    folder = corpus.LabelledFolder([])
    if data.folder:
        folder = corpus.read_folder(
            stage.root / data.folder, language_model=teacher.head == "causal", required=not questions
        )
        folder = replace(folder, held_out=[*folder.held_out, *questions.judged()])
        if not data.learn_from_folder:
            folder = replace(folder, texts=[])
    sources: Mapping[str, str] = folder.sources
    if teacher.head == "embedding":
        splits, benchmark, sources = split_corpus(stage, folder, teacher.tokenizer)
        rows: dict[str, list[dict[str, Any]]] = {
            name: [{"text": text} for text in getattr(splits, name)] for name in SPLITS
        }
        sets = {name: [list(map(asdict, part)) for part in both] for name, both in folder.classification.items()}
    else:
        splits, rows = rows_for_logits(stage, folder, teacher)
        sets = labelled_sets(stage, folder, teacher)
    for name in SPLITS:
        for row, text in zip(rows[name], getattr(splits, name), strict=True):
            row["source"] = sources.get(text, corpus_name(data.corpus))

    with stage.out("data/teacher") as out:
        copy_teacher(teacher, out)
    with stage.out("data/corpus") as out:
        for name in SPLITS:
            corpus.write_jsonl(out / f"{name}.jsonl", rows[name])
    with stage.out("data/benchmarks") as out:
        if teacher.head == "embedding":
            corpus.write_jsonl(out / "retrieval.jsonl", map(asdict, splits.pairs))
            if folder.stsb:
                corpus.write_jsonl(out / "sts" / "stsb.jsonl", map(asdict, folder.stsb))
        else:  # a folder of DVC should not be empty
            about = {name: {"train": len(train), "dev": len(dev)} for name, (train, dev) in sets.items()}
            text = json.dumps({"head": teacher.head, "labelled_sets": about}, indent=2, sort_keys=True)
            (out / "about.json").write_text(text + "\n", encoding="utf-8")
            questions.write(out / "language")
        for name, parts in sets.items():
            for part, found in zip(("train", "dev"), parts, strict=True):
                corpus.write_jsonl(out / "classification" / name / f"{part}.jsonl", found)
        if teacher.head == "embedding":
            benchmark_texts.embed(stage, out, teacher.model, teacher.tokenizer, teacher.length)

    figures: dict[str, Any] = {
        "teacher": teacher.summary,
        "texts": {name: len(rows[name]) for name in SPLITS},
        "characters": sum(map(len, splits.train)),
        "joined_from_folder": len(folder.texts),
        "classification": {name: {"train": len(train), "dev": len(dev)} for name, (train, dev) in sets.items()},
    }
    what = "pairs of texts" if teacher.pairs else "texts"
    counts = f"{len(splits.train)} {what} to train on, {len(splits.calibration)} for calibration"
    if teacher.head == "embedding":
        figures |= {"retrieval": {"pairs": len(splits.pairs), "from": benchmark}, "stsb_pairs": len(folder.stsb)}
        stage.say(f"{counts}, {len(splits.pairs)} retrieval pairs from {benchmark}")
    else:
        figures["tokens"] = {name: sum(len(row["ids"]) for row in rows[name]) for name in SPLITS}
        stage.say(f"{counts}, {len(splits.evaluation)} to judge by; {figures['tokens']['train']} tokens to train on")
    stage.write_json("metrics/prepare.json", figures)


def open_teacher(stage: StageRun) -> Teacher:
    """Open the teacher, which `check` has found fit."""
    from ffn2moe.dense.config import head_of
    from ffn2moe.dense.load import load_dense
    from ffn2moe.dense.locate import activation_of, family_of, ffn_layers, read_ffn
    from ffn2moe.dense.plain import plain_folder

    settings = stage.params.teacher
    folder = plain_folder(teacher_source(stage.params, stage.root), settings.revision, say=stage.say)
    asked = None if settings.head == "auto" else settings.head
    model, tokenizer = load_dense(str(folder), head=asked)
    head = asked or head_of(model.config, folder)
    length = text_length(stage, folder, model, head, tokenizer)
    if settings.max_length == "auto":
        stage.say(f"teacher.max_length = auto: texts are cut to {length} tokens")
    reads_two = reads_pairs_of_texts(stage, model, head)
    ffn = read_ffn(model, 0)
    summary = {
        "family": family_of(model).name,
        "layers": len(ffn_layers(model)),
        "width": ffn.w_in_FD.shape[1],
        "ffn_width": ffn.ffn_width,
        "activation": activation_of(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if reads_two:
        summary["pairs"] = True
    told = summary if head == "embedding" else summary | {"head": head}
    return Teacher(folder, model, tokenizer, head, length, reads_two, told)


def reads_pairs_of_texts(stage: StageRun, model: Any, head: Head) -> bool:
    """Return whether a teacher reads pairs of texts: `check` has refused two columns for another head."""
    from ffn2moe.dense.cross_encoder import reads_pairs

    return head == "classification" and (pairing.names_pair(stage.params.data.text_column) or reads_pairs(model.config))


def copy_teacher(teacher: Teacher, out: Path) -> None:
    """Copy the teacher's files to `out`, byte for byte, with what sentence-transformers keeps beside its model.

    These are the modules that make embeddings behind it, or the activation of a cross-encoder.
    """
    from ffn2moe.dense.cross_encoder import FILE
    from ffn2moe.dense.sentence_folder import copy_modules

    folder = teacher.folder
    for pattern in TEACHER_FILES:
        for file in sorted(folder.glob(pattern)):
            target = out / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    if teacher.head == "embedding":
        copy_modules(folder, out)
    if HEADS[teacher.head].classifies and (folder / FILE).is_file():
        shutil.copyfile(folder / FILE, out / FILE)


def corpus_name(source: str) -> str:
    """Return the source name of a corpus's texts: a file's name without its ending, else the name as it is written.

    The first lines of the general corpus are those of docstrings.
    """
    if source == "general":
        return "docstrings"
    return Path(source).stem if Path(source).suffix else source


def split_corpus(
    stage: StageRun, folder: corpus.LabelledFolder, tokenizer: Any
) -> tuple[corpus.Splits, str, Mapping[str, str]]:
    """Return the splits, the source of the retrieval pairs, and where texts come from.

    The corpus itself gives the pairs if it has enough of them, else docstrings do.
    """
    data, workers = stage.params.data, stage.params.compute.threads
    is_docstrings = data.corpus in corpus.INSTALLED
    source = "docstrings" if is_docstrings else corpus_source(stage.params, stage.root)
    texts = corpus.read_corpus(source, data.text_column, workers=workers, track=stage.track)
    judged = [*folder.judged(), *corpus.general_sentences()]

    wanted = data.evaluation_pairs if is_docstrings else corpus.own_pairs(texts, data.evaluation_pairs)
    pairs = corpus.benchmark_pairs(texts, wanted, judged)
    evaluation_texts = 0
    if is_docstrings and len(pairs) < wanted:
        raise ValueError(f"data.evaluation_pairs = {wanted}, but the docstrings give only {len(pairs)}; lower it")
    own = is_docstrings or len(pairs) >= min(data.evaluation_pairs, corpus.FEWEST_OWN_PAIRS)
    if not own:
        stage.say(
            f"{data.corpus} cannot be its own retrieval benchmark, because too few of its texts have a first line or "
            "sentence and a rest; using docstrings instead"
        )
        library = corpus.docstrings(workers=workers, track=stage.track)
        pairs = corpus.benchmark_pairs(library, data.evaluation_pairs, [*judged, *texts])
        evaluation_texts = min(data.evaluation_pairs, int(EVALUATION_SHARE * len(texts)))
    if data.corpus == "general":
        learnt, folder = general_texts(stage, folder, [text for text in texts if text not in pairs], tokenizer)
        texts = [*learnt, *pairs]
    splits = corpus.split(
        texts,
        pairs=pairs,
        calibration_texts=data.calibration_texts,
        max_texts=data.max_texts,
        joined=folder.texts,
        judged=judged,
        evaluation_texts=evaluation_texts,
    )
    return splits, "the corpus" if own and not is_docstrings else "docstrings", folder.sources


def general_texts(
    stage: StageRun, folder: corpus.LabelledFolder, docstrings: Sequence[str], tokenizer: Any
) -> tuple[list[str], corpus.LabelledFolder]:
    """Return docstrings to learn from, and the folder with the other texts of the general corpus beside its own.

    They are made of `docstrings`, which hold none of the retrieval benchmark.
    """
    from ffn2moe.data.general import mixed, words_of

    kinds = mixed(docstrings, words_of(tokenizer), max(stage.params.data.max_texts - len(folder.texts), 0))
    others = [text for text, kind in kinds.items() if kind != "docstrings"]
    learnt = [text for text, kind in kinds.items() if kind == "docstrings"]
    return learnt, replace(folder, texts=[*folder.texts, *others], sources={**kinds, **folder.sources})


def rows_for_logits(
    stage: StageRun, folder: corpus.LabelledFolder, teacher: Teacher
) -> tuple[corpus.Splits, dict[str, list[dict[str, Any]]]]:
    """Return the splits for a model with logits, and the rows of each: texts or pairs with their ids."""
    from ffn2moe.data.general import words_of

    data = stage.params.data
    joined: dict[str, Pair] = {}  # a pair of two columns, under its two texts as one
    written: dict[str, list[int]] = {}  # a text that the teacher wrote -> its ids

    def read(source: str) -> list[str]:
        if pairing.names_pair(data.text_column):
            found = pairing.read_joined(source, data.text_column)
            joined.update(found)
            return list(found)
        words = () if HEADS[teacher.head].generates else words_of(teacher.tokenizer)
        return corpus.read_corpus(
            source,
            data.text_column,
            words=words,
            count=data.max_texts,
            workers=stage.params.compute.threads,
            track=stage.track,
        )

    if data.corpus == "generated":
        written = write_texts(stage, teacher)
        texts = list(written)
    else:
        texts = read(corpus_source(stage.params, stage.root))
    judged = read(str(stage.root / Path(data.evaluation).expanduser())) if data.evaluation is not None else []
    splits = split_for_logits(stage, folder, texts, judged)
    rows = {}
    for name in SPLITS:
        part = getattr(splits, name)
        given = pairing.pairs_of_split(part, joined, stage.params.seed) if teacher.pairs else part
        rows[name] = tokenised(stage, teacher, given, written)
    if teacher.head == "seq2seq":
        require_varied_answers(rows["evaluation"])
    return splits, rows


def split_for_logits(
    stage: StageRun, folder: corpus.LabelledFolder, texts: Sequence[str], judged: Sequence[str]
) -> corpus.Splits:
    """Return the splits of texts; those to judge by are `judged`, or else a part of the texts."""
    data = stage.params.data
    held_out = min(data.evaluation_pairs, max(1, int(EVALUATION_SHARE * len(texts))))
    splits = corpus.split(
        texts,
        pairs={},
        calibration_texts=data.calibration_texts,
        max_texts=data.max_texts,
        joined=folder.texts,
        judged=[*judged, *folder.judged()],
        evaluation_texts=0 if judged else held_out,
        first_lines=False,
    )
    if judged:
        return corpus.Splits(splits.train, splits.calibration, list(judged[: data.evaluation_pairs]), [])
    return splits


def require_varied_answers(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError where a seq2seq teacher answers all texts to judge by with one token: nothing tells students."""
    said = {token for row in rows for token in row["decoder_ids"][1:]}
    if len(said) < 2:
        raise ValueError(
            f"the teacher answers all {len(rows)} held-out texts with one and the same token, so that no figure can "
            "tell a right student from one that always writes it: name texts that it answers in different ways in "
            "data.corpus or data.evaluation"
        )


def write_texts(stage: StageRun, teacher: Teacher) -> dict[str, list[int]]:
    """Return texts that the teacher writes, text -> ids, without repeats and empty texts."""
    from ffn2moe.data.generate import sample_tokens
    from ffn2moe.numerics import bf16_supported, choose_device

    params = stage.params
    device = choose_device(params.compute.device)
    teacher.model.to(device)
    bos = teacher.tokenizer.bos_token_id
    cached = 2 * teacher.summary["layers"] * teacher.summary["width"] * teacher.length
    drawn = sample_tokens(
        teacher.model,
        count=corpus.texts_to_write(params.data.max_texts, teacher.length),
        length=teacher.length,
        seed=params.seed,
        bos=teacher.model.generation_config.bos_token_id if bos is None else bos,
        batch=max(1, min(MOST_WRITTEN_AT_ONCE, CACHED_NUMBERS // cached)),
        bf16=bf16_supported(device) if params.compute.bf16 == "auto" else params.compute.bf16 == "on",
        track=stage.track,
    )
    texts = {teacher.tokenizer.decode(ids, skip_special_tokens=True): ids for ids in drawn}
    return {text: ids for text, ids in texts.items() if text.strip()}


def tokenised(
    stage: StageRun, teacher: Teacher, texts: Sequence[str | Pair], written: dict[str, list[int]]
) -> list[dict[str, Any]]:
    """Return each text or pair with its ids and a seq2seq teacher's answer; texts of a causal model are not truncated.

    Of a pair that is too long the longer text loses tokens first.
    """
    from ffn2moe.data.generate import greedy_answers
    from ffn2moe.numerics import choose_device

    length = teacher.length
    limit: dict[str, Any] = {} if teacher.head == "causal" else {"truncation": True, "max_length": length}
    if teacher.pairs:
        return tokenised_pairs(teacher, texts, limit)
    new = [text for text in texts if text not in written]
    found = dict(zip(new, teacher.tokenizer(new, **limit)["input_ids"] if new else [], strict=True)) | written
    rows: list[dict[str, Any]] = [{"text": text, "ids": list(found[text])} for text in texts]
    if teacher.head == "seq2seq":
        answers = greedy_answers(
            teacher.model.to(choose_device(stage.params.compute.device)),
            [row["ids"] for row in rows],
            length=length,
            batch=ANSWERED_AT_ONCE,
            pad_id=teacher.tokenizer.pad_token_id or 0,
            track=stage.track,
        )
        for row, ids in zip(rows, answers, strict=True):
            row["decoder_ids"] = ids
    return rows


def tokenised_pairs(teacher: Teacher, texts: Sequence[Any], limit: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each pair with its ids and, where the teacher tells its two texts apart, the text of each token."""
    from ffn2moe.dense.config import takes_token_types

    first_N, second_N = map(list, zip(*texts, strict=True))
    found = teacher.tokenizer(first_N, second_N, **limit)
    rows = [
        {"text": first, "pair": second, "ids": ids}
        for first, second, ids in zip(first_N, second_N, found["input_ids"], strict=True)
    ]
    if takes_token_types(teacher.model) and "token_type_ids" in found:
        for row, type_ids in zip(rows, found["token_type_ids"], strict=True):
            row["type_ids"] = type_ids
    return rows


def language_sets_of(stage: StageRun, teacher: Teacher) -> LanguageSets:
    """Return what judges a language model; nothing for another. ValueError for what its tokenizer cannot ask."""
    from ffn2moe.dense.families import positions
    from ffn2moe.judges.asked import ask
    from ffn2moe.judges.items import TASKS

    folder = stage.params.data.folder
    if folder is None or teacher.head != "causal":
        return LanguageSets()
    sets = of_folder(stage.root / folder)
    for name, items in sets.questions.items():
        cut = ask(items, teacher.tokenizer, positions(teacher.model.config)).cut
        stage.say(f"{len(items)} questions of {TASKS[name].title}" + (f"; {cut} contexts are cut" if cut else ""))
    return sets


def labelled_sets(
    stage: StageRun, folder: corpus.LabelledFolder, teacher: Teacher
) -> dict[str, list[list[dict[str, Any]]]]:
    """Return the labelled sets whose labels are the classifier's classes, with ids, and labels as class indices."""
    if teacher.head != "classification":
        return {}
    problem = PROBLEMS[problem_of(teacher.model.config)]
    if folder.classification and (teacher.pairs or not problem.chooses):
        why = "it reads pairs" if teacher.pairs else f"it gives {problem.gives}"
        stage.say(f"{', '.join(folder.classification)}: not used to judge {stage.params.teacher.source}, because {why}")
        return {}
    sets = {}
    for name, both in folder.classification.items():
        place = classes_of({row.label for part in both for row in part}, teacher.model.config)
        if place is None:
            stage.say(f"{name} is not used: its labels are not the classes of {stage.params.teacher.source}")
            continue
        sets[name] = [
            [
                row | {"label": place[example.label]}
                for row, example in zip(
                    tokenised(stage, teacher, [example.text for example in part], {}), part, strict=True
                )
            ]
            for part in both
        ]
    return sets


def classes_of(labels: Iterable[str], config: Any) -> dict[str, int] | None:
    """Return label -> class index, by name or, where labels are numbers, by number; None where they do not fit."""
    labels = set(labels)
    names = {str(name).casefold(): int(index) for name, index in config.label2id.items()}
    if all(label.casefold() in names for label in labels):
        return {label: names[label.casefold()] for label in labels}
    if all(label.isdigit() and int(label) < config.num_labels for label in labels):
        return {label: int(label) for label in labels}
    return None


if __name__ == "__main__":
    main("prepare", run)
