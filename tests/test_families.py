"""Every family, on a tiny random model of the real transformers class: the FFN is found, read and replaced exactly."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from ffn2moe.choices import head_of_class
from ffn2moe.dense.blocks import stacks_in
from ffn2moe.dense.config import constructor_options, head_of
from ffn2moe.dense.families import FAMILIES, Family, Stack, positions, register_family
from ffn2moe.dense.ffn import ACTIVATIONS
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import (
    activation_of,
    family_of,
    ffn_layers,
    ffn_modules,
    ffn_paths,
    read_ffn,
    stack_of,
    stacks_of,
)
from ffn2moe.dense.probe import example_inputs, probe, prove
from ffn2moe.dense.weights import require_representable, weight_files
from ffn2moe.moe import checkpoint
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.experts import neurons_by_expert, slice_experts
from ffn2moe.moe.install import install_moe
from ffn2moe.moe.layer import MoEFFN, moe_layers
from ffn2moe.spec import MoESpec
from tests.conftest import make_tiny_bert, make_tiny_llama

F_PLAIN, F_GATED = 44, 36  # neither divides into 8 experts

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": F_PLAIN,
    "vocab_size": 60,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "initializer_range": 0.3,
}
GATED = SMALL | {"intermediate_size": F_GATED, "num_key_value_heads": 2, "head_dim": 8}
IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 4}
TEXT_TOWER = SMALL | {"pad_token_id": 1}
IMAGE_TOWER = SMALL | IMAGE | {"hidden_size": 24, "intermediate_size": 28}
SEQ2SEQ: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": F_PLAIN,
    "decoder_ffn_dim": 52,
    "vocab_size": 60,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "init_std": 0.3,
}
GPT: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": F_PLAIN,
    "n_positions": 40,
    "vocab_size": 60,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "initializer_range": 0.3,
}
T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": F_PLAIN,
    "num_layers": 1,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": 60,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}

# What each family is tested on: the transformers class, its config, and what changes from case to case.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", SMALL),
    "bert as a classifier": ("BertForSequenceClassification", "BertConfig", SMALL | {"hidden_act": "relu"}),
    "roberta": ("RobertaModel", "RobertaConfig", SMALL),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", SMALL),
    "camembert": ("CamembertModel", "CamembertConfig", SMALL),
    "data2vec-text": ("Data2VecTextModel", "Data2VecTextConfig", SMALL),
    "ernie": ("ErnieModel", "ErnieConfig", SMALL),
    "mpnet": ("MPNetModel", "MPNetConfig", SMALL),
    "electra": ("ElectraModel", "ElectraConfig", SMALL | {"embedding_size": 16}),
    "deberta": ("DebertaModel", "DebertaConfig", SMALL | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "deberta-v2": ("DebertaV2Model", "DebertaV2Config", SMALL | {"relative_attention": True, "pos_att_type": ["c2p"]}),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": F_PLAIN, "vocab_size": 60, "initializer_range": 0.3},
    ),
    "modernbert": ("ModernBertModel", "ModernBertConfig", SMALL | {"intermediate_size": F_GATED, "cls_token_id": 2}),
    "modernbert with biases": (
        "ModernBertModel",
        "ModernBertConfig",
        SMALL | {"intermediate_size": F_GATED, "cls_token_id": 2, "mlp_bias": True},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GATED | {"intermediate_size": 172}),
    "llama with biases": ("LlamaForCausalLM", "LlamaConfig", GATED | {"mlp_bias": True}),
    "llama as a classifier": ("LlamaForSequenceClassification", "LlamaConfig", GATED),
    "mistral": ("MistralForCausalLM", "MistralConfig", GATED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GATED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GATED),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GATED),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GATED),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", GATED),
    "granite": ("GraniteForCausalLM", "GraniteConfig", GATED),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", GATED),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", GATED),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", GATED),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", GATED),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GATED),
    "glm": ("GlmForCausalLM", "GlmConfig", GATED),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", GATED),
    "phi": ("PhiForCausalLM", "PhiConfig", SMALL),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", SMALL | {"num_key_value_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", GPT | {"rotary_dim": 4}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        SMALL | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL),
    "falcon": ("FalconForCausalLM", "FalconConfig", SMALL | {"ffn_hidden_size": F_PLAIN, "bias": True}),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {k: SMALL[k] for k in ("vocab_size", "initializer_range", "pad_token_id")}
        | {"hidden_size": 15, "n_layer": 2, "n_head": 3, "bos_token_id": 2, "eos_token_id": 3},
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", SMALL | {"ffn_dim": F_PLAIN, "word_embed_proj_dim": 32, "init_std": 0.3}),
    "opt normalised after": (
        "OPTForCausalLM",
        "OPTConfig",
        SMALL | {"ffn_dim": F_PLAIN, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "init_std": 0.3},
    ),
    "t5 plain": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5 gated": ("T5ForConditionalGeneration", "T5Config", T5 | {"feed_forward_proj": "gated-gelu"}),
    "t5 gated, encoder alone": ("T5EncoderModel", "T5Config", T5 | {"feed_forward_proj": "gated-silu"}),
    "t5 as a classifier": ("T5ForSequenceClassification", "T5Config", T5 | {"eos_token_id": 7}),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", T5 | {"feed_forward_proj": "gated-gelu"}),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", T5 | {"feed_forward_proj": "gated-gelu"}),
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", SEQ2SEQ),
    "marian": ("MarianMTModel", "MarianConfig", SEQ2SEQ),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", SEQ2SEQ),
    "m2m_100": ("M2M100ForConditionalGeneration", "M2M100Config", SEQ2SEQ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 12},
    ),
    "whisper as a classifier": (
        "WhisperForAudioClassification",
        "WhisperConfig",
        SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 12},
    ),
    "vit": ("ViTModel", "ViTConfig", SMALL | IMAGE),
    "vit as a classifier": ("ViTForImageClassification", "ViTConfig", SMALL | IMAGE | {"hidden_act": "quick_gelu"}),
    "deit": ("DeiTModel", "DeiTConfig", SMALL | IMAGE),
    "dinov2": ("Dinov2Model", "Dinov2Config", SMALL | IMAGE | {"hidden_size": 36, "mlp_ratio": 3}),
    "dinov2 gated": ("Dinov2Model", "Dinov2Config", SMALL | IMAGE | {"mlp_ratio": 2, "use_swiglu_ffn": True}),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": TEXT_TOWER, "vision_config": IMAGE_TOWER}),
    "clip_text_model": ("CLIPTextModel", "CLIPTextConfig", TEXT_TOWER),
    "clip_text_model, projected": ("CLIPTextModelWithProjection", "CLIPTextConfig", TEXT_TOWER),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionConfig", IMAGE_TOWER),
    "clip as a classifier": (
        "CLIPForImageClassification",
        "CLIPConfig",
        {"text_config": TEXT_TOWER, "vision_config": IMAGE_TOWER},
    ),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        {"text_config": TEXT_TOWER | {"projection_size": 24}, "vision_config": IMAGE_TOWER},
    ),
    "siglip_text_model": ("SiglipTextModel", "SiglipTextConfig", TEXT_TOWER),
    "siglip_vision_model": ("SiglipVisionModel", "SiglipVisionConfig", IMAGE_TOWER),
}


def tiny(case: str) -> Any:
    """A random model of the case; large weights and biases, so that activations and biases matter."""
    model_class, config_class, settings = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings)
    options = {} if head_of_class(model_class) else constructor_options(config, "embedding")
    model = getattr(transformers, model_class)(config, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def outputs(model: Any) -> torch.Tensor:
    """All that a model gives for one random input, in one row, each tensor divided by its largest value."""
    more = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad():
        given = model(**example_inputs(model), **more, return_dict=True)
    tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
    return torch.cat([(value / value.abs().max()).flatten() for value in tensors])


def carve(model: Any, num_experts: int = 8) -> MoESpec:
    """Every FFN of the model in random experts of unequal size, all of them chosen."""
    head = head_of_class(type(model).__name__) or family_of(model).heads[0]
    spec = spec_of(
        model,
        head=head,
        num_experts=num_experts,
        num_active=num_experts,
        partition="random",
        teacher="tiny",
        max_length=8,
    )
    generator = torch.Generator().manual_seed(2)
    layers = []
    for layer in range(len(ffn_layers(model))):
        ffn = read_ffn(model, layer)
        neurons_EM = neurons_by_expert(
            torch.arange(ffn.ffn_width)[torch.randperm(ffn.ffn_width, generator=generator)] % num_experts, num_experts
        )
        weights = slice_experts(ffn, neurons_EM)
        layers.append(MoEFFN.from_experts(spec, weights, neurons_EM, layer))
    install_moe(model, layers)
    model.eval()
    return spec


@pytest.mark.parametrize("case", CASES)
def test_with_all_experts_chosen_the_model_is_the_dense_model(case):
    model = tiny(case)
    dense, paths = outputs(model), ffn_paths(model)
    widths = {read_ffn(model, layer).ffn_width for layer in range(len(paths))}
    carve(model)
    assert (outputs(model) - dense).abs().max() < 1e-5
    assert [name for name, module in model.named_modules() if isinstance(module, MoEFFN)] == paths
    assert any(width % 8 for width in widths) or case == "dinov2 gated", "no width is even: padding is tried too"
    for mixture in moe_layers(model):
        with torch.no_grad():
            mixture.w_out.zero_()
        changed = outputs(model)
        assert (changed - dense).abs().max() > 1e-4, "every mixture is in use"
        dense = changed


@pytest.mark.parametrize("case", CASES)
def test_a_mixture_of_every_family_is_kept_on_disk(case, tmp_path):
    model = tiny(case)
    spec = carve(model)
    checkpoint.save(model, None, spec, tmp_path)
    assert torch.equal(outputs(checkpoint.load(tmp_path)), outputs(model))


def forget(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Take a row away until the end of the test."""
    monkeypatch.setattr(FAMILIES, "_rows", {other: row for other, row in FAMILIES.items() if other != name})


