"""Stage 1: the teacher, the texts it is distilled on, and what it is judged by.

Reads the teacher from wherever it lives, a corpus, and a folder of labelled sets if one is named. Everything
is read and checked before anything is written.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasks import corpus
from tasks.stage import StageRun, main

# What a teacher's folder needs to be opened again, and how its authors pool; not its README, ONNX files, ...
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
    "1_Pooling/config.json",
)
EVALUATION_SHARE = 0.1  # of a corpus that is not its own benchmark, held out all the same


def run(stage: StageRun) -> None:
    data = stage.params.data
    described = check_teacher(stage)
    folder = corpus.read_folder(stage.root / data.folder) if data.folder else corpus.LabelledFolder([])
    splits, benchmark = divide(stage, folder)

    with stage.out("data/teacher") as out:
        copy_teacher(stage, out)
    with stage.out("data/corpus") as out:
        for name in ("train", "calibration", "evaluation"):
            corpus.write_jsonl(out / f"{name}.jsonl", ({"text": text} for text in getattr(splits, name)))
    with stage.out("data/benchmarks") as out:
        corpus.write_jsonl(out / "retrieval.jsonl", map(asdict, splits.pairs))
        if folder.stsb:
            corpus.write_jsonl(out / "sts" / "stsb.jsonl", map(asdict, folder.stsb))
        for name, sets in folder.classification.items():
            for part, rows in zip(("train", "dev"), sets, strict=True):
                corpus.write_jsonl(out / "classification" / name / f"{part}.jsonl", map(asdict, rows))

    stage.write_json(
        "metrics/prepare.json",
        {
            "teacher": described,
            "texts": {name: len(getattr(splits, name)) for name in ("train", "calibration", "evaluation")},
            "characters": sum(map(len, splits.train)),
            "joined_from_folder": len(folder.texts),
            "retrieval": {"pairs": len(splits.pairs), "from": benchmark},
            "stsb_pairs": len(folder.stsb),
            "classification": {
                name: {"train": len(train), "dev": len(dev)} for name, (train, dev) in folder.classification.items()
            },
        },
    )
    stage.say(
        f"{len(splits.train)} texts to train on, {len(splits.calibration)} for calibration, "
        f"{len(splits.pairs)} retrieval pairs from {benchmark}"
    )


def check_teacher(stage: StageRun) -> dict[str, Any]:
    """Opens the teacher once, so that a bad one is reported before any work; says what it is."""
    from ffn2moe.dense import FAMILIES, activation_of, family_of, ffn_layers, load_dense, read_ffn

    settings = stage.params.teacher
    model, tokenizer = load_dense(teacher_source(stage), settings.revision)
    if "embedding" not in family_of(model).heads:
        encoders = ", ".join(sorted(name for name, family in FAMILIES.items() if "embedding" in family.heads))
        raise ValueError(
            f"teacher.source = {settings.source} is a {model.config.model_type} model, which makes no "
            f"embeddings; the pipeline takes encoders: {encoders}"
        )
    # RoBERTa's positions start after its padding token, so two of the table are never reached.
    offset = model.config.pad_token_id + 1 if family_of(model).name in _OFFSET_POSITIONS else 0
    positions = model.config.max_position_embeddings - offset
    if settings.max_length > positions:
        raise ValueError(
            f"teacher.max_length = {settings.max_length} is more than the {positions} positions of "
            f"{settings.source}; lower it"
        )
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {settings.source} knows {len(tokenizer)} tokens and its model "
            f"{model.config.vocab_size}: they belong to different models; restore the folder"
        )
    ffn = read_ffn(model, 0)
    return {
        "family": family_of(model).name,
        "layers": len(ffn_layers(model)),
        "width": ffn.w_in_FD.shape[1],
        "ffn_width": ffn.ffn_width,
        "activation": activation_of(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert", "mpnet"}


def teacher_source(stage: StageRun) -> str:
    """The teacher as `load_dense` takes it: a path is relative to the workspace."""
    source = stage.params.teacher.source
    path = stage.root / Path(source).expanduser()
    return str(path) if path.is_dir() else source


def copy_teacher(stage: StageRun, out: Path) -> None:
    """The teacher's own files, byte for byte."""
    from ffn2moe.dense import resolve_source

    kind, folder = resolve_source(teacher_source(stage))
    if kind == "hub":
        from huggingface_hub import snapshot_download

        settings = stage.params.teacher
        folder = Path(
            snapshot_download(settings.source, revision=settings.revision, allow_patterns=list(TEACHER_FILES))
        )
    assert folder is not None
    for pattern in TEACHER_FILES:
        for file in sorted(folder.glob(pattern)):
            target = out / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def divide(stage: StageRun, folder: corpus.LabelledFolder) -> tuple[corpus.Splits, str]:
    """The splits, and where the retrieval pairs come from: the corpus itself, where it has enough to give."""
    data, workers = stage.params.data, stage.params.compute.threads
    is_docstrings = data.corpus == "docstrings"
    source = data.corpus
    if not is_docstrings and not source.startswith("datasets:"):
        source = str(stage.root / Path(source).expanduser())
    texts = corpus.read_corpus(source, data.text_column, workers=workers, track=stage.track)
    judged = folder.judged()

    wanted = data.evaluation_pairs if is_docstrings else corpus.own_pairs(texts, data.evaluation_pairs)
    pairs = corpus.benchmark_pairs(texts, wanted, judged)
    evaluation_texts = 0
    if is_docstrings and len(pairs) < wanted:
        raise ValueError(f"data.evaluation_pairs = {wanted}, but the docstrings give only {len(pairs)}; lower it")
    own = is_docstrings or len(pairs) >= min(data.evaluation_pairs, corpus.FEWEST_OWN_PAIRS)
    if not own:
        stage.say(
            f"{data.corpus} has too few texts with a first line or sentence and a rest to be its own "
            "retrieval benchmark; docstrings are used instead"
        )
        library = corpus.docstrings(workers=workers, track=stage.track)
        pairs = corpus.benchmark_pairs(library, data.evaluation_pairs, [*judged, *texts])
        evaluation_texts = min(data.evaluation_pairs, int(EVALUATION_SHARE * len(texts)))
    splits = corpus.split(
        texts,
        pairs=pairs,
        calibration_texts=data.calibration_texts,
        max_texts=data.max_texts,
        joined=folder.texts,
        judged=judged,
        evaluation_texts=evaluation_texts,
    )
    return splits, "the corpus" if own and not is_docstrings else "docstrings"


if __name__ == "__main__":
    main("prepare", run)
