"""Carry a tokenizer into a GGUF file, or refuse it by what llama.cpp would do differently.

llama.cpp knows two kinds of byte-pair tokenizers: of bytes, whose texts are first split by a rule that it knows by name
("tokenizer.ggml.pre"), and SentencePiece's, which has scores instead of merges.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gguf

from ffn2moe.dense.gguf import GPT2_RULE, SINGLE_DIGITS_RULE

# The rule for a split by a regular expression, by whether whole words are looked up before merges are applied. They are
# names of the table from which transformers reads them.
_RULES = {
    ("llama-bpe", True): "llama-bpe",
    ("smaug-bpe", False): "smaug-bpe",
    ("tekken", True): "tekken",
    ("qwen2", False): "qwen2",
    ("qwen35", False): "qwen35",
    ("gpt-4o", False): "gpt-4o",
}
_KEYS = gguf.Keys.Tokenizer
_END_KEYS = (_KEYS.EOS_ID, _KEYS.EOT_ID, _KEYS.EOM_ID)
_TYPES = gguf.TokenType


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as metadata of a GGUF file."""

    metadata: dict[str, Any]
    notes: tuple[str, ...] = ()


def vocabulary_of(tokenizer: Any, config: Any, ends: Sequence[int] = ()) -> Vocabulary:
    """Return a transformers tokenizer as metadata; `ends` are the tokens that end a text.

    ValueError, which names what is different, for one that llama.cpp cannot run.
    """
    if not tokenizer.is_fast:
        raise _refusal(f"it runs in Python only ({type(tokenizer).__name__})")
    own = json.loads(tokenizer.backend_tokenizer.to_str())
    if own["model"]["type"] != "BPE":
        raise _refusal(f"it is of the kind {own['model']['type']}")
    pieces = own["model"]["byte_fallback"]
    metadata: dict[str, Any] = _pieces(own) if pieces else {_KEYS.MODEL: "gpt2", _KEYS.PRE: _rule(own)}
    metadata |= _tokens(tokenizer, own, config.vocab_size, pieces=pieces)
    metadata |= _special(tokenizer, config) | _around(tokenizer)
    notes: list[str] = []
    if not ends:
        ends = [metadata[_KEYS.EOS_ID]] if _KEYS.EOS_ID in metadata else []
    first = tokenizer.eos_token_id
    ordered = sorted(dict.fromkeys(ends), key=lambda token: token != first)
    metadata |= dict(zip(_END_KEYS, ordered, strict=False))
    if len(ordered) > len(_END_KEYS):
        left = ", ".join(tokenizer.convert_ids_to_tokens(ordered[len(_END_KEYS) :]))
        notes.append(f"GGUF names {len(_END_KEYS)} tokens that end a text; left to llama.cpp's own list: {left}")
    template = tokenizer.chat_template
    if template is None:
        notes.append("no chat template: llama.cpp will chat by a default one, which the model has not learned")
    else:
        metadata[_KEYS.CHAT_TEMPLATE] = template if isinstance(template, str) else template["default"]
    if (own.get("normalizer") or {}).get("type") == "NFC":
        notes.append("llama.cpp does not compose characters (NFC), as the tokenizer does")
    return Vocabulary(metadata, tuple(notes))


def _refusal(reason: str) -> ValueError:
    return ValueError(
        f"its tokenizer cannot be carried into GGUF: {reason}, and llama.cpp would split texts otherwise; serve the "
        "folder with transformers or vLLM"
    )


def _rule(own: dict[str, Any]) -> str:
    """Return llama.cpp's name of the rule that splits texts into words, for a byte-level tokenizer."""
    if (own.get("normalizer") or {}).get("type", "NFC") != "NFC":
        raise _refusal(f"it normalises texts ({own['normalizer']['type']})")
    if own["model"].get("continuing_subword_prefix") or own["model"].get("end_of_word_suffix"):
        raise _refusal("it marks parts of words")
    before = own.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    whole = bool(own["model"]["ignore_merges"])
    if kinds[-1] != "ByteLevel" or last["add_prefix_space"]:
        raise _refusal(f"it splits texts by {' and '.join(map(str, kinds))}, not into bytes alone")
    if kinds == ["ByteLevel"] and last["use_regex"] and not whole:
        return GPT2_RULE
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and last["use_regex"] and not whole:
        return SINGLE_DIGITS_RULE
    if kinds == ["Split", "ByteLevel"] and not last["use_regex"]:
        found = _split_rule(steps[0], whole)
        if found is not None:
            return found
        raise _refusal(f"no rule of llama.cpp is {json.dumps(steps[0]['pattern'], ensure_ascii=False)}")
    raise _refusal(f"no rule of llama.cpp splits texts by {' and '.join(map(str, kinds))} as it does")