def test_a_mixture_of_a_model_without_a_row_is_kept_on_disk(monkeypatch, tmp_path):
    model = tiny("llama")
    forget(monkeypatch, "llama")
    spec = carve(model)
    checkpoint.save(model, None, spec, tmp_path)
    assert torch.equal(outputs(checkpoint.load(tmp_path)), outputs(model))


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_what_the_model_computes(case):
    model = tiny(case)
    before = outputs(model)
    assert prove(model, family_of(model)) < 1e-5
    assert torch.equal(outputs(model), before), "a proof leaves the model as it was"


@pytest.mark.parametrize("case", CASES)
def test_the_probe_finds_by_structure_what_the_rows_say(case, monkeypatch):
    model = tiny(case)
    known, activations = stacks_of(model), [activation_of(model, layer) for layer in range(len(ffn_layers(model)))]
    forget(monkeypatch, model.config.model_type)
    found = stacks_in(model, probe(model))
    for (row, layers), (guess, guessed) in zip(known, found, strict=True):
        assert layers is guessed and row.gated == guess.gated
        assert (row.w_in, row.w_out, row.w_gate) == (guess.w_in, guess.w_out, guess.w_gate)
    assert [activation_of(model, layer) for layer in range(len(activations))] == activations


def test_every_family_has_a_case():
    assert {getattr(transformers, config).model_type for _, config, _ in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_accurate", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("quick_gelu", "quick_gelu"),
        ("relu", "relu"),
        ("silu", "silu"),
        ("swish", "silu"),
    ],
)
def test_an_activation_is_known_by_all_its_names(name, activation):
    model = transformers.BertModel(transformers.BertConfig(**SMALL | {"hidden_act": name}))
    assert activation_of(model) == activation
    assert prove(model, family_of(model)) < 1e-5


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_padded_neuron_gives_nothing(activation):
    assert ACTIVATIONS[activation](torch.zeros(1)).item() == 0


