"""Language models for GGUF: tokenizers of each kind that llama.cpp runs, and folders of tiny models that have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.tokenization_utils_base import generate_merges

from ffn2moe.containers import write
from ffn2moe.dense.reduction import set_ffn_widths
from tests.test_containers import config_of, dense_of, student_of
from tests.texts import make_texts

VOCABULARY = 320  # of the models; their tokenizers have fewer tokens
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eom|>"]
TEXT = "Once upon a time, 12345 of Tom's cats weren't  at\n\nhome. Ünïcödé 世界 🦙!\tThey've ran: x=3.14;   end "
TEXTS = [TEXT, "the red house", " leading", "trailing \n", "a\r\nb", "I'LL don't 1234567", "«ça», ...!?"]


def byte_level(rule: str = "gpt-2", **model: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that splits texts by a rule of llama.cpp, with a chat template."""
    inner = Tokenizer(models.BPE(**model))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    steps: Any = {"gpt-2": whole}
    steps["smollm"] = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    if rule in GGUF_PRE_TOKENIZER_SPLITS:
        split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[rule]), behavior="isolated")
        steps[rule] = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    inner.pre_tokenizer = steps[rule]
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([*make_texts(60), *TEXTS], trainer)
    inner.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def pieces(*, prefix: bool = True) -> PreTrainedTokenizerFast:
    """A SentencePiece tokenizer as LLaMA's: pieces with a mark for spaces, bytes for what has none, a first token."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prefix else "never")
    trained.train_from_iterator(make_texts(60), trainers.BpeTrainer(vocab_size=56, show_progress=False))
    own = sorted(trained.get_vocab(), key=trained.token_to_id)[:56]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *own]
    vocab = {token: index for index, token in enumerate(tokens)}
    scores = {token: -float(index) for token, index in vocab.items()}
    merges = [merge for merge in generate_merges(vocab, scores) if "".join(merge) in own]
    inner = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = [normalizers.Replace(" ", "▁")]
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *space] if prefix else space)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def dense(folder: Path, source: str, tokenizer: Any = None, **changes: Any) -> Any:
    """Save a tiny dense language model of `test_containers` with a tokenizer; return it."""
    tokenizer = tokenizer or byte_level()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "vocab_size": VOCABULARY}
    model = dense_of(config_of(source, **ids | changes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def varied(folder: Path, source: str, widths: tuple[int, ...]) -> Any:
    """Save a tiny dense student whose FFNs have a width each; return it."""
    model, tokenizer = dense_of(config_of(source, vocab_size=VOCABULARY)), byte_level()
    set_ffn_widths(model, widths)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def container(folder: Path, name: str, shared_width: int, tokenizer: Any = None, **changes: Any) -> Any:
    """Save a tiny student as a container with a tokenizer; return the student."""
    tokenizer = tokenizer or byte_level()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "vocab_size": VOCABULARY}
    model, spec = student_of(name, shared_width=shared_width, **ids | changes)
    write.save(model, spec, folder, tokenizer=tokenizer)
    return model
