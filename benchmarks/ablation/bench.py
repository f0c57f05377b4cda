"""The parts that all cells of a grid share: the model, its texts, the inputs of its FFNs, and the judges."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.ablation.grid import Budget, write_json
from ffn2moe import metrics
from ffn2moe.choices import HEADS, problem_of
from ffn2moe.data.batches import Batch, Batches
from ffn2moe.data.encode import encode
from ffn2moe.decompose.inputs import layer_inputs, texts_of
from ffn2moe.dense.config import head_of
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import ffn_layers
from ffn2moe.moe.describe import spec_of
from ffn2moe.numerics import bf16_supported
from ffn2moe.spec import Head, MoESpec
from tasks import corpus, prepare
from tasks.benchmark_texts import Benchmarks
from tasks.judge_embeddings import Judged
from tasks.judge_logits import compare
from tasks.params import load_params
from tasks.stage import StageRun
from tasks.tokens import Tokens, read_tokens

PARAMS = Path(__file__).resolve().parents[2] / "params.yaml"
# Texts of a labelled set that a probe is fitted on and judged on, the same for every model. The whole sets would take
# as long as everything else together.
PROBE_TRAIN, PROBE_DEV = 400, 600
JUDGED_AT_ONCE = 128  # texts; with few, each expert gets too few tokens for an efficient product
CALIBRATED_AT_ONCE = 64


@dataclass(frozen=True)
class Setup:
    """The model, data, budget and machine settings of a grid, small enough to send to another process."""

    workspace: Path  # data/teacher, data/corpus and data/benchmarks, from the stage `prepare`
    cache: Path
    budget: Budget
    threads: int
    device: str
    name: str  # name of the model, for people


def prepared(settings: Sequence[str], root: Path) -> Path:
    """Return a workspace for these settings of params.yaml; the pipeline's first stage makes it if it is missing."""
    digest = hashlib.sha256("\n".join(settings).encode()).hexdigest()[:12]
    workspace = root / f"prepared-{digest}"
    if not (workspace / "metrics/prepare.json").is_file():
        workspace.mkdir(parents=True, exist_ok=True)
        prepare.run(StageRun("prepare", load_params(PARAMS, settings), workspace))
    return workspace


class SharedParts:
    """The model, its texts and the inputs of its FFNs, each computed once and kept in the cache."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.budget = setup.budget
        self._wanted = {  # kind of `inputs` -> a split of the corpus, and its number of tokens
            "calibration": ("calibration", setup.budget.calibration_tokens),
            "router": ("train", setup.budget.router_tokens),
        }
        self._text_of_token: dict[str, Tensor] = {}
        self.bf16 = bf16_supported(setup.device)
        torch.set_num_threads(setup.threads)

    def model(self) -> Any:
        """Return a fresh copy of the dense model."""
        return load_dense(str(self.setup.workspace / "data/teacher"))[0]

    @cached_property
    def teacher(self) -> Any:
        return self.model()

    @cached_property
    def tokenizer(self) -> Any:
        return load_dense(str(self.setup.workspace / "data/teacher"))[1]

    @cached_property
    def head(self) -> Head:
        return head_of(self.teacher.config, self.setup.workspace / "data/teacher")

    @cached_property
    def problem(self) -> str | None:
        return problem_of(self.teacher.config) if HEADS[self.head].classifies else None

    @cached_property
    def num_layers(self) -> int:
        return len(ffn_layers(self.teacher))

    @cached_property
    def dense_spec(self) -> MoESpec:
        """Return the spec of a mixture of one expert: the dense model, for the count of its FLOPs."""
        return spec_of(
            self.teacher,
            head=self.head,
            num_experts=1,
            num_active=1,
            partition="contiguous",
            teacher=self.setup.workspace.name,
            max_length=self.budget.max_length,
        )

    @cached_property
    def data(self) -> str:
        """Return a digest of the model and the texts: of all files that the grid reads."""
        digest = hashlib.sha256()
        for path in sorted((self.setup.workspace / "data").rglob("*")):
            if path.is_file() and path.suffix in (".safetensors", ".jsonl", ".json", ".txt"):
                digest.update(path.relative_to(self.setup.workspace).as_posix().encode())
                with path.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def tokens(self, split: str, *, packed: bool = True) -> Tokens:
        path = self.setup.workspace / f"data/corpus/{split}.jsonl"
        return read_tokens(path, self.head, self.tokenizer, self.budget.max_length, packed=packed)

    @cached_property
    def _train(self) -> Tokens:
        return self.tokens("train")

    def batches(self, seed: int) -> Batches:
        """Return the batches to distil on, in the same order for every method."""
        return self._train.shuffled(batch_tokens=self.budget.batch_tokens, seed=seed)

    def calibration(self) -> Iterator[Batch]:
        """Return the texts of the statistics, in order."""
        return self.tokens("calibration").in_order(CALIBRATED_AT_ONCE)

    def inputs(self, kind: str, layer: int) -> Tensor:
        """Return the inputs of a layer's dense FFN, [T, D], on the texts for `calibration` or for the `router`."""
        with safe_open(self.kept_inputs, framework="pt") as file:
            return file.get_tensor(f"{kind}.{layer}")

    def held_out(self, layer: int) -> Tensor:
        """Return the inputs that errors are measured on, [T, D]: calibration texts, which train no router."""
        return self.inputs("calibration", layer)[: self.budget.held_out_tokens]

    @cached_property
    def kept_inputs(self) -> Path:
        """Return the file that holds all inputs."""
        digest = hashlib.sha256(repr((self.data, self.budget.max_length, self._wanted)).encode()).hexdigest()[:12]
        path = self.setup.cache / f"inputs-{digest}.safetensors"
        if path.is_file():
            return path
        tensors: dict[str, Tensor] = {}
        for kind, (split, most) in self._wanted.items():
            batches = self.tokens(split).in_order(CALIBRATED_AT_ONCE)
            for layer, x_TD in enumerate(
                layer_inputs(self.teacher, batches, max_tokens=most, device=self.setup.device)
            ):
                tensors[f"{kind}.{layer}"] = x_TD.contiguous()
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".partial")
        save_file(tensors, fresh)
        fresh.replace(path)
        return path

    def text_of_token(self, kind: str) -> Tensor:
        """Return the text of each token of `inputs`, [T], counted from 0."""
        if kind not in self._text_of_token:
            split, most = self._wanted[kind]
            self._text_of_token[kind] = texts_of(self.tokens(split).in_order(CALIBRATED_AT_ONCE), most)
        return self._text_of_token[kind]