def test_an_unknown_activation_is_refused_by_name():
    model = transformers.BertModel(transformers.BertConfig(**SMALL | {"hidden_act": "mish"}))
    with pytest.raises(ValueError, match=r"activation 'mish' is not supported; supported are: gelu.*quick_gelu.*silu"):
        read_ffn(model, 0)


def test_stacks_come_in_the_order_of_the_model_with_their_own_widths():
    model = tiny("whisper")
    assert ffn_paths(model) == [
        "model.encoder.layers.0.fc1",
        "model.decoder.layers.0.fc1",
        "model.decoder.layers.1.fc1",
    ]
    assert [model.get_submodule(path) for path in ffn_paths(model)] == ffn_modules(model)
    assert [stack_of(model, layer).layers for layer in range(3)] == [
        "encoder.layers",
        "decoder.layers",
        "decoder.layers",
    ]
    assert [read_ffn(model, layer).ffn_width for layer in range(3)] == [44, 52, 52]
    towers = tiny("clip")
    assert [tuple(read_ffn(towers, layer).w_in_FD.shape) for layer in range(4)] == [(44, 32)] * 2 + [(28, 24)] * 2
    with pytest.raises(IndexError, match="only 3 layers"):
        stack_of(model, 3)


# --- A model that nobody knows -------------------------------------------------------------------------------------


