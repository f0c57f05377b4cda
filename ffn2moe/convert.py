"""The whole conversion in one process: a dense model in, an export and a native container out.

Made of the functions that the pipeline's stages are made of, in their order: texts, carved and routed layers,
distillation, a look at what was kept, and the forms that others open. Everything happens in a folder beside the wanted
one, which appears when it is whole; a conversion that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffn2moe import metrics
from ffn2moe.containers.container import Container
from ffn2moe.containers.fit import choose, require_fit
from ffn2moe.containers.table import CONTAINERS
from ffn2moe.containers.tensors import layer_tensors, outer_tensors
from ffn2moe.containers.write import write
from ffn2moe.conversion.settings import Settings
from ffn2moe.data.batches import Batch, Batches, BatchSource, in_order, pack
from ffn2moe.data.corpus import docstrings, read_corpus
from ffn2moe.data.generate import greedy_answers, sample_tokens
from ffn2moe.decompose.inputs import layer_inputs
from ffn2moe.decompose.layer import decompose_layer, every_expert, output_of
from ffn2moe.decompose.memory import available_memory, estimate, require_room
from ffn2moe.decompose.route import RouterSettings, route_layer
from ffn2moe.decompose.source import NotStreamable, skeleton
from ffn2moe.decompose.stream import HELD_OUT_SHARE, decompose, mixtures, outside
from ffn2moe.dense.config import head_of, positions
from ffn2moe.dense.families import FAMILIES, Family
from ffn2moe.dense.load import load_dense, pooling_of, resolve_source
from ffn2moe.dense.locate import read_ffn
from ffn2moe.dense.weights import weight_files
from ffn2moe.distill.distiller import Distiller, Training
from ffn2moe.distill.objectives import objective_for
from ffn2moe.moe import checkpoint
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.install import install_moe
from ffn2moe.moe.layer import moe_layers
from ffn2moe.numerics import bf16_supported, choose_device, pool
from ffn2moe.progress import Say, Track, silent, untracked
from ffn2moe.spec import Gate, Head, MoESpec

GENERATED_TEXTS, MOST_TEXTS = 4000, 40000  # by default: that the model writes itself, that are taken of a corpus
EVALUATION_SHARE, MOST_EVALUATED = 0.05, 200  # of the texts, held out to judge by
MOST_BATCH_TOKENS, FEWEST_BATCH_TOKENS = 4096, 512  # of a step: a small language model learns more from small ones
TOKENS_BY_WIDTH = 8  # of its width
AT_ONCE = 64  # texts that the model writes, or answers, together ...
CACHED_NUMBERS = 2**28  # ... as far as their keys and values are no more than this
CHECKED_BATCH, CALIBRATION_BATCH = 8, 16  # texts
TIMED_STEPS = 4  # of a trial, whose first is left out
CHECKPOINT_SECONDS = 60  # between the states that a stopped distillation goes on from
RATE_BY_WIDTH = 0.512  # over the model's width is the learning rate, as far as it is no more than ...
PEAK_RATE, PEAK_RATE_CAUSAL = 1e-3, 3e-3  # ... this
ROUTER = {"ridge": 1e-2, "learning_rate": 1e-2, "refit": 1e-2}
ROUTER_STEPS, ROUTER_BATCH = 200, 1024
IDENTITY_TOLERANCE = 1e-5  # of the output with K = E, relative to its largest value
SHARD_BYTES = 2**30  # of the container's files: as much is in memory while one is written
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def convert(
    source: str,
    out: str | Path,
    settings: Settings | None = None,
    *,
    say: Say = silent,
    track: Track = untracked,
) -> dict[str, Any]:
    """Convert the dense model `source` to the folder `out`, and return the manifest that is written there.

    `out` is an export that `ffn2moe.open_export` takes: a graph for each plan unless `settings.onnx` is off, the
    student as a checkpoint, and the native container in a folder of its name where one can hold the model.

    Calls `say` with a line about each step, and wraps long steps in `track` (items, how many, what is done). A
    conversion that was stopped resumes if it is called with the same source and settings. ValueError or
    FileNotFoundError with cause and remedy, before any work where that is possible.
    """
    out, settings = Path(out), settings or Settings()
    if out.exists():
        raise ValueError(f"{out} exists: remove it, or name another folder")
    conversion = _Conversion(source, out, settings, choose_device(settings.device), say, track)
    return conversion.run(settings.steps, settings.distill_minutes)


class _Conversion:
    """One conversion: the model, the settings as they turned out, and the unfinished folder."""

    def __init__(self, source: str, out: Path, settings: Settings, device: str, say: Say, track: Track) -> None:
        from transformers import AutoConfig

        self.source, self.out, self.settings = source, out, settings
        self.device, self.say, self.track = device, say, track
        self.folder = local_folder(source, settings.revision)
        self.config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        self.head: Head = settings.head or head_of(self.config)
        self.family: Family | None = FAMILIES.get(self.config.model_type)
        self.reads = self.family.reads if self.family else "text"
        self.container = self._container()
        self.gate: Gate = self._gate()
        self.max_length = self._max_length()
        self.corpus = self._corpus()
        self.work = out.with_name(f"{out.name}.partial")

    # --- what is asked, made whole ---------------------------------------------------------------------------------

    def _container(self) -> Container | None:
        settings = self.settings
        if settings.container == "none":
            return None
        if settings.container != "auto":
            found = CONTAINERS[settings.container]
            require_fit(found, self.config, shared_width=settings.shared_width)
            if settings.gate not in ("auto", found.gate):
                raise ValueError(
                    f"{found.name} weighs experts by {found.gate}, not by {settings.gate}: leave --gate out, or set "
                    "--container none"
                )
            return found
        if self.head != "causal":
            return None
        try:
            found, why = choose(self.config, shared_width=settings.shared_width)
        except ValueError as error:
            self.say(f"container: none, as {error}")
            return None
        if settings.gate not in ("auto", found.gate):
            self.say(f"container: none, as {found.name} weighs experts by {found.gate} and not by {settings.gate}")
            return None
        self.say(f"container: {why}")
        return found

    def _gate(self) -> Gate:
        if self.settings.gate != "auto":
            return self.settings.gate
        return self.container.gate if self.container else "unit"

    def _max_length(self) -> int:
        longest = positions(self.config)
        wanted = self.settings.max_length or min(256 if self.head == "causal" else 128, longest or 256)
        if longest is not None and wanted > longest:
            raise ValueError(
                f"--max-length {wanted} is longer than the context of {self.source}, {longest} tokens: lower it"
            )
        return wanted

    def _corpus(self) -> str:
        wanted = self.settings.corpus
        if self.reads == "speech":
            raise ValueError(
                f"{self.source} reads speech, and there is no reader of recordings here: the functions of "
                "ffn2moe.decompose.layer and ffn2moe.distill.distiller take batches of any kind"
            )
        if "images" in self.reads:
            if not Path(wanted).is_dir():
                raise ValueError(f"{self.source} reads images: name a folder of them with --corpus")
            return wanted
        if wanted == "auto":
            return "generated" if self.head == "causal" else "docstrings"
        if wanted == "generated" and self.head != "causal":
            raise ValueError(f"{self.source} is a {self.head} model, which writes no texts: name a corpus")
        return wanted

    @cached_property
    def teacher(self) -> Any:
        return self._loaded[0]

    @cached_property
    def reader(self) -> Any:
        """The tokenizer, or the processor. A tokenizer needs no model."""
        if self.reads != "text":
            return self._loaded[1]
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{self.source} has no tokenizer that can be read ({str(error).strip().splitlines()[0]}): put its "
                "tokenizer.json beside config.json"
            ) from None

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return load_dense(str(self.folder), head=self.head)

    # --- the work --------------------------------------------------------------------------------------------------

    def run(self, steps: int | None, minutes: float) -> dict[str, Any]:
        self._preflight(distilled=steps != 0)
        self._begin()
        data = self._data()
        self._route(data)
        spec = checkpoint.load_spec(self.work / "routed")
        quality: dict[str, Any] = {}
        more: dict[str, Any] = {"quality": quality, "distillation": {"steps": 0}, "data": data.described}
        if steps == 0 and not self.settings.onnx and not self._fits():
            self.say("teacher and student do not fit in memory together, so what was kept is not measured")
            return self._write(None, spec, more)
        student = checkpoint.load(self.work / "routed")
        quality["routed"] = judge(self.teacher, student, data.evaluation, spec, self.device)
        self.say(f"routed, nothing trained: {summary(quality['routed'])}")
        more["distillation"] = self._distill(student, spec, data, steps, minutes)
        if more["distillation"]["steps"]:
            quality["distilled"] = judge(self.teacher, student, data.evaluation, spec, self.device)
            self.say(f"distilled: {summary(quality['distilled'])}")
        for model in (self.teacher, student):
            model.to("cpu")
        return self._write(student, spec, more)

    def _fits(self) -> bool:
        """Whether teacher and student can be in memory together, as far as the system says."""
        available = available_memory()
        return available is None or 2 * 4 * self._parameters() < available

    def _parameters(self) -> int:
        """How many weights the source has, from the headers of its files."""
        from safetensors import safe_open

        total = 0
        for path in set(weight_files(self.folder).values()):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    total += torch.Size(file.get_slice(name).get_shape()).numel()
        return total

    def _preflight(self, *, distilled: bool) -> None:
        """Say what it will take. ValueError for what the model cannot be made, and where the disk is too small."""
        settings = self.settings
        if self.family is None:
            self.say(f"in memory, as models of type {self.config.model_type!r} have no row: their FFNs are looked for")
            return
        spec = spec_of(skeleton(self.folder, self.head), head=self.head, **self._options())
        if self.container:
            require_fit(self.container, self.config, spec=spec)
        try:
            found = estimate(
                self.folder,
                num_experts=settings.num_experts,
                calibration_tokens=settings.calibration_tokens,
                batch_tokens=CALIBRATION_BATCH * self.max_length,
                shared_width=settings.shared_width,
                dtype=torch.float32,
                copies=3 + (6 if settings.onnx else 0),  # routed, distilled and its container; the plans
            )
        except NotStreamable as reason:
            self.say(f"in memory, as {reason}")
            return
        warning = require_room(found, self.out)
        self.say(f"decomposing takes about {found}")
        # Weights in float32: of both; of the student, gradients and the optimizer's two moments, where it is trained.
        both = (2 + 3 * distilled) * 4 * self._parameters() / 2**30
        if distilled or settings.onnx:
            self.say(f"what follows needs the whole model: teacher and student take up to {both:.1f} GiB of memory")
        if warning:
            self.say(f"warning: {warning}")

    def _begin(self) -> None:
        """The unfinished folder: this very conversion's, or a new one."""
        digest = hashlib.sha256(json.dumps([self.settings.identity(), self.source], sort_keys=True).encode())
        for path in [self.folder / "config.json", *sorted(set(weight_files(self.folder).values()))]:
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        self.fingerprint = digest.hexdigest()
        mark = self.work / "fingerprint"
        if mark.is_file() and mark.read_text() == self.fingerprint:
            self.say(f"going on with what is in {self.work}")
            return
        if self.work.exists():
            self.say(f"{self.work} is of another conversion, and begun anew")
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True)
        mark.write_text(self.fingerprint)

    # --- data ------------------------------------------------------------------------------------------------------

    def _data(self) -> _Data:
        if self.reads != "text":
            return self._images()
        kept = self.work / "tokens.json"
        if not kept.is_file():
            fresh = kept.with_suffix(".fresh")
            fresh.write_text(json.dumps(self._tokens()))
            os.replace(fresh, kept)
        found = json.loads(kept.read_text())
        ids, decoder_ids = found["ids"], found["decoder_ids"]
        pad_id = self.reader.pad_token_id or 0
        count = held_out(len(ids))

        def some(part: slice) -> tuple[list[list[int]], list[list[int]] | None]:
            return ids[part], decoder_ids[part] if decoder_ids else None

        train, judged = some(slice(count, None)), some(slice(0, count))
        tokens = sum(map(len, train[0]))
        calibrated = some(slice(count, count + self._calibration_texts(train[0])))
        calibration = list(in_order(self.head, *calibrated, batch_texts=CALIBRATION_BATCH, pad_id=pad_id))
        return _Data(
            calibration=calibration,
            evaluation=list(in_order(self.head, *judged, batch_texts=CALIBRATION_BATCH, pad_id=pad_id)),
            train=lambda: Batches(
                train[0],
                batch_tokens=max(self.max_length, min(self._batch_tokens(), tokens // 4)),
                seed=self.settings.seed,
                pad_id=pad_id,
                head=self.head,
                decoder_ids=train[1],
            ),
            described={"corpus": self.corpus, "texts": len(ids), "train_tokens": tokens, "evaluation_texts": count},
        )

    def _batch_tokens(self) -> int:
        """Tokens that a step sees."""
        if self.settings.batch_tokens:
            return self.settings.batch_tokens
        if self.head != "causal":
            return MOST_BATCH_TOKENS
        width = self.config.get_text_config().hidden_size
        return max(FEWEST_BATCH_TOKENS, min(MOST_BATCH_TOKENS, TOKENS_BY_WIDTH * width))

    def _calibration_texts(self, ids: Sequence[Sequence[int]]) -> int:
        """How many texts have the tokens that are calibrated on."""
        total = 0
        for count, text in enumerate(ids, 1):
            total += len(text)
            if total >= self.settings.calibration_tokens:
                return count
        return len(ids)

    def _tokens(self) -> dict[str, Any]:
        """Token ids of every text, in a fixed random order: blocks of a language model, texts cut for the others."""
        settings, tokenizer, length = self.settings, self.reader, self.max_length
        if self.corpus == "generated":
            teacher = self.teacher.to(self.device)
            bos = tokenizer.bos_token_id
            drawn = sample_tokens(
                teacher,
                count=settings.texts or GENERATED_TEXTS,
                length=length,
                seed=settings.seed,
                bos=teacher.generation_config.bos_token_id if bos is None else bos,
                batch=max(1, min(AT_ONCE, CACHED_NUMBERS // self._cached(length))),
                track=self.track,
            )
            return {"ids": pack(drawn, length, None), "decoder_ids": None}
        if self.corpus == "docstrings":
            texts = docstrings(track=self.track)
        else:
            texts = read_corpus(self.corpus, settings.text_column, track=self.track)
        texts = list(dict.fromkeys(texts))
        random.Random(settings.seed).shuffle(texts)
        texts = texts[: settings.texts or MOST_TEXTS]
        if self.head == "causal":
            whole = tokenizer(texts)["input_ids"]
            begins = whole[0][:1] == [tokenizer.bos_token_id]  # then texts need nothing between them
            return {"ids": pack(whole, length, None if begins else tokenizer.eos_token_id), "decoder_ids": None}
        ids = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        answers = None
        if self.head == "seq2seq":
            answers = greedy_answers(
                self.teacher.to(self.device),
                ids,
                length=length,
                batch=AT_ONCE,
                pad_id=tokenizer.pad_token_id or 0,
                track=self.track,
            )
        return {"ids": ids, "decoder_ids": answers}

    def _cached(self, length: int) -> int:
        """Numbers that the keys and values of one text take, at most."""
        config = self.config.get_text_config()
        return 2 * config.num_hidden_layers * config.hidden_size * length

    def _images(self) -> _Data:
        """Batches of a folder's images, beside texts where the model reads both."""
        from PIL import Image

        files = sorted(path for path in Path(self.corpus).rglob("*") if path.suffix.lower() in IMAGES)
        random.Random(self.settings.seed).shuffle(files)
        files = files[: self.settings.texts or 1000]
        if len(files) < 2:
            raise ValueError(f"{self.corpus} holds {len(files)} images ({', '.join(IMAGES)}): two are the least")
        texts = docstrings(track=self.track) if self.reads == "text and images" else []
        batches = []
        starts = range(0, len(files), CHECKED_BATCH)
        for start in self.track(starts, len(starts), "reading images"):
            part = files[start : start + CHECKED_BATCH]
            images = [Image.open(file).convert("RGB") for file in part]
            if texts:
                words = [texts[(start + index) % len(texts)] for index in range(len(part))]
                found = self.reader(text=words, images=images, padding=True, truncation=True, return_tensors="pt")
            else:
                found = self.reader(images=images, return_tensors="pt")
            batches.append(Batch(dict(found), None))
        count = held_out(len(batches))
        return _Data(
            calibration=batches[count:] or batches,
            evaluation=batches[:count],
            train=lambda: _Cycle(batches[count:] or batches, self.settings.seed),
            described={"corpus": self.corpus, "images": len(files)},
        )

    # --- decomposing and routing ----------------------------------------------------------------------------------

    def _route(self, data: _Data) -> None:
        """The folder `routed`: every FFN a mixture, nothing trained but the routers."""
        done = self.work / "routed"
        if done.is_dir():
            return
        settings, options = self.settings, self._options()
        try:
            if self.family is None or self.reads != "text":
                raise NotStreamable("it reads images, or its type has no row")
            rows = decompose(
                self.folder,
                done,
                data.calibration,
                head=self.head,
                router_steps=ROUTER_STEPS,
                router_batch_tokens=ROUTER_BATCH,
                dtype=torch.float32,
                seed=settings.seed,
                track=self.track,
                **ROUTER,
                **options,
            )
        except NotStreamable:
            rows = self._route_in_memory(done, data, options)
        recall = sum(row["router_recall"] for row in rows) / len(rows)
        error = sum(row["router_error"] for row in rows) / len(rows)
        self.say(
            f"{len(rows)} layers: the routers find {100 * recall:.0f} % of the experts that the oracle chooses, and "
            f"leave a relative error of {error:.2f}"
        )

    def _options(self) -> dict[str, Any]:
        """What the spec is made of, beside the model and its head."""
        settings = self.settings
        return {
            "num_experts": settings.num_experts,
            "num_active": settings.num_active,
            "max_length": self.max_length,
            "teacher": self.source,
            "pooling": pooling_of(self.folder) if self.head == "embedding" else None,
            "partition": settings.partition,
            "shared_width": settings.shared_width,
            "gate": self.gate,
            "router_bias": self.container is None,
            "container": self.container.name if self.container else None,
            "width_multiple": self.container.width_multiple if self.container else 1,
        }

    def _route_in_memory(self, done: Path, data: _Data, options: dict[str, Any]) -> list[dict[str, Any]]:
        settings, teacher = self.settings, self.teacher
        spec = spec_of(teacher, head=self.head, **options)
        inputs = layer_inputs(teacher, data.calibration, max_tokens=settings.calibration_tokens, device=self.device)
        teacher.to("cpu")
        student, _ = load_dense(str(self.folder), head=self.head)
        layers, rows = [], []
        for index, x_TD in self.track(enumerate(inputs), len(inputs), "decomposing layers"):
            layers.append(decompose_layer(read_ffn(student, index), x_TD, spec, index, seed=settings.seed))
        with torch.no_grad():
            dense = output_of(student, data.calibration[0])
            install_moe(student, layers)
            with every_expert(layers):
                found = output_of(student, data.calibration[0])
        difference = (found - dense).abs().max().item() / max(1.0, dense.abs().max().item())
        if not difference <= IDENTITY_TOLERANCE:
            raise ValueError(
                f"with all experts active the mixture differs from the dense model by {difference:.1e}: {self.source} "
                f"computes its FFNs in another way than the family {spec.family!r} says"
            )
        router = RouterSettings(
            steps=ROUTER_STEPS,
            batch_tokens=ROUTER_BATCH,
            seed=settings.seed,
            learning_rate=ROUTER["learning_rate"],
            ridge=ROUTER["ridge"],
            refit=ROUTER["refit"],
        )
        for index, moe in self.track(list(enumerate(layers)), len(layers), "routing layers"):
            kept = max(1, len(inputs[index]) - len(inputs[index]) // HELD_OUT_SHARE)
            x_TD, held_out_TD = inputs[index][:kept], inputs[index][kept:]
            found = route_layer(
                moe, x_TD, router.for_layer(index), held_out_TD=held_out_TD if len(held_out_TD) else None
            )
            rows.append({"layer": index, **found.row})
        partial = done.with_name("routed.partial")
        shutil.rmtree(partial, ignore_errors=True)
        checkpoint.save(student, None, spec, partial)
        os.replace(partial, done)
        return rows

    # --- distillation ----------------------------------------------------------------------------------------------

    def _distill(self, student: Any, spec: MoESpec, data: _Data, steps: int | None, minutes: float) -> dict[str, Any]:
        """Train the student in place; says how many steps, and gives what was done."""
        if steps == 0:
            return {"steps": 0}
        if self.head == "features" and len(spec.stacks) > 1:
            self.say("not distilled: a model of several towers has no output that the objective knows")
            return {"steps": 0}
        ways = [model.config._attn_implementation for model in (self.teacher, student)]
        peak = PEAK_RATE_CAUSAL if self.head == "causal" else PEAK_RATE
        rate = self.settings.learning_rate or min(peak, RATE_BY_WIDTH / max(shape.width for shape in spec.stacks))
        bf16 = bf16_supported(self.device)
        distiller = Distiller(
            self.teacher,
            student,
            data.train(),
            objective_for(spec.head, spec.pooling),
            Training(
                steps=steps or TIMED_STEPS,
                learning_rate=rate,
                balance_step=0.0 if self.container and not self.container.choice_bias else 1e-3,
                scope=self.settings.scope,
                device=self.device,
                bf16=bf16,
            ),
        )
        steps = steps or self._steps(distiller, minutes)
        distiller.steps = steps
        state = self.work / "distill.safetensors"
        key = f"{self.fingerprint} {steps}"
        found = checkpoint.load_progress(state, fingerprint=key)
        if found is not None:
            distiller.restore(*found)
            self.say(f"going on at step {distiller.step}")
        self.say(
            f"distilling: {steps} steps (--distill-steps {steps} repeats this), learning rate {rate:g}, "
            f"{'bfloat16' if bf16 else 'float32'} on {self.device}"
        )
        start = saved = time.monotonic()
        first = distiller.step
        for _ in self.track(distiller.run(), steps - first, "distilling"):
            if time.monotonic() - saved > CHECKPOINT_SECONDS and distiller.step < steps:
                checkpoint.save_progress(state, distiller.state(), step=distiller.step, fingerprint=key)
                saved = time.monotonic()
        student.eval().requires_grad_(False)
        for model, way in zip((self.teacher, student), ways, strict=True):
            model.set_attn_implementation(way)
        return {"steps": steps, "learning_rate": rate, "seconds": time.monotonic() - start, "bf16": bf16}

    def _steps(self, distiller: Distiller, minutes: float) -> int:
        """How many steps fill the time: some are tried, timed, and undone. Known again when the run goes on."""
        kept = self.work / f"steps-{minutes:g}"
        if kept.is_file():
            return int(kept.read_text())
        before = {name: tensor.clone() for name, tensor in distiller.state().items()}
        times = []
        for _ in distiller.run():
            times.append(time.monotonic())
        distiller.restore(0, before)
        seconds = (times[-1] - times[0]) / (len(times) - 1)
        steps = max(1, int(60 * minutes / seconds))
        self.say(f"a step takes {seconds:.2f} s: {steps} of them fill {minutes:g} minutes")
        kept.write_text(str(steps))
        return steps

    # --- what is written -------------------------------------------------------------------------------------------

    def _write(self, student: Any | None, spec: MoESpec, told_more: dict[str, Any]) -> dict[str, Any]:
        """Every form of the student (None: of what was routed, a layer at a time); then the folder gets its name."""
        from ffn2moe.onnx import write as export

        result = self.work / "result"
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir()
        manifest: dict[str, Any] | None = None
        if self.settings.onnx and student is not None:
            try:
                manifest = export.export_model(
                    student,
                    self.teacher,
                    self.reader,
                    spec,
                    result,
                    track=lambda plans, what: self.track(plans, len(plans), what),
                )
            except ValueError as error:
                self.say(f"no ONNX graphs: {error}")
                shutil.rmtree(result)
                result.mkdir()
        if manifest is None:
            model = skeleton(self.work / "routed", spec.head) if student is None else student
            self.reader.save_pretrained(result / "tokenizer")
            manifest = {"spec": spec.to_dict(), "model": export.facts(model, spec), "plans": {}, "refused": {}}
            if student is None:
                shutil.copytree(self.work / "routed", result / "checkpoint", copy_function=os.link)
            else:
                checkpoint.save(student, None, spec, result / "checkpoint")
        if self.container:
            dtype = self._dtype()
            write(
                result / self.container.name,
                self.container,
                spec,
                self.config,
                self._pieces(student, spec),
                dtype=dtype,
                shard_bytes=SHARD_BYTES,
                assets=self.folder,
            )
            manifest["container"] = {"folder": self.container.name, "dtype": str(dtype).removeprefix("torch.")}
        manifest["convert"] = {"settings": self.settings.identity(), **told_more}
        export.write_manifest(result, manifest)
        os.replace(result, self.out)
        shutil.rmtree(self.work)
        return manifest

    def _pieces(self, student: Any | None, spec: MoESpec) -> Iterator[Mapping[str, Tensor]]:
        """The container's tensors, a layer or a tensor at a time."""
        assert self.container is not None
        routed = self.work / "routed"
        outer: Any = outside(routed) if student is None else student.state_dict()
        yield from outer_tensors(self.container, self.config, outer)
        layers = mixtures(routed) if student is None else moe_layers(student)
        for index, moe in enumerate(layers):
            yield layer_tensors(self.container, spec, index, moe)

    def _dtype(self) -> torch.dtype:
        if self.settings.dtype != "auto":
            return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.settings.dtype]
        own = getattr(self.config, "dtype", None)
        return own if own in (torch.bfloat16, torch.float16) else torch.float32


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """What a conversion looks at: batches to calibrate on, to judge by, and to train on."""

    calibration: list[Batch]
    evaluation: list[Batch]
    train: Callable[[], BatchSource]
    described: dict[str, Any]


class _Cycle:
    """The same batches again and again, in a seeded order of each round."""

    def __init__(self, batches: Sequence[Batch], seed: int) -> None:
        self.batches, self.seed = batches, seed

    def from_step(self, step: int) -> Iterator[Batch]:
        """The batches from a step on."""
        while True:
            round_, place = divmod(step, len(self.batches))
            order = random.Random(f"{self.seed}/{round_}").sample(range(len(self.batches)), len(self.batches))
            yield self.batches[order[place]]
            step += 1


def held_out(count: int) -> int:
    """How many of so many texts are held out to judge by."""
    return max(1, min(MOST_EVALUATED, int(EVALUATION_SHARE * count)))


def local_folder(source: str, revision: str | None) -> Path:
    """The folder of a source on this machine; a hub name is fetched."""
    kind, folder = resolve_source(source)
    if kind == "hub":
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        try:
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
        except Exception as error:  # the library raises a dozen kinds, of its own and of its dependencies
            raise FileNotFoundError(
                f"{source} is no folder here and cannot be fetched ({type(error).__name__}): check the name and the "
                "network"
            ) from None
    assert folder is not None
    return folder


@torch.no_grad()
def judge(
    teacher: Any, student: Any, batches: Sequence[Batch], spec: MoESpec, device: str | torch.device = "cpu"
) -> dict[str, float]:
    """How near the student is to the teacher on texts that neither calibration nor training has seen.

    Of models with logits: `divergence` in nats and `agreement` of the most probable token or class, a position; of
    language models `perplexity` and `teacher_perplexity` too. Of embeddings their mean `cosine`; of hidden states the
    `relative_error`.
    """
    device = torch.device(device)
    teacher, student = teacher.to(device).eval(), student.to(device).eval()
    sums: dict[str, float] = {}

    def add(**values: float) -> None:
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value

    for batch in (batch.to(device) for batch in batches):
        if spec.head == "embedding":
            assert batch.mask is not None and spec.pooling is not None
            first, second = (
                pool(model(**batch.inputs).last_hidden_state.float(), batch.mask, spec.pooling)
                for model in (teacher, student)
            )
            add(count=len(first), cosine=(first * second).sum().item())
            continue
        first, second = (output_of(model, batch).float() for model in (teacher, student))
        if spec.head == "features":
            add(count=first.double().square().sum().item(), error=(first - second).double().square().sum().item())
            continue
        first, second = (logits.flatten(0, -2) for logits in (first, second))
        agreed = (first.argmax(-1) == second.argmax(-1)).sum().item()
        add(count=len(first), divergence=metrics.divergence(first, second).sum().item(), agreement=agreed)
        if spec.head == "causal":
            mask_BL = batch.inputs["attention_mask"].bool()
            row_B, place_L = torch.nonzero(mask_BL[:, 1:] & mask_BL[:, :-1], as_tuple=True)
            target = batch.inputs["input_ids"][row_B, place_L + 1]
            index = mask_BL.flatten().cumsum(0).sub(1).view_as(mask_BL)[row_B, place_L]
            add(
                predicted=len(target),
                teacher_nats=metrics.nats(first[index], target).sum().item(),
                nats=metrics.nats(second[index], target).sum().item(),
            )
    count = sums["count"]
    if spec.head == "embedding":
        return {"cosine": sums["cosine"] / count}
    if spec.head == "features":
        return {"relative_error": (sums["error"] / count) ** 0.5}
    found = {"divergence": sums["divergence"] / count, "agreement": sums["agreement"] / count}
    if spec.head == "causal":
        for name, nats in (("perplexity", "nats"), ("teacher_perplexity", "teacher_nats")):
            found[name] = float(torch.tensor(sums[nats] / sums["predicted"], dtype=torch.float64).exp())
    return found


def summary(quality: dict[str, float]) -> str:
    """What `judge` found, in words."""
    if "cosine" in quality:
        return f"cosine {quality['cosine']:.4f} with the embeddings of the dense model"
    if "relative_error" in quality:
        return f"relative error {quality['relative_error']:.3f} of the hidden states"
    near = f"{quality['divergence']:.4f} nats from the dense model, {100 * quality['agreement']:.1f} % agreement"
    if "perplexity" in quality:
        return f"perplexity {quality['perplexity']:.3f} (dense {quality['teacher_perplexity']:.3f}), {near}"
    return near