def _split_rule(step: dict[str, Any], whole: bool) -> str | None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if step["behavior"] != "Isolated" or step["invert"]:
        return None
    pattern = step["pattern"].get("Regex")
    return next(
        (
            rule
            for (name, looks), rule in _RULES.items()
            if looks == whole and GGUF_PRE_TOKENIZER_SPLITS[name] == pattern
        ),
        None,
    )


def _pieces(own: dict[str, Any]) -> dict[str, Any]:
    """Return kind and space of a SentencePiece tokenizer."""
    normalizer, before = own.get("normalizer") or {}, own.get("pre_tokenizer") or {}
    if not normalizer and before.get("type") == "Metaspace" and not before["split"]:
        space = before["prepend_scheme"] != "never"
    elif normalizer and not before:
        steps = normalizer.get("normalizers", [normalizer])
        kinds = [step["type"] for step in steps]
        if kinds not in (["Prepend", "Replace"], ["Replace"]):
            raise _refusal(f"it normalises texts by {' and '.join(kinds)}")
        space = kinds[0] == "Prepend"
    else:
        raise _refusal("it is no SentencePiece tokenizer as LLaMA has")
    return {_KEYS.MODEL: "llama", _KEYS.PRE: "default", _KEYS.ADD_PREFIX: space}


def _tokens(tokenizer: Any, own: dict[str, Any], count: int, *, pieces: bool) -> dict[str, Any]:
    """Return the tokens, their kinds, and merges or scores. ValueError where the model knows fewer."""
    if len(tokenizer) > count:
        raise _refusal(f"it has {len(tokenizer)} tokens, and the model knows {count}")
    tokens, kinds = [f"[PAD{index}]" for index in range(count)], [_TYPES.UNUSED] * count
    for token, index in tokenizer.get_vocab().items():
        byte = pieces and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[index], kinds[index] = token, _TYPES.BYTE if byte else _TYPES.NORMAL
    for added in own["added_tokens"]:
        index = added["id"]
        kinds[index] = _TYPES.CONTROL if added["special"] else _TYPES.USER_DEFINED
        if pieces and not added["special"]:
            tokens[index] = added["content"].replace("▁", " ")
        elif pieces and added["content"] == own["model"]["unk_token"]:
            kinds[index] = _TYPES.UNKNOWN
    found = {_KEYS.LIST: tokens, _KEYS.TOKEN_TYPE: [int(kind) for kind in kinds]}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in own["model"]["merges"]]
    if not pieces:
        return found | {_KEYS.MERGES: [" ".join(merge) for merge in merges]}
    return found | {_KEYS.SCORES: _scores(tokens, kinds, merges)}


def _scores(tokens: list[str], kinds: list[Any], merges: list[list[str]]) -> list[float]:
    """Return a score of each piece, by which llama.cpp merges the same pieces first. ValueError where it would not.

    llama.cpp joins two pieces wherever the whole is a token, so each token of several characters must be made by a
    merge.
    """
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(merges):
        rank.setdefault(left + right, index)
    scores = []
    for token, kind in zip(tokens, kinds, strict=True):
        if kind is not _TYPES.NORMAL:
            scores.append(0.0)
        elif token in rank:
            scores.append(-float(rank[token]))
        elif len(token) > 1:
            raise _refusal(f"the piece {token!r} is made by no merge")
        else:
            scores.append(-float(len(merges)))
    return scores


def _special(tokenizer: Any, config: Any) -> dict[str, int]:
    """Return the ids of the special tokens. llama.cpp would invent a first token where there is none."""
    found = {
        _KEYS.BOS_ID: tokenizer.bos_token_id,
        _KEYS.EOS_ID: tokenizer.eos_token_id,
        _KEYS.UNK_ID: tokenizer.unk_token_id,
        _KEYS.PAD_ID: tokenizer.pad_token_id,
    }
    if found[_KEYS.BOS_ID] is None:
        own = config.bos_token_id
        found[_KEYS.BOS_ID] = tokenizer.eos_token_id if own is None else own
    return {key: value for key, value in found.items() if value is not None}


def _around(tokenizer: Any) -> dict[str, bool]:
    """Return whether a text gets the first and the last token. ValueError for other tokens around it."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for first in (False, True):
        for last in (False, True):
            begin = [tokenizer.bos_token_id] if first else []
            end = [tokenizer.eos_token_id] if last else []
            if whole == [*begin, *plain, *end]:
                return {_KEYS.ADD_BOS: first, _KEYS.ADD_EOS: last}
    raise _refusal("it writes other tokens around a text than the first and the last one")