class NewConfig(transformers.PreTrainedConfig):
    model_type = "brand_new"

    def __init__(self, kind: str = "regular", **more: Any) -> None:
        self.kind = kind
        self.vocab_size, self.hidden_size = 200, 16
        super().__init__(**more)


class NewFFN(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.into, self.out = nn.Linear(16, 44), nn.Linear(44, 16)
        if kind == "normed":
            self.norm = nn.LayerNorm(44)
        if kind == "scaled":
            self.size = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.leaky_relu(self.into(x)) if self.kind == "leaky" else nn.functional.silu(self.into(x))
        if self.kind == "normed":
            h = self.norm(h)
        return self.size * self.out(h) if self.kind == "scaled" else self.out(h)


class NewLayer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.mix, self.ffn = nn.LayerNorm(16), nn.Linear(16, 16), NewFFN(kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x + self.mix(x))
        if self.kind == "inline":
            return x + self.ffn.out(nn.functional.silu(self.ffn.into(x)))
        return x + self.ffn(x) * (1 + self.ffn.into.weight.mean() if self.kind == "peeking" else 1)


class NewModel(transformers.PreTrainedModel):
    config_class = NewConfig
    base_model_prefix = "new"

    def __init__(self, config: NewConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, 16)
        self.layers = nn.ModuleList(NewLayer(config.kind) for _ in range(2))
        if config.kind == "unlike":
            self.layers[1].mix = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16))
        if config.kind == "shared":
            self.layers[1] = self.layers[0]
        self.post_init()

    def forward(self, input_ids: torch.Tensor, return_dict: bool = True, **_: Any) -> Any:
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x)
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=x)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch):
    """transformers knows the new model, this package does not; both forget it again."""
    monkeypatch.setattr(FAMILIES, "_rows", dict(FAMILIES.items()))
    transformers.AutoConfig.register("brand_new", NewConfig)
    transformers.AutoModel.register(NewConfig, NewModel)
    yield
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING._extra_content.pop("brand_new")
    transformers.MODEL_MAPPING._extra_content.pop(NewConfig)


def new_folder(folder: Path, kind: str) -> Path:
    make_tiny_bert(folder)  # for its tokenizer
    torch.manual_seed(0)
    NewModel(NewConfig(kind)).save_pretrained(folder)
    return folder


def test_an_unknown_but_regular_model_is_taken_and_proven(registered, tmp_path):
    model, _ = load_dense(str(new_folder(tmp_path, "regular")))
    assert family_of(model).stacks == (Stack("layers", "ffn.into", "ffn.out", "ffn", activation="silu"),) and family_of(
        model
    ).heads == ("embedding",)
    dense = outputs(model)
    carve(model)
    assert (outputs(model) - dense).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("leaky", "no linear maps compute an FFN with one of the activations"),
        ("normed", "no linear maps compute an FFN"),
        ("scaled", "no module between ffn.into and ffn.out applies the activation"),
        ("inline", "no module between ffn.into and ffn.out applies the activation"),
        ("peeking", "has no attribute|does not run|does more with its FFN"),
        ("unlike", "not alike: layer 1"),
        ("shared", "runs 2 times in one pass"),
    ],
)
def test_an_unknown_and_irregular_model_is_refused_with_the_reason_and_the_list(registered, kind, reason):
    with pytest.raises(ValueError, match=rf"'brand_new' are not supported.*({reason}).*Supported are: .*bert.*whisper"):
        family_of(NewModel(NewConfig(kind)))


@pytest.mark.parametrize(
    ("model_class", "config", "reason"),
    [
        ("AlbertModel", SMALL | {"embedding_size": 16}, "runs 2 times in one pass: its weights are shared"),
        (
            "MambaModel",
            {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 60, "state_size": 4},
            "no linear maps",
        ),
        ("MixtralForCausalLM", GATED | {"num_local_experts": 4}, "no list of layers holds a linear map"),
    ],
)
def test_real_models_without_an_ffn_of_each_layers_own_are_refused(model_class, config, reason):
    kind = getattr(transformers, model_class)
    with pytest.raises(ValueError, match=f"{reason}.*Supported are: .*bert"):
        family_of(kind(kind.config_class(**config)))


