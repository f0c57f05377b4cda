"""Generate text with an exported decoder and its key-value cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np

from ffn2moe.runtime.batching import pad
from ffn2moe.runtime.chat import TEMPLATE_FILE, Message, rendered, require_messages, template_of
from ffn2moe.runtime.engines import Graph
from ffn2moe.runtime.opened import Opened, require_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PREFILL_TOKENS = 512  # read at once from a prompt: the logits of all of them may be in memory together
LOGITS_AT = "logits_at"  # input [n]: the places of the tokens whose logits are computed
LAST = np.array([-1])  # the place of the last token


class Sampling(TypedDict, total=False):
    """How the tokens of a text are drawn, and when it ends. ValueError for a value out of range."""

    max_new_tokens: int  # the most (128); fewer where the model can hold no more
    temperature: float  # 0 (the default) takes the likeliest token
    top_p: float  # draws from the fewest likeliest tokens that together have this probability (1: all tokens)
    seed: int  # of the draws (0)
    stop_at_end: bool  # whether the model's end token ends the text (True)


class _Decoder(Opened):
    """Decode with a cache: the part that language models and the decoders of seq2seq models share."""

    gives = "text"

    def __init__(
        self, path: Path, plan: str, manifest: Mapping[str, Any], graphs: Sequence[Graph], tokenizer: Tokenizer
    ) -> None:
        super().__init__(path, plan, manifest, graphs, tokenizer)
        self._encoder = graphs[1] if len(graphs) > 1 else None
        self._model: Mapping[str, Any] = manifest["model"]
        # The cached keys and values have shapes [B, H, tokens, d].
        self._cache_shapes = {
            name: shape for name, shape in self._graph.inputs.items() if name.startswith("past_key_values.")
        }

    @property
    def longest(self) -> int | None:
        """The tokens that the model can hold, prompt and answer together; None without a limit."""
        limit = self._model["positions"]
        return None if limit is None else int(limit)

    def _empty_cache(self, batch: int) -> dict[str, Any]:
        return {
            name: np.zeros((batch, shape[1], 0, shape[3]), dtype=np.float32)
            for name, shape in self._cache_shapes.items()
        }

    def _step(
        self, ids_BL: np.ndarray, cache: dict[str, Any], others: Mapping[str, Any], at_n: np.ndarray | None = None
    ) -> np.ndarray:
        """Return logits [B, n, V] at these places (None: all L, [B, L, V]), and replace the cache by the longer one.

        A graph without the input `LOGITS_AT` gives all of them.
        """
        given = {"input_ids": ids_BL, **others, **cache}
        if LOGITS_AT in self._graph.inputs:
            given[LOGITS_AT] = np.arange(ids_BL.shape[1]) if at_n is None else at_n
        found = self._graph.run_values(self._outputs, given)
        by_name = dict(zip(self._outputs, found, strict=True))
        for name in cache:
            cache[name] = by_name[name.replace("past_key_values", "present")]
        return self._graph.array(by_name["logits"])

    def _require_room(self, tokens: int, what: str) -> None:
        if self.longest is not None and tokens > self.longest:
            raise ValueError(f"{what} has {tokens} tokens, but this model can hold {self.longest}: shorten it")

    def _pieces(self, steps: Iterator[np.ndarray], before: Sequence[int]) -> Iterator[str]:
        """Yield text as it becomes certain: a character may need several tokens, and a space the token before it.

        `steps` are those of one text.
        """
        ids = list(before)
        start, read = max(0, len(ids) - 6), len(ids)
        for [token] in steps:
            if token < 0:
                break
            ids.append(int(token))
            known, text = self._tokenizer.decode(ids[start:read]), self._tokenizer.decode(ids[start:])
            if len(text) > len(known) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(known) :]
                start, read = read, len(ids)
        known, text = self._tokenizer.decode(ids[start:read]), self._tokenizer.decode(ids[start:])
        if text[len(known) :]:
            yield text[len(known) :]

    def _sampled(
        self,
        start: Callable[[], tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]],
        held: int,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_at_end: bool = True,
    ) -> Iterator[np.ndarray]:
        """Yield tokens [B], int64, step by step, -1 for a row that has ended (`Sampling`).

        `start` reads `held` tokens, and returns the logits [B, V] after them and a function that takes a step's tokens
        and returns the next logits.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {max_new_tokens} must be 1 or more")
        steps = max_new_tokens if self.longest is None else min(max_new_tokens, self.longest - held)
        sampler = _sampler(temperature, top_p, seed)
        ends = list(self._model["eos_token_ids"]) if stop_at_end else []

        def run() -> Iterator[np.ndarray]:
            logits_BV, proceed = start()
            done_B = np.zeros(len(logits_BV), dtype=bool)
            for step in range(steps):
                if not np.isfinite(logits_BV.max(-1)[~done_B]).all():  # NaN is the largest of any row
                    raise RuntimeError(
                        f"the plan {self.plan} gave logits that are NaN or infinite: run `ffn2moe verify {self.path}`"
                    )
                tokens_B = sampler(logits_BV)
                done_B |= np.isin(tokens_B, ends)
                yield np.where(done_B, -1, tokens_B)
                if done_B.all() or step + 1 == steps:
                    return
                logits_BV = proceed(np.where(done_B, self._pad_id, tokens_B))

        return run()


