"""Open an export and use it, by any of its plans: embeddings, generated text, logits, hidden states.

Needs numpy, tokenizers and the plan's engine (`ffn2moe.engines`), and no torch: an export is light to serve.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ffn2moe import native
from ffn2moe.engines import CPU, Engine, Graph, OpenVinoGraph, Precision, open_graph, session
from ffn2moe.spec import Activation
from ffn2moe.switch import Switch, places

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What they are: ffn2moe.onnx_plans. Those of OpenVINO begin with ov-.
Plan = Literal[
    "dense",
    "dense8",
    "dense4",
    "fused",
    "qmoe8",
    "qmoe4",
    "sorted",
    "sorted8",
    "ov-dense",
    "ov-dense8",
    "ov-sorted",
    "ov-native",
    "ov-native8",
    "ov-native8a8",
    "ov-native4",
]
OV = "ov-"
DECODER_PLANS: tuple[Plan, ...] = ("dense", "dense8", "dense4", "fused", "qmoe8", "qmoe4", "sorted", "sorted8")
PLANS: tuple[Plan, ...] = ("dense", "dense8", "fused", "sorted", "sorted8")  # of models that read all at once
OPENVINO_PLANS: tuple[Plan, ...] = tuple(plan for plan in get_args(Plan) if plan.startswith(OV))
DENSE_PLANS: tuple[Plan, ...] = ("dense", "dense8", "dense4", "ov-dense", "ov-dense8")
INT8_PLANS: tuple[Plan, ...] = ("dense8", "sorted8")  # by ONNX Runtime's dynamic quantisation
QUANTIZED_PLANS: tuple[Plan, ...] = (
    *INT8_PLANS,
    "dense4",
    "qmoe8",
    "qmoe4",
    "ov-dense8",
    "ov-native8",
    "ov-native8a8",
    "ov-native4",
)
ROUNDED_PLANS: tuple[Plan, ...] = (*QUANTIZED_PLANS, "ov-native")  # more than float32 does, on any machine
# What weights and activations are in where experts are the operator of ffn2moe.native.
NATIVE_PLANS: dict[str, tuple[native.Weights, native.Activations]] = {
    "ov-native": ("bf16", "bf16"),
    "ov-native8": ("int8", "int16"),
    "ov-native8a8": ("int8", "int8"),
    "ov-native4": ("int4", "int8"),
}
# Rest on an operator that is tested when it is opened.
OP_PLANS: tuple[str, ...] = ("fused", "qmoe8", "qmoe4", *NATIVE_PLANS)
MANIFEST, PLAN_FILE = "manifest.json", "plan.json"
BATCH_TOKENS = 1024  # at once: more leave the processor's cache (int8 plans: a fifth slower at 4096)
UNMEASURED_PLAN = "sorted"  # where no benchmark has chosen: float32 and standard ops, good everywhere
PREFILL_TOKENS = 512  # of a prompt at once: the logits of all of them are in memory together

MICROSOFT = "com.microsoft"
MASKED_LOGIT = -1e4  # of an expert that is not chosen: its softmax is 0 in float32, and nothing is infinite
BLOCK = 32  # weights that share a scale, in plans of 8 and 4 bits
# Activations of the MoE ops (their `gelu` is the tanh form on the CPU), keyed by ours.
MOE_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu", "relu": "relu", "silu": "silu"}


def form_of(plan: str) -> str:
    """Which of the plans above a plan is, whatever the variant of the mixture: `sorted` of `sorted-k1`, `sorted-d0`."""
    return re.split(r"-[kd](?=\d)", plan, maxsplit=1)[0]


def engine_of(plan: str) -> Engine:
    """What runs a plan."""
    return "openvino" if plan.startswith(OV) else "onnxruntime"


def graph_of(plan: str) -> str:
    """The plan whose graph a plan runs: plans of several engines share one where it is standard ONNX."""
    form = form_of(plan)
    return plan.removeprefix(OV) if form in ("ov-dense", "ov-sorted") else plan


def precision_of(plan: str, graph: Graph) -> str:
    """What a plan of an open graph multiplies in: `float32`, `bfloat16`, `int8` or `int4` (the weights, at least)."""
    form = form_of(plan)
    if form in QUANTIZED_PLANS:
        return f"int{form[-1]}"
    return "bfloat16" if form in NATIVE_PLANS else graph.precision


def plans_of(head: str, engines: Sequence[Engine] = ("onnxruntime",)) -> tuple[Plan, ...]:
    """The plans that models with this head are given: those that decode token by token have plans for that."""
    of_head = DECODER_PLANS if decodes(head) else (*PLANS, *OPENVINO_PLANS)
    return tuple(plan for plan in of_head if engine_of(plan) in engines)


def plans_on_request(head: str) -> tuple[Plan, ...]:
    """The plans that models with this head can be given besides, if they are asked for.

    Of models that read all at once those of 4 and 8 bits a weight that pay for decoding; of language models those of
    OpenVINO, which copies the cache at every step.
    """
    if head == "causal":
        return OPENVINO_PLANS
    return () if decodes(head) else tuple(plan for plan in DECODER_PLANS if plan not in PLANS)


def decodes(head: str) -> bool:
    """Whether models with this head read token by token, with a cache."""
    return head in ("causal", "seq2seq")


class Export:
    """An open export of an encoder of texts. `encode` texts, or `run` token ids; `plan` says how it is executed."""

    def __init__(
        self,
        path: Path,
        plan: str,
        manifest: Mapping[str, Any],
        graph: Graph,
        tokenizer: Tokenizer,
    ) -> None:
        self.path = path
        self.plan = plan
        self.manifest = manifest
        self._graph = graph
        self._tokenizer = tokenizer
        self._pad_id = _padding_id(path / "tokenizer", tokenizer)

    def __repr__(self) -> str:
        return f"Export({str(self.path)!r}, plan={self.plan!r})"

    @property
    def width(self) -> int:
        """Dimensions of an embedding."""
        return int(self.manifest["spec"]["stacks"][0]["width"])

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, cut to the export's length."""
        if isinstance(texts, str):
            raise ValueError("encode takes a list of texts: write encode([text])")
        for index, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"text {index} is empty: it has no meaning to encode; leave it out")
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def encode(self, texts: Sequence[str], *, batch_tokens: int = BATCH_TOKENS) -> np.ndarray:
        """Embeddings of unit length, float32 [N, D], in the order of `texts`; ValueError for an empty text.

        Texts are batched with others of their length, up to `batch_tokens` with padding. In an int8 plan the scale
        of the activations is that of the batch, so an embedding depends a little on its neighbours.
        """
        ids = self.token_ids(texts)
        embeddings_ND = np.empty((len(ids), self.width), dtype=np.float32)
        for batch in batches_by_length(ids, batch_tokens):
            ids_BL, mask_BL = pad([ids[index] for index in batch], self._pad_id)
            embeddings_ND[batch] = self._graph.run(
                ["sentence_embedding"], {"input_ids": ids_BL, "attention_mask": mask_BL}
            )[0]
        return embeddings_ND

    def batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask of the texts as one batch, int64 [B, L] each."""
        return pad(self.token_ids(texts), self._pad_id)

    def run(self, ids_BL: np.ndarray, mask_BL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hidden states [B, L, D] and embeddings [B, D] of token ids and their mask, int64 [B, L]."""
        hidden_BLD, embedding_BD = self._graph.run(
            ["last_hidden_state", "sentence_embedding"], {"input_ids": ids_BL, "attention_mask": mask_BL}
        )
        return hidden_BLD, embedding_BD

    def fix(self, shapes: Iterable[tuple[int, int]]) -> None:
        """Compile for batches [B, L] of these shapes apart, where the plan's engine is OpenVINO, and for no others.

        The first batch of each takes longer, and each takes memory (docs/decisions/0015). Batches that are a little
        smaller are padded to it; all others run as before.
        """
        self._graph.fix(shapes)

    def outputs(self, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output by name, of a sample of `ffn2moe.parity`."""
        hidden_BLD, embedding_BD = self.run(sample["input_ids"], sample["attention_mask"])
        return {"last_hidden_state": hidden_BLD, "sentence_embedding": embedding_BD}


def open_export(
    path: str | Path,
    plan: str | None = None,
    threads: int | None = None,
    providers: Sequence[str] = CPU,
    precision: Precision | None = None,
) -> Any:
    """Open the export in folder `path`: an `Export` of embeddings, or a `CausalExport`, `Seq2SeqExport` or
    `ModelExport`, by the head of the model.

    `plan` None takes what was chosen by measuring (plan.json, `ffn2moe.autoplan`), or `sorted` where nothing was. If
    several plans were chosen, each batch runs on the one for its shape, opened when it is first needed
    (`ffn2moe.switch`). What was chosen in OpenVINO is compiled for the shapes that it was chosen for, apart, when the
    first batch of each comes (of a model that reads all at once; for other plans and shapes: `Export.fix`). The graphs
    must have the sha256 of the manifest, and a plan that rests on a MoE op must pass
    `self_test` on this runtime.
    `threads` None takes one a core; `precision` is OpenVINO's (`ffn2moe.engines.open_graph`).
    Raises FileNotFoundError or ValueError, with cause and remedy.
    """
    path = Path(path)
    manifest = read_manifest(path)
    plans = manifest["plans"]
    measured = read_plan(path) if plan is None and tuple(providers) == CPU else None
    chosen = places(measured, threads or cores()) if measured else []
    by_shape = tuple(dict.fromkeys(place.plan for place in chosen))
    first = plan or default_plan(path, plans)
    if by_shape and first not in by_shape:  # chosen for another number of threads
        first = by_shape[0]

    def graphs_of(name: str) -> list[Graph]:
        if name not in plans:
            refused = manifest.get("refused", {}).get(name)
            because = f": {refused}" if refused else f"; it has: {', '.join(sorted(plans))}"
            raise ValueError(f"{path} has no plan {name!r}{because}")
        files = checked_files(path, plans[name])
        if form_of(name) in OP_PLANS:
            self_tests(name, manifest["spec"], providers)
        return open_graphs(files, name, threads=threads, providers=providers, precision=precision)

    def fixed_graphs(name: str) -> list[Graph]:
        graphs = graphs_of(name)
        if not decodes(manifest["spec"]["head"]):
            graphs[0].fix((place.batch, place.sequence) for place in chosen if place.plan == name and place.fixed)
        return graphs

    if len(by_shape) > 1:
        return opened(path, first, manifest, [Switch(chosen, lambda name: fixed_graphs(name)[0], first)])
    return opened(path, first, manifest, fixed_graphs(first))


def open_graphs(
    files: Sequence[Path],
    plan: str,
    *,
    threads: int | None = None,
    providers: Sequence[str] = CPU,
    precision: Precision | None = None,
) -> list[Graph]:
    """The graphs of a plan in its engine (`ffn2moe.engines.open_graph`).

    FileNotFoundError, with the remedy, where the plan rests on the operator of `ffn2moe.native` and it is not built.
    """
    return [
        open_graph(
            file,
            engine_of(plan),
            threads=threads,
            providers=providers,
            precision=precision,
            extension=native.library() if form_of(plan) in NATIVE_PLANS else None,
        )
        for file in files
    ]


def opened(path: Path, plan: str, manifest: Mapping[str, Any], graphs: Sequence[Graph]) -> Any:
    """The object for the head of the export, over sessions that are open: its graph, and then its encoder's."""
    head, spec = manifest["spec"]["head"], manifest["spec"]
    tokenizer = None
    if manifest.get("model", {}).get("reads", "text") != "images":
        cut = int(spec["max_length"]) if head in ("embedding", "classification", "features") else None
        tokenizer = load_tokenizer(path / "tokenizer", cut)
    if head == "embedding":
        assert tokenizer is not None
        return Export(path, plan, manifest, graphs[0], tokenizer)
    kinds: dict[str, Any] = {"causal": CausalExport, "seq2seq": Seq2SeqExport}
    return kinds.get(head, ModelExport)(path, plan, manifest, graphs, tokenizer)


# --- models that generate -------------------------------------------------------------------------------------------


class _Decoder:
    """A graph that decodes with a cache: what language models and the decoders of seq2seq models share."""

    def __init__(
        self,
        path: Path,
        plan: str,
        manifest: Mapping[str, Any],
        graphs: Sequence[Graph],
        tokenizer: Tokenizer,
    ) -> None:
        self.path = path
        self.plan = plan
        self.manifest = manifest
        self._graph = graphs[0]
        self._encoder = graphs[1] if len(graphs) > 1 else None
        self._tokenizer = tokenizer
        self._model: Mapping[str, Any] = manifest["model"]
        self._pad_id = _padding_id(path / "tokenizer", tokenizer)
        self._outputs = list(self._graph.outputs)
        # Shapes [B, H, tokens, d] of the cached keys and values.
        self._cache_shapes = {
            name: shape for name, shape in self._graph.inputs.items() if name.startswith("past_key_values.")
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, plan={self.plan!r})"

    @property
    def longest(self) -> int | None:
        """Tokens that the model can hold, prompt and answer together; None where nothing limits them."""
        limit = self._model["positions"]
        return None if limit is None else int(limit)

    def _empty_cache(self, batch: int) -> dict[str, Any]:
        return {
            name: np.zeros((batch, shape[1], 0, shape[3]), dtype=np.float32)
            for name, shape in self._cache_shapes.items()
        }

    def _step(self, ids_BL: np.ndarray, cache: dict[str, Any], others: Mapping[str, Any]) -> np.ndarray:
        """Logits [B, L, V] of the next tokens; the cache is replaced by the longer one."""
        found = self._graph.run_values(self._outputs, {"input_ids": ids_BL, **others, **cache})
        by_name = dict(zip(self._outputs, found, strict=True))
        for name in cache:
            cache[name] = by_name[name.replace("past_key_values", "present")]
        return self._graph.array(by_name["logits"])

    def _require_room(self, tokens: int, what: str) -> None:
        if self.longest is not None and tokens > self.longest:
            raise ValueError(f"{what} has {tokens} tokens, but this model can hold {self.longest}: shorten it")

    def _pieces(self, tokens: Iterator[int], before: Sequence[int]) -> Iterator[str]:
        """Text of tokens as it becomes certain: a character may need several, and a space the token before it."""
        ids = list(before)
        start, read = max(0, len(ids) - 6), len(ids)
        for token in tokens:
            ids.append(token)
            known, text = self._tokenizer.decode(ids[start:read]), self._tokenizer.decode(ids[start:])
            if len(text) > len(known) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(known) :]
                start, read = read, len(ids)
        known, text = self._tokenizer.decode(ids[start:read]), self._tokenizer.decode(ids[start:])
        if text[len(known) :]:
            yield text[len(known) :]

    def _sampled(
        self,
        logits_BV: np.ndarray,
        proceed: Callable[[np.ndarray], np.ndarray],
        *,
        steps: int,
        sampler: Callable[[np.ndarray], np.ndarray],
        stop_at_end: bool,
    ) -> Iterator[np.ndarray]:
        """Tokens [B] one after the other; -1 for a row that has ended. `proceed` takes them and gives new logits."""
        ends = set(self._model["eos_token_ids"]) if stop_at_end else set()
        done_B = np.zeros(len(logits_BV), dtype=bool)
        for step in range(steps):
            if not np.isfinite(logits_BV[~done_B]).all():
                raise RuntimeError(
                    f"the plan {self.plan} gave logits that are NaN or infinite: run `ffn2moe verify {self.path}`"
                )
            tokens_B = sampler(logits_BV)
            done_B |= np.isin(tokens_B, list(ends))
            yield np.where(done_B, -1, tokens_B)
            if done_B.all() or step + 1 == steps:
                return
            logits_BV = proceed(np.where(done_B, self._pad_id, tokens_B))