def test_a_few_lines_add_a_family(registered):
    mlp = Stack("layers", w_in="ffn.into", w_out="ffn.out", install="ffn", activation="silu")
    register_family(Family("brand_new", (mlp,), heads=("embedding",)))
    model = NewModel(NewConfig("regular")).eval()
    assert family_of(model).stacks == (mlp,)
    assert prove(model, family_of(model)) < 1e-5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"activation": "gelu"}, "does not compute an FFN with the activation gelu"),
        ({"w_in": "ffn.inwards"}, "not built as the row says"),
        ({"layers": "blocks"}, "has no layers at blocks"),
        ({"install": "mix"}, "differs by|more with its FFN"),
    ],
)
def test_a_wrong_row_does_not_pass_the_proof(change, reason):
    row = {"layers": "layers", "w_in": "ffn.into", "w_out": "ffn.out", "install": "ffn", "activation": "silu"}
    with pytest.raises(ValueError, match=reason):
        prove(NewModel(NewConfig("regular")), Family("brand_new", (Stack(**row | change),), heads=("embedding",)))


def test_a_family_without_stacks_or_heads_is_refused():
    with pytest.raises(ValueError, match="at least one stack of layers and one head"):
        register_family(Family("nothing", (), heads=("causal",)))


def test_ffns_that_share_weights_are_refused(tmp_path):
    from ffn2moe.dense.locate import require_untied

    model = tiny("bert")
    model.encoder.layer[1].output.dense.weight = model.encoder.layer[0].output.dense.weight
    with pytest.raises(ValueError, match=r"layer\.0\.output\.dense\.weight and .*layer\.1.* are one tensor"):
        require_untied(model)


# --- Loading -------------------------------------------------------------------------------------------------------


def test_the_config_says_what_a_checkpoint_gives():
    def head(model_type: str, *architectures: str) -> str:
        return head_of(transformers.AutoConfig.for_model(model_type, architectures=list(architectures)))

    assert head("llama", "LlamaForCausalLM") == head("gpt2", "GPT2LMHeadModel") == head("gpt2") == "causal"
    assert head("bert", "BertForMaskedLM") == head("bert") == head("t5", "T5EncoderModel") == "embedding"
    assert head("bert", "BertForSequenceClassification") == head("vit", "ViTForImageClassification") == "classification"
    assert head("t5", "T5ForConditionalGeneration") == head("whisper") == head("marian", "MarianMTModel") == "seq2seq"
    assert head("vit", "ViTModel") == head("clip", "CLIPModel") == "features"
    assert head("bert", "BertLMHeadModel") == "embedding", "a head that the family has not"


def test_each_head_is_loaded_with_its_class(tmp_path):
    make_tiny_llama(tmp_path / "llama")
    model, tokenizer = load_dense(str(tmp_path / "llama"))
    assert type(model).__name__ == "LlamaForCausalLM" and tokenizer("the cat")["input_ids"]
    make_tiny_bert(tmp_path / "bert")
    tiny("bert as a classifier").save_pretrained(tmp_path / "bert")
    assert type(load_dense(str(tmp_path / "bert"))[0]).__name__ == "BertForSequenceClassification"
    assert type(load_dense(str(tmp_path / "bert"), head="embedding")[0]).__name__ == "BertModel"
    with pytest.raises(ValueError, match="makes embedding or classification or token_classification, not causal"):
        load_dense(str(tmp_path / "bert"), head="causal")
    make_tiny_bert(tmp_path / "t5")
    tiny("t5 gated").save_pretrained(tmp_path / "t5")
    assert type(load_dense(str(tmp_path / "t5"))[0]).__name__ == "T5ForConditionalGeneration"
    encoder, _ = load_dense(str(tmp_path / "t5"), head="embedding")
    assert type(encoder).__name__ == "T5EncoderModel" and len(ffn_layers(encoder)) == 1


def test_a_model_of_images_comes_with_its_processor(tmp_path):
    tiny("vit as a classifier").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cannot be read.*preprocessor_config\.json"):
        load_dense(str(tmp_path))
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    model, processor = load_dense(str(tmp_path))
    pixels = processor(images=[torch.zeros(3, 9, 9)], return_tensors="pt")["pixel_values"]
    assert model(pixel_values=pixels).logits.shape == (1, 2)


def test_a_model_without_its_tokenizer_is_refused(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match="tokenizer"):
        load_dense(str(tmp_path))


def test_half_precision_is_read_as_float32(tmp_path):
    make_tiny_llama(tmp_path)
    model, _ = load_dense(str(tmp_path))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    half, _ = load_dense(str(tmp_path))
    assert {tensor.dtype for tensor in half.parameters()} == {torch.float32}
    ffn = read_ffn(model, 0)
    assert ffn.w_in_FD.dtype == torch.float32 and torch.equal(ffn.w_in_FD, read_ffn(half, 0).w_in_FD)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    make_tiny_llama(tmp_path / "model")
    model, _ = load_dense(str(tmp_path / "model"))
    (tmp_path / "model/model.safetensors").unlink()
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