def _sampler(temperature: float, top_p: float, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that draws a token for each row of logits [B, V].

    At temperature 0 it takes the likeliest, else it draws from the fewest likeliest that together
    have `top_p` of the probability.
    """
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

    continues_prompt = True  # the generated text belongs behind the prompt

    def token_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Return the token ids of a prompt, with the tokenizer's own first tokens; ids are taken as they are."""
        if prompt is None or isinstance(prompt, str | bytes):
            ids = self._tokenizer.encode(require_text(prompt, "the prompt", may_be_empty=True)).ids
        else:
            ids = [int(token) for token in prompt]
        if not ids and self._model["bos_token_id"] is not None:
            ids = [int(self._model["bos_token_id"])]
        if not ids:
            raise ValueError("the prompt is empty, and this model has no token to begin a text with: give it a word")
        vocabulary = self._model.get("vocabulary", self._graph.outputs["logits"][-1])
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise ValueError(f"a token id of the prompt is outside of the vocabulary, 0 to {vocabulary - 1}")
        return ids

    def generate(self, prompt: str | Sequence[int], **sampling: Unpack[Sampling]) -> Iterator[str]:
        """Yield the continuation of a prompt, piece by piece (`Sampling`).

        It ends with the model's end token, after `max_new_tokens`, or where the model can hold no more. ValueError for
        a prompt that is longer than that, or parameters out of range.
        """
        ids = self.token_ids(prompt)
        return self._pieces(self.generate_tokens([ids], **sampling), ids)

    def chat(self, messages: Sequence[Message], **sampling: Unpack[Sampling]) -> Iterator[str]:
        """Yield the answer to messages of a conversation, piece by piece (`Sampling`).

        A message is {"role": "user", "content": "Who are you?"}. ValueError for a model without a chat template, and
        as `generate`.
        """
        ids = self.chat_ids(messages)
        return self._pieces(self.generate_tokens([ids], **sampling), ids)

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of messages and of the beginning of the answer. ValueError without a chat template."""
        if self.chat_template is None:
            raise ValueError(
                f"{self.path} has no chat template: its model continues texts (`ffn2moe generate` without --chat). If "
                f"it has learned to chat, put its {TEMPLATE_FILE} into {self.path / 'tokenizer'}"
            )
        text = rendered(self.chat_template, require_messages(messages), self.path / "tokenizer")
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)  # the template writes them

    @cached_property
    def chat_template(self) -> str | None:
        """The template that writes messages as a text; None where the tokenizer came without one."""
        return template_of(self.path / "tokenizer")

    def generate_tokens(
        self, prompts: Sequence[str | Sequence[int]], **sampling: Unpack[Sampling]
    ) -> Iterator[np.ndarray]:
        """Yield token ids [B], int64, for each step of a batch of prompts of any lengths; -1 where a text has ended."""
        if isinstance(prompts, str):
            raise ValueError("generate_tokens takes a list of prompts: write generate_tokens([prompt])")
        rows = [self.token_ids(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        self._require_room(longest + 1, "the prompt with the first token of its answer")
        ids_BL, mask_BL = pad(rows, self._pad_id, left=True)

        def start() -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
            cache, mask = self._empty_cache(len(rows)), mask_BL
            for first in range(0, longest, PREFILL_TOKENS):
                end = min(first + PREFILL_TOKENS, longest)
                logits_BLV = self._step(ids_BL[:, first:end], cache, {"attention_mask": mask[:, :end]}, LAST)

            def proceed(tokens_B: np.ndarray) -> np.ndarray:
                nonlocal mask
                mask = np.concatenate([mask, np.ones((len(rows), 1), dtype=np.int64)], axis=1)
                ids_B1 = tokens_B[:, None].astype(np.int64)
                logits: np.ndarray = self._step(ids_B1, cache, {"attention_mask": mask}, LAST)
                return logits[:, -1]

            return logits_BLV[:, -1], proceed

        return self._sampled(start, longest, **sampling)

    def run(self, ids_BL: np.ndarray, mask_BL: np.ndarray, cuts: Sequence[int] = ()) -> np.ndarray:
        """Return logits [B, L, V] of token ids and their mask, int64 [B, L], padded on either side.

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
        """Return logits of a sample of `ffn2moe.onnx.parity`: half of it is read at once, the rest token by token."""
        length = sample["input_ids"].shape[1]
        return {"logits": self.run(sample["input_ids"], sample["attention_mask"], _half_then_each(length))}

    def logits(self, prompt: str | Sequence[int]) -> np.ndarray:
        """Return logits [L, V] after each token of a prompt; ValueError for one longer than the model can hold."""
        ids = self.token_ids(prompt)
        self._require_room(len(ids), "the prompt")
        ids_BL, mask_BL = pad([ids], self._pad_id)
        logits_LV: np.ndarray = self.run(ids_BL, mask_BL, range(PREFILL_TOKENS, len(ids), PREFILL_TOKENS))[0]
        return logits_LV

    def score(self, text: str | Sequence[int]) -> tuple[float, int]:
        """Return minus the logarithm of a text's probability, in nats, and the number of predicted tokens.

        The first token is given. A text longer than the model can hold is truncated.
        """
        ids = self.token_ids(text)[: self.longest]
        if len(ids) < 2:
            raise ValueError("the text has no second token to predict: give a longer one")
        z_LV = self.logits(ids)[:-1].astype(np.float64)
        z_LV -= z_LV.max(-1, keepdims=True)
        nats_L = np.log(np.exp(z_LV).sum(-1)) - np.take_along_axis(z_LV, np.array(ids[1:])[:, None], axis=1)[:, 0]
        return float(nats_L.sum()), len(nats_L)

    def perplexity(self, texts: Sequence[str]) -> float:
        """Return exp of the mean nats per token over texts, each truncated to the tokens that the model can hold."""
        if isinstance(texts, str):
            raise ValueError("perplexity takes a list of texts: write perplexity([text])")
        nats, tokens = zip(*map(self.score, texts), strict=True)
        return math.exp(sum(nats) / sum(tokens))


class Seq2SeqExport(_Decoder):
    """An open export of an encoder with a decoder: `generate` from a text, or from speech features."""

    continues_prompt = False

    def source(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the encoder's input for texts."""
        ids_BL, mask_BL = pad(self._ids_of(texts, "source"), self._pad_id)
        return {"input_ids": ids_BL, "attention_mask": mask_BL}

    def encode(self, source: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return the decoder's input from a source: keys and values for each of its layers, and the source's mask."""
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
        **sampling: Unpack[Sampling],
    ) -> Iterator[str]:
        """Yield the answer to a text, or to the encoder's input (`input_features` [1, mel bins, frames] for speech).

        `decoder_ids` begin the answer, after the model's start token (language and task, in Whisper). It ends as the
        answer of a language model does.
        """
        prepared = self.source([source]) if isinstance(source, str) else source
        steps = self.generate_tokens(prepared, decoder_ids=decoder_ids, **sampling)
        return self._pieces(steps, self._begin(decoder_ids))

    def generate_tokens(
        self, source: Mapping[str, np.ndarray], *, decoder_ids: Sequence[int] = (), **sampling: Unpack[Sampling]
    ) -> Iterator[np.ndarray]:
        """Yield token ids [B], int64, for each step of the answers to a batch; -1 where an answer has ended."""
        begin = self._begin(decoder_ids)
        self._require_room(len(begin) + 1, "the beginning of the answer with the first token after it")
        batch = len(next(iter(source.values())))

        def start() -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
            read, cache = self.encode(source), self._empty_cache(batch)
            logits_BLV = self._step(np.tile(np.array(begin, dtype=np.int64), (batch, 1)), cache, read)

            def proceed(tokens_B: np.ndarray) -> np.ndarray:
                logits: np.ndarray = self._step(tokens_B[:, None].astype(np.int64), cache, read)
                return logits[:, -1]

            return logits_BLV[:, -1], proceed

        return self._sampled(start, len(begin), **sampling)

    def _begin(self, decoder_ids: Sequence[int]) -> list[int]:
        return [int(self._model["decoder_start_token_id"]), *decoder_ids]

    def run(self, source: Mapping[str, np.ndarray], decoder_ids_BL: np.ndarray, cuts: Sequence[int] = ()) -> np.ndarray:
        """Return logits [B, L, V] of the decoder's tokens, int64 [B, L], read in parts that end before `cuts`."""
        read, cache = self.encode(source), self._empty_cache(len(decoder_ids_BL))
        edges = [0, *cuts, decoder_ids_BL.shape[1]]
        parts = [self._step(decoder_ids_BL[:, start:end], cache, read) for start, end in pairwise(edges)]
        return np.concatenate(parts, axis=1)

    def outputs(self, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return logits of a sample of `ffn2moe.onnx.parity`: half the answer at once, the rest token by token."""
        source = {name: array for name, array in sample.items() if name != "decoder_input_ids"}
        ids_BL = sample["decoder_input_ids"]
        return {"logits": self.run(source, ids_BL, _half_then_each(ids_BL.shape[1]))}


def _half_then_each(length: int) -> range:
    """Return the positions that split a text into a half read at once and single tokens."""
    return range(max(1, length // 2), length)
