"""Write tiny GGUF files in the layout of llama.cpp's converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

WIDTH, FFN_WIDTH, LAYERS, HEADS, KEY_VALUE_HEADS = 64, 96, 2, 4, 2
TOKENS = ["<unk>", "<s>", "</s>", *(chr(33 + index) for index in range(94)), "Ġ", "Ġt", "th", "he"]


def llama(**more: Any) -> transformers.LlamaForCausalLM:
    """A random LLaMA as small as GGUF's blocks of 32 numbers allow."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=FFN_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        **more,
    )
    return transformers.LlamaForCausalLM(config).eval()


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of queries and keys as llama.cpp does: its rotary halves are interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: transformers.LlamaForCausalLM,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0,
    *,
    architecture: str = "llama",
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    rule: str = "gpt-2",
) -> Path:
    """Write a LLaMA as a GGUF file, its matrices quantised; `metadata` and `tensors` are added."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *([1] * (len(TOKENS) - 3))])
    writer.add_token_merges(["Ġ t", "t h", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for key, value in (metadata or {}).items():
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)](key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # it is the embedding
        array = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            array = _permuted(array, HEADS if "q_proj" in name else KEY_VALUE_HEADS)
        stored = kind if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        key, end = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(key)}.{end}", gguf.quants.quantize(array, stored), raw_dtype=stored)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