def test_shards_are_read_as_one(sharded):
    files = weight_files(sharded)
    assert len({*files.values()}) > 2 and "model.layers.1.mlp.up_proj.weight" in files
    assert len(ffn_layers(load_dense(str(sharded))[0])) == 2


def test_weights_as_bin_are_refused_with_a_command_that_converts_them(tmp_path):
    folder = tmp_path / "old"
    make_tiny_bert(folder)
    model = transformers.BertModel.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has its weights as \.bin") as error:
        load_dense(str(folder))
    remedy = re.search(r'python -c "(.*?)"', str(error.value))[1]
    subprocess.run([sys.executable, "-c", remedy], check=True, capture_output=True)
    load_dense(str(folder))


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shard.name}, which model\.safetensors\.index\.json names"):
        load_dense(str(sharded))


def test_a_tensor_in_two_shards_is_named(sharded):
    from safetensors.torch import load_file, save_file

    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    one, two = load_file(first), load_file(second)
    name = next(iter(one))
    save_file(two | {name: one[name]}, second, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} stands in two files .*{first.name} and {second.name}"):
        load_dense(str(sharded))


def test_a_tensor_that_the_index_promises_in_vain_is_named(sharded):
    from safetensors.torch import load_file, save_file

    shard = sorted(sharded.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    name = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != name}, shard, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{shard.name} .* lacks {name}"):
        load_dense(str(sharded))
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"lacks weights.*{name}"):
        load_dense(str(sharded))


def test_code_that_travels_with_a_model_is_never_run(tmp_path):
    make_tiny_bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "stranger",
        "auto_map": {"AutoConfig": "code.StrangerConfig", "AutoModel": "code.Stranger"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match=r"'stranger' model, which transformers .* does not know; .* never run"):
        load_dense(str(tmp_path))


def test_a_value_beyond_float16_is_named():
    tensor = torch.tensor([1.0, -7e4])
    require_representable(tensor, torch.bfloat16, "a")
    require_representable(tensor[:1], torch.float16, "a")
    with pytest.raises(ValueError, match=r"layers\.0\.w holds 7e\+04, more than .*float16"):
        require_representable(tensor, torch.float16, "layers.0.w")


def test_the_longest_text_of_each_family():
    def longest(model_type: str, **config: Any) -> int | None:
        return positions(transformers.AutoConfig.for_model(model_type, **config))

    assert longest("bert", max_position_embeddings=512) == 512
    assert longest("roberta", max_position_embeddings=514, pad_token_id=1) == 512
    assert longest("mpnet", max_position_embeddings=514, pad_token_id=1) == 512
    assert longest("gpt2", n_positions=1024) == 1024
    assert longest("opt", max_position_embeddings=2048) == 2048
    assert longest("whisper", max_target_positions=448) == 448
    assert longest("clip") == 77
    assert longest("t5") is longest("bloom") is longest("vit") is None


def byte_level_tokenizer(folder: Path) -> None:
    """A vocabulary of letters, as GPT-2, CLIP and Whisper keep one."""
    letters = [*"abcdefgh", *(f"{letter}</w>" for letter in "abcdefgh")]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def test_a_model_of_speech_comes_with_its_processor(tmp_path):
    tiny("whisper").save_pretrained(tmp_path)
    byte_level_tokenizer(tmp_path)
    tokenizer = transformers.WhisperTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    listening = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    transformers.WhisperProcessor(listening, tokenizer).save_pretrained(tmp_path)
    model, processor = load_dense(str(tmp_path))
    assert type(model).__name__ == "WhisperForConditionalGeneration" and len(ffn_layers(model)) == 3
    sound = processor([0.0] * 800, sampling_rate=16000, return_tensors="pt")["input_features"]
    assert sound.shape[1] == model.config.num_mel_bins


def test_a_model_of_text_and_images_comes_with_its_processor(tmp_path):
    tiny("clip").save_pretrained(tmp_path)
    byte_level_tokenizer(tmp_path)
    tokenizer = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    seeing = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    transformers.CLIPProcessor(seeing, tokenizer).save_pretrained(tmp_path)
    model, processor = load_dense(str(tmp_path))
    inputs = processor(text=["a b"], images=[torch.zeros(3, 9, 9)], return_tensors="pt")
    assert model(**inputs).logits_per_image.shape == (1, 1)
