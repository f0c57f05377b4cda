"""llama.cpp computes what transformers computes: logits, tokens and greedy text of every file that is written.

Skipped where llama_cpp is not installed: `pip install --no-binary :all: llama-cpp-python` builds it in some minutes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from ffn2moe.containers.checks import open_native
from ffn2moe.containers.gguf.write import write_gguf
from ffn2moe.dense.load import load_dense
from tests.gguf_students import TEXTS, VOCABULARY, byte_level, container, dense, pieces, varied
from tests.test_containers import LLAMA3, THETA, WAYS

llama_cpp = pytest.importorskip("llama_cpp", reason="llama_cpp is not installed, so no GGUF file is run")
LENGTH = 60
YARN = {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "rope_theta": THETA,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 1.5, 2.5, 4.0],
}


@contextmanager
def opened(path: Path, context: int = 128) -> Iterator[Any]:
    """A file in llama.cpp, with a float32 cache, so that differences are those of the weights."""
    model = llama_cpp.Llama(
        str(path),
        n_ctx=context,
        n_batch=context,
        n_threads=1,
        logits_all=True,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    try:
        yield model
    finally:
        model.close()


def ids(length: int = LENGTH) -> list[int]:
    return torch.randint(4, VOCABULARY - 10, (length,), generator=torch.Generator().manual_seed(3)).tolist()


def logits_of(path: Path, tokens: list[int], context: int = 128) -> np.ndarray:
    with opened(path, context) as model:
        model.eval(tokens)
        return np.array(model.scores[: len(tokens)])


def difference(found: np.ndarray, known: torch.Tensor) -> tuple[float, float]:
    """The mean of the largest relative difference at each position, and the share of positions with the same token."""
    reference = known.detach().numpy()
    apart = np.abs(found - reference).max(-1) / np.abs(reference).max(-1)
    return float(apart.mean()), float((found.argmax(-1) == reference.argmax(-1)).mean())


@torch.no_grad()
def compared(folder: Path, path: Path, context: int = 128, length: int = LENGTH) -> tuple[float, float]:
    known = open_native(folder)(torch.tensor([ids(length)])).logits[0]
    return difference(logits_of(path, ids(length), context), known)


@pytest.mark.parametrize(("name", "shared_width"), WAYS)
def test_a_container_has_the_same_logits(tmp_path, name, shared_width):
    container(tmp_path / "folder", name, shared_width)
    # Random routers are close to ties: a rounded weight may change which expert is chosen.
    for kind, most, least in (("f32", 1e-5, 1.0), ("f16", 2e-2, 0.95), ("bf16", 0.2, 0.8)):
        path = write_gguf(tmp_path / "folder", tmp_path / f"{kind}.gguf", kind).path
        mean, same = compared(tmp_path / "folder", path)
        assert mean < most and same >= least, (kind, mean, same)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
@pytest.mark.parametrize(("name", "shared_width"), [("mixtral", 0), ("granitemoeshared", 11), ("glm4_moe", 11)])
def test_a_quantised_file_is_the_model_of_its_rounded_weights(tmp_path, name, shared_width, kind):
    container(tmp_path / "folder", name, shared_width, K=4)  # all experts: none is chosen otherwise
    path = write_gguf(tmp_path / "folder", tmp_path / "out.gguf", kind).path
    model = open_native(tmp_path / "folder")
    with torch.no_grad():
        whole = model(torch.tensor([ids()])).logits[0]
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not parameter_name.endswith((".gate.weight", "router.layer.weight")):
                sensitive = parameter_name.endswith(("embed_tokens.weight", "lm_head.weight", "v_proj.weight"))
                parameter.copy_(rounded(parameter, "q8_0" if sensitive else kind))
        known = model(torch.tensor([ids()])).logits[0]
    mean, same = difference(logits_of(path, ids()), known)
    assert mean < 0.12 and same > 0.8, (mean, same)  # llama.cpp rounds activations to 8 bits, too
    if kind.startswith("q4"):
        assert mean < difference(whole.numpy(), known)[0]


def rounded(parameter: torch.Tensor, kind: str) -> torch.Tensor:
    """The numbers of a parameter after they were stored in a type, in rows that zeros fill up."""
    stored, width = gguf.GGMLQuantizationType[kind.upper()], parameter.shape[-1]
    rows = torch.nn.functional.pad(parameter, (0, -width % 32)).numpy()
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(rows, stored), stored)[..., :width].copy())


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ("llama", {}),
        ("llama, tied", {}),
        ("llama with biases", {}),
        ("llama with wide heads", {}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen2, tied", {}),
        ("qwen3", {}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": THETA, "factor": 3.0}}),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": THETA, **LLAMA3}}),
        ("llama", {"rope_parameters": YARN}),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
        ("qwen3", {"rope_parameters": YARN}),
        ("llama", {"rope_parameters": LONG}),
    ],
    ids=str,
)
def test_a_dense_model_has_the_same_logits(tmp_path, source, changes):
    dense(tmp_path / "folder", source, **changes)
    path = write_gguf(tmp_path / "folder", tmp_path / "out.gguf", "f32").path
    mean, same = compared(tmp_path / "folder", path)
    assert mean < 1e-5 and same == 1


def test_a_width_for_each_layer_is_read(tmp_path):
    model = varied(tmp_path / "folder", "llama", (43, 64, 20))
    path = write_gguf(tmp_path / "folder", tmp_path / "out.gguf", "f32").path
    with torch.no_grad():
        mean, same = difference(logits_of(path, ids()), model(torch.tensor([ids()])).logits[0])
    assert mean < 1e-5 and same == 1


def test_the_short_factors_of_longrope_serve_short_contexts(tmp_path):
    dense(tmp_path / "folder", "llama", rope_parameters=LONG | {"original_max_position_embeddings": 256})
    written = write_gguf(tmp_path / "folder", tmp_path / "out.gguf", "f32")
    assert any("a context of more than 256 tokens" in note for note in written.notes)
    mean, same = compared(tmp_path / "folder", written.path, context=256)
    assert mean < 1e-5 and same == 1


def test_a_window_does_not_matter_within_the_context_that_the_file_names(tmp_path):
    container(tmp_path / "folder", "mixtral", 0, sliding_window=None)
    for name, source in (("mixtral", "mistral with window"), ("qwen2_moe", "qwen2 with windows")):
        container(tmp_path / name, name, 0, source=source)
        path = write_gguf(tmp_path / name, tmp_path / f"{name}.gguf", "f32").path
        with opened(path) as model:
            assert int(model.metadata[f"{'llama' if name == 'mixtral' else 'qwen2moe'}.context_length"]) == 16
        mean, same = compared(tmp_path / name, path, length=16)
        assert mean < 1e-5 and same == 1


@pytest.mark.parametrize(
    ("rule", "model"),
    [
        ("gpt-2", {}),
        ("smollm", {}),
        ("llama-bpe", {"ignore_merges": True}),
        ("llama-bpe", {}),
        ("qwen2", {}),
        ("qwen35", {}),
        ("tekken", {"ignore_merges": True}),
        ("gpt-4o", {}),
        ("pieces", {}),
        ("pieces", {"prefix": False}),
    ],
    ids=str,
)
def test_texts_have_the_same_tokens(tmp_path, rule, model):
    tokenizer = pieces(**model) if rule == "pieces" else byte_level(rule, **model)
    dense(tmp_path / "folder", "llama", tokenizer)
    path = write_gguf(tmp_path / "folder", tmp_path / "out.gguf").path
    with opened(path) as model:
        for text in TEXTS:
            assert model.tokenize(text.encode(), special=False) == tokenizer(text)["input_ids"], text
        for special in ("<|im_start|>user\nhi<|im_end|>\n<think>", "<s>a</s>"):
            expected = tokenizer(special, add_special_tokens=False)["input_ids"]
            if rule != "pieces" or special.startswith("<s>"):
                assert model.tokenize(special.encode(), add_bos=False, special=True) == expected, special


def test_a_chat_has_the_same_tokens_and_ends_with_each_end_token(tmp_path):
    tokenizer = byte_level()
    dense(tmp_path / "folder", "llama", tokenizer)
    path = write_gguf(tmp_path / "folder", tmp_path / "out.gguf").path
    messages = [{"role": "user", "content": "Who are you?"}]
    with opened(path) as model:
        assert model.metadata["tokenizer.chat_template"] == tokenizer.chat_template
        written = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        expected = tokenizer(written, add_special_tokens=False)["input_ids"]
        assert model.tokenize(written.encode(), add_bos=False, special=True) == expected
        answer = model.create_chat_completion(messages, max_tokens=4, temperature=0.0)
        assert answer["usage"]["prompt_tokens"] == len(expected)
    from transformers import GenerationConfig

    GenerationConfig(eos_token_id=[2, 40, 41]).save_pretrained(tmp_path / "folder")
    path = write_gguf(tmp_path / "folder", tmp_path / "ends.gguf").path
    with opened(path) as model:
        vocabulary = llama_cpp.llama_model_get_vocab(model.model)
        ends = {token for token in range(VOCABULARY) if llama_cpp.llama_vocab_is_eog(vocabulary, token)}
    assert {2, 40, 41} <= ends


def test_a_real_model_writes_the_same_story(tmp_path):
    source = Path(os.environ.get("FFN2MOE_DATA", "none")) / "stories260k"
    if not source.is_dir():
        pytest.skip("no FFN2MOE_DATA/stories260k")
    model, tokenizer = load_dense(str(source))
    text = (source / "sample.txt").read_text()[:600]
    tokens = tokenizer(text)["input_ids"]
    with torch.no_grad():
        known = model(torch.tensor([tokens])).logits[0]
        whole = model.generate(torch.tensor([tokens[:8]]), max_new_tokens=60, do_sample=False)[0, 8:].tolist()
    for kind, most in (("f32", 1e-5), ("f16", 5e-3), ("q8_0", 5e-2)):
        path = write_gguf(source, tmp_path / f"{kind}.gguf", kind).path
        mean, same = difference(logits_of(path, tokens, 512), known)
        assert mean < most and same > 0.95, (kind, mean, same)
    with opened(tmp_path / "f32.gguf", 512) as opened_model:
        assert opened_model.tokenize(text.encode(), special=False) == tokens
        steps = opened_model.generate(tokens[:8], temp=0.0, top_k=1, repeat_penalty=1.0)
        assert [token for _, token in zip(range(60), steps, strict=False)] == whole