def _sampler(temperature: float, top_p: float, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """Draws a token of each row of logits [B, V]: the best at temperature 0, else from the fewest most likely ones
    that have `top_p` of the probability together."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature = {temperature} must be a number from 0 (always the likeliest token) up")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p} must be above 0 and at most 1 (all tokens)")
    random = np.random.default_rng(seed)

    def sample(logits_BV: np.ndarray) -> np.ndarray:
        if temperature == 0:
            return logits_BV.argmax(-1)
        z_BV = logits_BV.astype(np.float64)
        p_BV = np.exp((z_BV - z_BV.max(-1, keepdims=True)) / temperature)
        p_BV /= p_BV.sum(-1, keepdims=True)
        tokens = []
        for p_V in p_BV:
            order = np.argsort(-p_V, kind="stable")
            before = np.cumsum(p_V[order]) - p_V[order]
            kept = order[before < top_p]
            tokens.append(random.choice(kept, p=p_V[kept] / p_V[kept].sum()))
        return np.array(tokens)

    return sample


class CausalExport(_Decoder):
    """An open export of a language model: `generate` text, or ask for `logits`, `score` and `perplexity`."""

    goes_on = True  # what is generated belongs behind the prompt

    def token_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt, with what the tokenizer puts before a text; ids are taken as they are."""
        ids = self._tokenizer.encode(prompt).ids if isinstance(prompt, str) else [int(token) for token in prompt]
        if not ids and self._model["bos_token_id"] is not None:
            ids = [int(self._model["bos_token_id"])]
        if not ids:
            raise ValueError("the prompt is empty, and this model has no token to begin a text with: give it a word")
        vocabulary = self._model.get("vocabulary", self._graph.outputs["logits"][-1])
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise ValueError(f"a token id of the prompt is outside of the vocabulary, 0 to {vocabulary - 1}")
        return ids

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_at_end: bool = True,
    ) -> Iterator[str]:
        """The continuation of a prompt, piece by piece as it is made.

        It ends with the model's end token (unless `stop_at_end` is false), after `max_new_tokens`, or where the
        model can hold no more. ValueError for a prompt that is longer than that, or parameters out of range.
        """
        ids = self.token_ids(prompt)
        tokens = self.generate_tokens(
            [ids],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop_at_end=stop_at_end,
        )
        return self._pieces((int(tokens_B[0]) for tokens_B in tokens if tokens_B[0] >= 0), ids)

    def generate_tokens(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_at_end: bool = True,
    ) -> Iterator[np.ndarray]:
        """Token ids [B] of each step of a batch of prompts of any lengths, int64; -1 where a text has ended."""
        if isinstance(prompts, str):
            raise ValueError("generate_tokens takes a list of prompts: write generate_tokens([prompt])")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {max_new_tokens} must be 1 or more")
        rows = [self.token_ids(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        self._require_room(longest + 1, "the prompt with the first token of its answer")
        room = max_new_tokens if self.longest is None else min(max_new_tokens, self.longest - longest)
        sampler = _sampler(temperature, top_p, seed)
        ids_BL, mask_BL = pad(rows, self._pad_id, left=True)

        def run() -> Iterator[np.ndarray]:
            cache = self._empty_cache(len(rows))
            mask = mask_BL
            for start in range(0, longest, PREFILL_TOKENS):
                end = min(start + PREFILL_TOKENS, longest)
                logits_BLV = self._step(ids_BL[:, start:end], cache, {"attention_mask": mask[:, :end]})

            def proceed(tokens_B: np.ndarray) -> np.ndarray:
                nonlocal mask
                mask = np.concatenate([mask, np.ones((len(rows), 1), dtype=np.int64)], axis=1)
                logits: np.ndarray = self._step(tokens_B[:, None].astype(np.int64), cache, {"attention_mask": mask})
                return logits[:, -1]

            yield from self._sampled(logits_BLV[:, -1], proceed, steps=room, sampler=sampler, stop_at_end=stop_at_end)

        return run()

    def run(self, ids_BL: np.ndarray, mask_BL: np.ndarray, cuts: Sequence[int] = ()) -> np.ndarray:
        """Logits [B, L, V] of token ids and their mask, int64 [B, L], padded on either side.

        The tokens go in at once, or in parts that end before the positions `cuts`, through the cache.
        """
        cache = self._empty_cache(len(ids_BL))
        edges = [0, *cuts, ids_BL.shape[1]]
        parts = [
            self._step(ids_BL[:, start:end], cache, {"attention_mask": mask_BL[:, :end]})
            for start, end in pairwise(edges)
        ]
        return np.concatenate(parts, axis=1)

    def outputs(self, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Logits of a sample of `ffn2moe.parity`: half of it read at once, the rest token by token."""
        length = sample["input_ids"].shape[1]
        return {"logits": self.run(sample["input_ids"], sample["attention_mask"], _half_then_each(length))}

    def logits(self, prompt: str | Sequence[int]) -> np.ndarray:
        """Logits [L, V] after each token of a prompt; ValueError for one that is longer than the model can hold."""
        ids = self.token_ids(prompt)
        self._require_room(len(ids), "the prompt")
        ids_BL, mask_BL = pad([ids], self._pad_id)
        logits_LV: np.ndarray = self.run(ids_BL, mask_BL, range(PREFILL_TOKENS, len(ids), PREFILL_TOKENS))[0]
        return logits_LV

    def score(self, text: str | Sequence[int]) -> tuple[float, int]:
        """Minus the logarithm of a text's probability, in nats, and the number of tokens that were foretold.

        The first token is given. What is longer than the model can hold is cut.
        """
        ids = self.token_ids(text)[: self.longest]
        if len(ids) < 2:
            raise ValueError("the text has no second token to foretell: give a longer one")
        z_LV = self.logits(ids)[:-1].astype(np.float64)
        z_LV -= z_LV.max(-1, keepdims=True)
        nats_L = np.log(np.exp(z_LV).sum(-1)) - np.take_along_axis(z_LV, np.array(ids[1:])[:, None], axis=1)[:, 0]
        return float(nats_L.sum()), len(nats_L)

    def perplexity(self, texts: Sequence[str]) -> float:
        """exp of the mean nats per token over texts, each cut to what the model can hold."""
        if isinstance(texts, str):
            raise ValueError("perplexity takes a list of texts: write perplexity([text])")
        nats, tokens = zip(*map(self.score, texts), strict=True)
        return math.exp(sum(nats) / sum(tokens))


class Seq2SeqExport(_Decoder):
    """An open export of an encoder with a decoder: `generate` from a text, or from speech features."""

    goes_on = False

    def source(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The encoder's input for texts."""
        for index, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"text {index} is empty: there is nothing to answer; leave it out")
        ids_BL, mask_BL = pad([encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))], self._pad_id)
        return {"input_ids": ids_BL, "attention_mask": mask_BL}

    def encode(self, source: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """What the decoder reads of a source: keys and values of each of its layers, and the source's mask."""
        assert self._encoder is not None
        names = list(self._encoder.outputs)
        found = dict(zip(names, self._encoder.run_values(names, source), strict=True))
        wanted = self._graph.inputs
        read: dict[str, Any] = {name: value for name, value in found.items() if name in wanted}
        if "encoder_attention_mask" in wanted:
            read["encoder_attention_mask"] = source["attention_mask"]
        return read

    def generate(
        self,
        source: str | Mapping[str, np.ndarray],
        *,
        decoder_ids: Sequence[int] = (),
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_at_end: bool = True,
    ) -> Iterator[str]:
        """The answer to a text, or to the encoder's input (`input_features` [1, mel bins, frames] of speech).

        `decoder_ids` is what the answer begins with, after the model's start token (language and task, in
        Whisper). It ends as that of a language model does.
        """
        prepared = self.source([source]) if isinstance(source, str) else source
        begin = [int(self._model["decoder_start_token_id"]), *decoder_ids]
        tokens = self.generate_tokens(
            prepared,
            decoder_ids=decoder_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop_at_end=stop_at_end,
        )
        return self._pieces((int(tokens_B[0]) for tokens_B in tokens if tokens_B[0] >= 0), begin)

    def generate_tokens(
        self,
        source: Mapping[str, np.ndarray],
        *,
        decoder_ids: Sequence[int] = (),
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_at_end: bool = True,
    ) -> Iterator[np.ndarray]:
        """Token ids [B] of each step of the answers to a batch, int64; -1 where an answer has ended."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {max_new_tokens} must be 1 or more")
        begin = [int(self._model["decoder_start_token_id"]), *decoder_ids]
        self._require_room(len(begin) + 1, "the beginning of the answer with the first token after it")
        room = max_new_tokens if self.longest is None else min(max_new_tokens, self.longest - len(begin))
        sampler = _sampler(temperature, top_p, seed)
        batch = len(next(iter(source.values())))

        def run() -> Iterator[np.ndarray]:
            read, cache = self.encode(source), self._empty_cache(batch)
            logits_BLV = self._step(np.tile(np.array(begin, dtype=np.int64), (batch, 1)), cache, read)

            def proceed(tokens_B: np.ndarray) -> np.ndarray:
                logits: np.ndarray = self._step(tokens_B[:, None].astype(np.int64), cache, read)
                return logits[:, -1]

            yield from self._sampled(logits_BLV[:, -1], proceed, steps=room, sampler=sampler, stop_at_end=stop_at_end)

        return run()

    def run(self, source: Mapping[str, np.ndarray], decoder_ids_BL: np.ndarray, cuts: Sequence[int] = ()) -> np.ndarray:
        """Logits [B, L, V] of the decoder's tokens, int64 [B, L], of which it reads a part after the other."""
        read, cache = self.encode(source), self._empty_cache(len(decoder_ids_BL))
        edges = [0, *cuts, decoder_ids_BL.shape[1]]
        parts = [self._step(decoder_ids_BL[:, start:end], cache, read) for start, end in pairwise(edges)]
        return np.concatenate(parts, axis=1)

    def outputs(self, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Logits of a sample of `ffn2moe.parity`: half of the answer read at once, the rest token by token."""
        source = {name: array for name, array in sample.items() if name != "decoder_input_ids"}
        ids_BL = sample["decoder_input_ids"]
        return {"logits": self.run(source, ids_BL, _half_then_each(ids_BL.shape[1]))}


def _half_then_each(length: int) -> range:
    """Where to cut a text of so many tokens, to see both ways of reading it."""
    return range(max(1, length // 2), length)


class ModelExport:
    """An open export of a classifier, or of a model that gives hidden states: `run` it on what it reads."""

    def __init__(
        self,
        path: Path,
        plan: str,
        manifest: Mapping[str, Any],
        graphs: Sequence[Graph],
        tokenizer: Tokenizer | None,
    ) -> None:
        self.path = path
        self.plan = plan
        self.manifest = manifest
        self._graph = graphs[0]
        self._tokenizer = tokenizer
        self._pad_id = 0 if tokenizer is None else _padding_id(path / "tokenizer", tokenizer)
        self._outputs = list(self._graph.outputs)

    def __repr__(self) -> str:
        return f"ModelExport({str(self.path)!r}, plan={self.plan!r})"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what it reads: `input_ids` and `attention_mask`, or `pixel_values` [B, channels, H, W]."""
        return tuple(self._graph.inputs)

    def batch(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Token ids and mask of texts as one batch, int64 [B, L] each."""
        if self._tokenizer is None:
            raise ValueError("this model reads images: give `run` their pixel_values [B, channels, height, width]")
        if isinstance(texts, str):
            raise ValueError("a list of texts is wanted: write [text]")
        for index, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"text {index} is empty: leave it out")
        ids_BL, mask_BL = pad([encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))], self._pad_id)
        return {"input_ids": ids_BL, "attention_mask": mask_BL}

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name: `logits` [B, classes] of a classifier, `last_hidden_state` [B, L, D] of the others."""
        return dict(zip(self._outputs, self._graph.run(self._outputs, inputs), strict=True))

    def fix(self, shapes: Iterable[tuple[int, int]]) -> None:
        """Compile for batches of texts of these shapes apart, like `Export.fix`."""
        self._graph.fix(shapes)

    def outputs(self, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output by name, of a sample of `ffn2moe.parity`."""
        return self.run(**sample)

    def classify(self, texts: Sequence[str]) -> np.ndarray:
        """Logits [N, classes] of texts, in their order."""
        return np.concatenate([self.run(**self.batch([text]))["logits"] for text in texts])


# --- the files of an export -----------------------------------------------------------------------------------------


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the export in folder `path`."""
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is not an export: it has no {MANIFEST}; name a folder like exports/minilm (make run writes it)"
        )
    return _read_json(file, ("plans", "spec"))


def read_plan(path: Path) -> dict[str, Any] | None:
    """What the benchmark wrote beside the manifest; None where it has not run."""
    file = path / PLAN_FILE
    return _read_json(file, ("default_plan", "timings")) if file.is_file() else None


def default_plan(path: Path, plans: Mapping[str, Any]) -> str:
    """The plan that the benchmark chose, or `sorted` where none has run."""
    if not plans:
        raise ValueError(
            f"{path} has no ONNX graphs: make it without --no-onnx, or open {path / 'checkpoint'} with ffn2moe.load"
        )
    chosen = read_plan(path)
    return str(chosen["default_plan"]) if chosen else UNMEASURED_PLAN if UNMEASURED_PLAN in plans else min(plans)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def checked_files(path: Path, entry: Mapping[str, Any]) -> list[Path]:
    """The graphs of one plan: the main one, then its encoder's, if it has one.

    ValueError if the bytes of any of its files are not those that were exported.
    """
    for name, known in {entry["file"]: entry["sha256"], **entry.get("more", {})}.items():
        file = path / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: copy the whole folder again, or make the export again")
        if sha256(file) != known:
            raise ValueError(
                f"{file} is damaged (its sha256 is not the one in {MANIFEST}): "
                "copy the folder again, or make the export again"
            )
    return [path / entry[key] for key in ("file", "encoder") if key in entry]


def sha256(file: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_json(file: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        missing = [key for key in keys if key not in content]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): copy it again, or make the export again") from error
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}: it is not of this version; make the export again")
    return content


# --- text to batches ------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path, max_length: int | None) -> Tokenizer:
    """The fast tokenizer saved in `folder`, cutting texts to `max_length` tokens, if any, and padding none."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: copy the whole export again, or make it again")
    tokenizer = Tokenizer.from_file(str(file))
    if max_length is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    return tokenizer


def _padding_id(folder: Path, tokenizer: Tokenizer) -> int:
    """The id of the padding token; masked positions are never read, so 0 does where there is none."""
    config = folder / "tokenizer_config.json"
    token = _read_json(config, ()).get("pad_token") if config.is_file() else None
    name = token["content"] if isinstance(token, dict) else token
    return (tokenizer.token_to_id(name) if name else None) or 0


def batches_by_length(ids: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of texts, longest first, in batches of texts of about one length that hold `batch_tokens` at most.

    A longer text is a batch by itself.
    """
    batch: list[int] = []
    for index in sorted(range(len(ids)), key=lambda index: -len(ids[index])):
        if batch and (len(batch) + 1) * len(ids[batch[0]]) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad(ids: Sequence[Sequence[int]], pad_id: int, *, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, int64 [B, L], padded on the right, or on the left as texts are that go on."""
    longest = max(map(len, ids))
    ids_BL = np.full((len(ids), longest), pad_id, dtype=np.int64)
    mask_BL = np.zeros_like(ids_BL)
    for row, tokens in enumerate(ids):
        place = slice(longest - len(tokens), longest) if left else slice(0, len(tokens))
        ids_BL[row, place] = tokens
        mask_BL[row, place] = 1
    return ids_BL, mask_BL


# --- the MoE ops on this runtime ------------------------------------------------------------------------------------


def swiglu_rows(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Rows [E, M, ...] of gate and up as the MoE ops take them, [E, 2M, ...]: gate 0, up 0, gate 1, up 1, ..."""
    E, M, *rest = gate.shape
    return np.stack([gate, up], axis=2).reshape(E, 2 * M, *rest)


def quantize_blocks(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix [..., N, K] in 8 or 4 bits, symmetric, with a scale for each `BLOCK` weights of a row.

    Gives uint8 [..., N, K * bits / 8], zero at 2^(bits - 1) and of two 4-bit numbers the first in the low half, and
    float32 scales [..., N, K / BLOCK]. K is made a multiple of the block by zeros.
    """
    *outer, N, K = weight.shape
    weight = np.pad(weight, [(0, 0)] * (len(outer) + 1) + [(0, -K % BLOCK)])
    blocks = weight.reshape(*outer, N, -1, BLOCK)
    largest = 2 ** (bits - 1) - 1
    scales = (np.abs(blocks).max(-1) / np.float32(largest)).astype(np.float32)
    steps = np.rint(blocks / np.maximum(scales, np.finfo(np.float32).tiny)[..., None])
    packed = (np.clip(steps, -largest, largest) + 2 ** (bits - 1)).astype(np.uint8).reshape(*outer, N, -1)
    if bits == 4:
        packed = packed[..., 0::2] | (packed[..., 1::2] << 4)
    return packed, scales


def dequantize_blocks(packed: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """The weights [..., N, K] that `quantize_blocks` left."""
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    steps = packed.astype(np.float64).reshape(*scales.shape, BLOCK) - 2 ** (bits - 1)
    return (steps * scales[..., None]).reshape(packed.shape)


def self_tests(plan: str, spec: Mapping[str, Any], providers: Sequence[str] = CPU) -> float:
    """Checks the operator of a plan on this runtime for every kind of FFN of the model; the largest difference."""
    kinds = sorted({(stack["activation"], stack["gated"]) for stack in spec["stacks"]})
    numbers = NATIVE_PLANS.get(form_of(plan))
    if numbers is not None:
        return max(native_self_test(activation, *numbers, gated=gated) for activation, gated in kinds)
    bits = {"qmoe8": 8, "qmoe4": 4}.get(form_of(plan), 32)
    return max(self_test(activation, providers, gated=gated, bits=bits) for activation, gated in kinds)


def self_test(activation: str, providers: Sequence[str] = CPU, *, gated: bool = False, bits: int = 32) -> float:
    """Checks that this runtime's `com.microsoft.MoE` routes, weighs and activates as the export expects.

    The op changed silently between releases (no softmax in one, hard-coded constants in another), so a tiny layer
    is compared with float64 arithmetic. With 8 or 4 `bits` the op is `com.microsoft.QMoE`, and the layout of its
    bits, its zero points and its scales are checked too. Gives the largest difference (of QMoE as a share of the
    largest output); RuntimeError where it is not the op we know. GELU may be the erf or the tanh form: kernels
    differ, and the manifest says what was measured.
    """
    op = "com.microsoft.MoE" if bits == 32 else "com.microsoft.QMoE"
    E, K, D, M, T = (4, 2, 8, 8, 6) if bits == 32 else (4, 2, 2 * BLOCK, BLOCK, 6)
    random = np.random.default_rng(0)
    x_TD = random.standard_normal((T, D)).astype(np.float32)
    w_in_EMD = random.standard_normal((E, M, D)).astype(np.float32)
    b_in_EM = random.standard_normal((E, M)).astype(np.float32)
    w_out_EDM = random.standard_normal((E, D, M)).astype(np.float32)
    chosen_TK = np.stack([random.permutation(E)[:K] for _ in range(T)])
    logits_TE = np.full((T, E), MASKED_LOGIT, dtype=np.float32)
    weight_TK = np.full((T, K), 1 / K)
    if gated:  # gates that differ: a plain FFN's gates are equal, as they always were
        weight_TK = random.dirichlet(np.ones(K), T)
    np.put_along_axis(logits_TE, chosen_TK, np.log(weight_TK * K).astype(np.float32), axis=1)
    if gated:
        w_in_EMD = np.concatenate([w_in_EMD, random.standard_normal((E, M, D)).astype(np.float32)], axis=1)
        b_in_EM = np.concatenate([b_in_EM, random.standard_normal((E, M)).astype(np.float32)], axis=1)

    model = _moe_graph(activation, K, gated, bits, w_in_EMD, b_in_EM, w_out_EDM)
    try:
        (y_TD,) = session(model, threads=1, providers=providers).run(None, {"x": x_TD, "logits": logits_TE})
    except Exception as error:  # whatever the runtime throws: the op is not usable
        raise RuntimeError(f"this onnxruntime cannot run {op} ({error}); open the export with plan='sorted'") from error
    if bits != 32:
        w_in_EMD, w_out_EDM = (
            dequantize_blocks(*quantize_blocks(weight, bits), bits) for weight in (w_in_EMD, w_out_EDM)
        )

    def layer(act: Any) -> np.ndarray:
        h_TEM = np.einsum("td,emd->tem", x_TD, w_in_EMD, dtype=np.float64) + b_in_EM
        h_TEM = act(h_TEM[..., :M]) * h_TEM[..., M:] if gated else act(h_TEM)
        y_TED = np.einsum("tem,edm->ted", h_TEM, w_out_EDM)
        return np.einsum("tk,tkd->td", weight_TK, np.take_along_axis(y_TED, chosen_TK[:, :, None], axis=1))

    expected = [layer(act) for act in _ACTIVATIONS[activation]]
    difference = min(float(np.abs(y_TD - y).max()) for y in expected)
    tolerance = 1e-4
    if bits != 32:
        # As a share of the largest output. With 8 bits the kernel quantises the activations as well.
        difference /= float(np.abs(expected[0]).max())
        tolerance = 0.05 if bits == 8 else 1e-4
    if not difference < tolerance:
        raise RuntimeError(
            f"{op} of this onnxruntime computes something else (off by {difference:.2g}): its routing, activation "
            "or layout of bits differs; open the export with plan='sorted', or use another onnxruntime"
        )
    return difference


# Largest difference of the native operator from float64 arithmetic, as a share of the largest output. In the bfloat16
# and 8-bit forms the activations are rounded twice.
NATIVE_TOLERANCE: dict[native.Activations, float] = {"bf16": 2e-2, "int16": 1e-3, "int8": 5e-2}


def native_self_test(
    activation: Activation, weights: native.Weights, activations: native.Activations, *, gated: bool = False
) -> float:
    """Checks that the operator, as it is built, computes a tiny layer as `ffn2moe.native` defines it, routed or not.

    Gives the largest difference, as a share of the largest output. RuntimeError where it computes something else,
    EngineMissing or FileNotFoundError where there is no OpenVINO or no operator.
    """
    E, K, D, M, T = 4, 2, 40, 24, 70  # no multiple of what the kernels take at once
    random = np.random.default_rng(0)
    x_TD = random.standard_normal((T, D)).astype(np.float32)
    chosen_TK = np.stack([random.permutation(E)[:K] for _ in range(T)])
    gates_TK = random.uniform(0.5, 1.5, (T, K)).astype(np.float32)
    gates_TK[::3, 1] = 0
    shapes = {"w_in_EMD": (E, M, D), "w_out_EDM": (E, D, M)} | ({"w_gate_EMD": (E, M, D)} if gated else {})
    parts = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    names = ("b_in_EM", "b_gate_EM") if gated else ("b_in_EM",)
    biases = {name: random.standard_normal((E, M)).astype(np.float32) for name in names}
    router_ED, norm = random.standard_normal((E, D)).astype(np.float32), native.Norm("layer", np.ones(D))
    frame = native.frame(router_ED, np.zeros(E), norm_out=norm)
    graph = OpenVinoGraph(
        _native_graph(
            native.attributes(D, M, gated=gated, activation=activation, weights=weights, activations=activations),
            native.routed_attributes(E, K, "softmax_topk", added="x", norm_out=norm),
            native.pack_experts(weights, **parts, **biases),
            frame,
            D,
        ),
        threads=1,
        precision="float32",
        extension=native.library(),
    )
    found = graph.run(["y", "routed"], {"x": x_TD, "chosen": chosen_TK, "gates": gates_TK})
    experts: dict[str, Any] = {name: native.round_weights(weights, part) for name, part in parts.items()} | biases
    experts["activation"] = activation
    expected = (
        native.reference(x_TD, chosen_TK, gates_TK, **experts),
        native.routed_reference(x_TD, router_ED, np.zeros(E), K, "softmax_topk", added="x", norm_out=norm, **experts),
    )
    differences = [np.abs(y - exact).max() / np.abs(exact).max() for y, exact in zip(found, expected, strict=True)]
    difference = float(max(differences))
    if not difference < NATIVE_TOLERANCE[activations]:
        raise RuntimeError(
            f"the operator of {native.DOMAIN} with weights in {weights}, activations in {activations}, computes "
            f"something else on this machine (off by {difference:.2g} of the largest output): build it again (make "
            "native), or take the plan ov-sorted"
        )
    return difference


def _native_graph(
    attributes: Mapping[str, Any], routed: Mapping[str, Any], experts: np.ndarray, frame: np.ndarray, width: int
) -> bytes:
    """A model of both nodes of the operator, as plans hold them: outputs `y` of Experts, `routed` of RoutedExperts."""
    from onnx import TensorProto, helper, numpy_helper

    common = {"domain": native.DOMAIN, **attributes}
    tokens = ["tokens", "chosen experts"]
    graph = helper.make_graph(
        [
            helper.make_node(native.OP_TYPE, ["x", "chosen", "gates", "experts"], ["y"], **common),
            helper.make_node(native.ROUTED_OP_TYPE, ["x", "experts", "frame"], ["routed"], **common, **routed),
        ],
        "self_test",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", width]),
            helper.make_tensor_value_info("chosen", TensorProto.INT64, tokens),
            helper.make_tensor_value_info("gates", TensorProto.FLOAT, tokens),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", width]) for name in ("y", "routed")],
        [numpy_helper.from_array(experts, "experts"), numpy_helper.from_array(frame, "frame")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(native.DOMAIN, native.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _erf_gelu(z: np.ndarray) -> np.ndarray:
    return 0.5 * z * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))


def _tanh_gelu(z: np.ndarray) -> np.ndarray:
    return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


_ACTIVATIONS: dict[str, tuple[Any, ...]] = {
    "gelu": (_tanh_gelu, _erf_gelu),
    "gelu_tanh": (_tanh_gelu, _erf_gelu),
    "relu": (lambda z: np.maximum(z, 0),),
    "silu": (lambda z: z / (1 + np.exp(-z)),),
}


def _moe_graph(
    activation: str,
    num_active: int,
    gated: bool,
    bits: int,
    w_in_EMD: np.ndarray,
    b_in_EM: np.ndarray,
    w_out_EDM: np.ndarray,
) -> bytes:
    """A model of one MoE or QMoE node, as a plan holds it. Of a gated FFN the rows of the gate come first."""
    from onnx import TensorProto, helper, numpy_helper

    width, experts = w_in_EMD.shape[2], w_in_EMD.shape[0]
    attributes: dict[str, Any] = {"activation_type": MOE_ACTIVATIONS[activation]}
    if gated:
        w_in_EMD, b_in_EM = (swiglu_rows(*np.split(part, 2, axis=1)) for part in (w_in_EMD, b_in_EM))
        attributes = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    tensors = {"fc1": w_in_EMD, "fc1_bias": b_in_EM, "fc2": w_out_EDM}
    if bits != 32:
        attributes |= {"expert_weight_bits": bits, "block_size": BLOCK}
        fc1, fc1_scales = quantize_blocks(w_in_EMD, bits)
        fc2, fc2_scales = quantize_blocks(w_out_EDM, bits)
        tensors = {"fc1": fc1, "s1": fc1_scales, "fc1_bias": b_in_EM, "fc2": fc2, "s2": fc2_scales}
    node = helper.make_node(
        "MoE" if bits == 32 else "QMoE",
        ["x", "logits", *tensors],
        ["y"],
        domain=MICROSOFT,
        k=num_active,
        normalize_routing_weights=1,
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "self_test",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", width]),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["tokens", experts]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", width])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