class Bench(SharedParts):
    """The shared parts and the judges of a grid."""

    def judge(self, model: Any) -> dict[str, float]:
        """Return the figures of a model, by name."""
        if self.head == "embedding":
            return self._judge_embeddings(model)
        params = load_params(PARAMS, [f"evaluate.batch_texts={JUDGED_AT_ONCE}"])
        stage = StageRun("ablation", params, self.setup.workspace)
        models = {"teacher": self.teacher.to(self.setup.device), "model": model.to(self.setup.device).eval()}
        judged = compare(stage, models, self._judged_tokens)
        found = judged["model"]
        assert found.nats_N is not None
        return {
            "perplexity": metrics.perplexity(found.nats_N, found.positions_N),
            "divergence": (found.divergence_N.sum() / found.positions_N.sum()).item(),
            "agreement": (found.choice_T == judged["teacher"].choice_T).double().mean().item(),
        }

    @cached_property
    def _judged_tokens(self) -> Tokens:
        tokens = self.tokens("evaluation", packed=False)
        return replace(tokens, ids=[ids for ids in tokens.ids if len(ids) > 1])

    @cached_property
    def benchmarks(self) -> Benchmarks:
        """Return the pipeline's benchmarks, with a fixed part of each labelled set."""
        found = Benchmarks.read(self.setup.workspace / "data/benchmarks")
        classification = {
            name: (_part(train, PROBE_TRAIN), _part(dev, PROBE_DEV))
            for name, (train, dev) in found.classification.items()
        }
        return replace(found, classification=classification)

    @cached_property
    def _texts(self) -> list[str]:
        return self.benchmarks.texts()

    def _judge_embeddings(self, model: Any) -> dict[str, float]:
        with self.autocast():
            embeddings_ND = encode(
                model,
                self.tokenizer,
                self._texts,
                max_length=self.budget.max_length,
                batch_texts=JUDGED_AT_ONCE,
                device=self.setup.device,
            )
        embeddings_ND = metrics.comparable(embeddings_ND, self.dense_spec.sentence)
        figures = Judged(self.benchmarks, self._texts, embeddings_ND, seed=0).figures
        found = {"retrieval": figures["retrieval"]["ndcg_at_10"]}
        if "stsb" in figures:
            found["stsb"] = figures["stsb"]["spearman"]
        return found | {name: one["accuracy"] for name, one in figures.get("classification", {}).items()}

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in bfloat16 if the hardware has it: the same for every model, and three times as fast."""
        kind = torch.device(self.setup.device).type
        return torch.autocast(kind, torch.bfloat16) if self.bf16 else nullcontext()

    @cached_property
    def dense(self) -> dict[str, float]:
        """Return the teacher's own figures."""
        digest = hashlib.sha256(repr((self.data, self.budget.max_length, self.bf16)).encode()).hexdigest()[:12]
        path = self.setup.cache / f"teacher-{digest}.json"
        if not path.is_file():
            write_json(path, self.judge(self.teacher))
        return json.loads(path.read_text(encoding="utf-8"))

    def kept(self, figures: dict[str, float]) -> dict[str, float]:
        """Return each figure as a share of the teacher's, 1 if nothing is lost; a divergence has no share."""
        if self.head != "embedding":
            return {"perplexity": self.dense["perplexity"] / figures["perplexity"], "agreement": figures["agreement"]}
        return {name: figure / self.dense[name] for name, figure in figures.items()}


def _part(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return a part of a labelled set, chosen by the content of its texts."""
    ordered = sorted(rows, key=lambda row: corpus.content_hash(row["text"]))
    return random.Random(0).sample(ordered, min(count, len(ordered)))
