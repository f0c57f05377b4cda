"""Native containers: exact at K = E, the student's own logits below, whole or not there, and free of our code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ffn2moe import containers
from ffn2moe.choices import GATES
from ffn2moe.containers import checks, fit, tensors, trial, write
from ffn2moe.containers.container import Container
from ffn2moe.containers.fit import choose, obstacle
from ffn2moe.containers.shards import Shards
from ffn2moe.containers.table import CONTAINERS
from ffn2moe.containers.tensors import NEAR_UNIT
from ffn2moe.dense.locate import read_ffn
from ffn2moe.moe import checkpoint
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.experts import neurons_by_expert, shared_neurons, slice_experts
from ffn2moe.moe.install import install_moe
from ffn2moe.moe.layer import MoEFFN, moe_layers
from ffn2moe.spec import Gate, MoESpec
from tests.conftest import make_tokenizer

WIDTH, NEURONS, VOCABULARY = 32, 43, 96  # 43 neurons divide into no number of experts
THETA = 12345.0  # not the default of any class
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
PARTIAL = {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5}
# Every container with the sources it holds, and whether a shared expert of 11 neurons is wanted.
HOLDS = [
    *(("mixtral", source, 0) for source in ("llama", "mistral", "mistral with window")),
    *(("qwen2_moe", source, shared) for source in ("qwen2", "qwen2 with windows", "llama") for shared in (0, 11)),
    *(("qwen3_moe", source, 0) for source in ("qwen3", "qwen3 with window", "qwen3 with biases")),
    *(("glm4_moe", source, shared) for source in ("llama", "mistral", "qwen2", "qwen3") for shared in (0, 11)),
    *(
        ("granitemoeshared", source, shared)
        for source in ("llama", "mistral", "llama with biases")
        for shared in (0, 11)
    ),
    *(("mixtral", source, 0) for source in ("llama, tied", "llama with wide heads", "llama3", "yarn")),
    *(("glm4_moe", source, 11) for source in ("llama, tied", "llama with wide heads", "llama3", "yarn")),
    *(("qwen2_moe", source, 11) for source in ("llama, tied", "qwen2, tied")),
]
WAYS = [("mixtral", 0), ("qwen2_moe", 0), ("qwen2_moe", 11), ("qwen3_moe", 0), ("glm4_moe", 0), ("glm4_moe", 11)]
WAYS += [("granitemoeshared", 0), ("granitemoeshared", 11)]


def config_of(source: str = "llama", **changes: Any) -> Any:
    """The config of a tiny dense model: a family, and what is special about it."""
    import transformers

    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": NEURONS,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    special: dict[str, dict[str, Any]] = {
        "mistral": {"sliding_window": None},
        "mistral with window": {"sliding_window": 16},
        "qwen2 with windows": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        "qwen3": {"head_dim": 16},
        "qwen3 with window": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
        "qwen3 with biases": {"head_dim": 16, "attention_bias": True},
        "llama with biases": {"attention_bias": True},
        "llama, tied": {"tie_word_embeddings": True},
        "qwen2, tied": {"tie_word_embeddings": True},
        "llama with wide heads": {"head_dim": 16},
        "llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": THETA, **LLAMA3}},
        "yarn": {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": THETA,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    }
    family = next(name for name in ("mistral", "qwen2", "qwen3", "llama") if source.startswith(name) or name == "llama")
    return getattr(transformers, f"{CLASSES[family]}Config")(**(values | special.get(source, {}) | changes))


def dense_of(config: Any, seed: int = 0) -> Any:
    """A random dense model whose biases and norms are random too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def student_of(
    name: str,
    source: str = "",
    *,
    E: int = 4,
    K: int = 2,
    shared_width: int = 0,
    gate: Gate | None = None,
    seed: int = 1,
    **changes: Any,
) -> tuple[Any, MoESpec]:
    """A dense model with its FFNs decomposed into experts that a random router chooses from, for a container."""
    container = CONTAINERS[name]
    default = next(family for family in ("llama", "qwen2", "qwen3") if family in container.families)
    model = dense_of(config_of(source or {"qwen3_moe": "qwen3", "qwen2_moe": "qwen2"}.get(name, default), **changes))
    spec = spec_of(
        model,
        head="causal",
        num_experts=E,
        num_active=K,
        partition="contiguous",
        teacher="tiny",
        max_length=64,
        shared_width=shared_width,
        gate=gate or container.gate,
        router_bias=False,
        container=name,
        width_multiple=container.width_multiple,
    )
    generator = torch.Generator().manual_seed(seed)
    expert_of_neuron_F = torch.full((spec.ffn_width,), -1)
    routed = spec.ffn_width - shared_width
    expert_of_neuron_F[shared_width:] = torch.arange(routed) * E // routed
    neurons_EM = neurons_by_expert(expert_of_neuron_F, E, container.width_multiple)
    shared_S = shared_neurons(expert_of_neuron_F)
    layers = []
    for layer in range(spec.num_layers):
        weights = slice_experts(read_ffn(model, layer), neurons_EM, shared_S)
        moe = MoEFFN.from_experts(spec, weights, neurons_EM, shared_S=shared_S)
        with torch.no_grad():
            moe.router.weight.copy_(torch.randn(moe.router.weight.shape, generator=generator) / 4)
            moe.router.scale.fill_(0.5)
            moe.output_scale.mul_(1.25)
            if container.choice_bias:
                moe.router.balance_bias.copy_(torch.randn(E, generator=generator) / 8)
        layers.append(moe)
    install_moe(model, layers)
    return model.eval(), spec


def tokens(batch: int = 2, length: int = 40) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(3))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def config_on_disk(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Every container of a student with K < E, without and with a shared expert."""
    root = tmp_path_factory.mktemp("containers")
    made = {}
    for name, shared_width in WAYS:
        model, spec = student_of(name, shared_width=shared_width)
        made[name, shared_width] = write.save(model, spec, root / f"{name}-{shared_width}")
    return made


# What is promised of the numbers


@pytest.mark.parametrize(("name", "source", "shared_width"), HOLDS)
def test_all_experts_under_a_router_of_zeros_are_the_dense_model(name: str, source: str, shared_width: int) -> None:
    config = config_of(source)
    found = trial.preflight(
        CONTAINERS[name], config, dense_of(config).state_dict(), num_experts=3, shared_width=shared_width
    )
    assert found.largest < 1e-5
    assert found.top1 == 1


@pytest.mark.parametrize(("name", "shared_width"), WAYS)
def test_a_container_answers_as_the_student_that_it_was_written_from(
    name: str, shared_width: int, folders: dict[tuple[str, int], Path]
) -> None:
    model, _ = student_of(name, shared_width=shared_width)
    found = checks.same_logits(model, folders[name, shared_width], tokens())
    assert found.largest < 1e-4
    assert found.top1 == 1
    other, _ = student_of(name, shared_width=shared_width, seed=2)  # the comparison can fail
    assert checks.same_logits(other, folders[name, shared_width], tokens()).largest > 1e-2


@pytest.mark.parametrize("name", CONTAINERS.names())
def test_unit_gates_become_nearly_unit(name: str, tmp_path: Path) -> None:
    model, spec = student_of(name, gate="unit")
    folder = write.save(model, spec, tmp_path / "out")
    found = checks.same_logits(model, folder, tokens())
    assert found.mean < 1e-2
    assert found.top1 > 0.95
    moe = moe_layers(model)[0]
    written = tensors_of(folder)[f"model.layers.0.{CONTAINERS[name].router}"]
    assert torch.equal(written, moe.router.folded()[0] * NEAR_UNIT)


def test_the_scale_is_what_equal_scores_are_divided_by() -> None:
    for name in CONTAINERS:
        model, spec = student_of(name)
        moe = moe_layers(model)[0]
        assert moe.output_scale.item() == 1.25 * GATES[spec.gate].neutral_scale(4, 2)
        held = tensors.layer_tensors(CONTAINERS[name], spec, 0, moe)
        down = held[f"model.layers.0.{CONTAINERS[name].experts.down.format(0)}"]
        down = down[0] if down.ndim == 3 else down
        torch.testing.assert_close(down[:, : spec.expert_width], moe.output_scale * moe.w_out[0])


@pytest.mark.parametrize(("name", "shared_width"), WAYS)
def test_bfloat16_runs_with_the_experts_that_transformers_uses_by_default(
    name: str, shared_width: int, tmp_path: Path
) -> None:
    model, spec = student_of(name, shared_width=shared_width)
    folder = write.save(model, spec, tmp_path / "out", dtype=torch.bfloat16)
    for tensor_name, tensor in tensors_of(folder).items():
        kept = torch.float32 if tensor_name.endswith("e_score_correction_bias") else torch.bfloat16
        assert tensor.dtype == kept, tensor_name
    opened = checks.open_native(folder, torch.bfloat16)
    assert torch.isfinite(opened(tokens()).logits).all()


# What engines read


@pytest.mark.parametrize(("name", "shared_width"), WAYS)
def test_the_names_and_values_are_those_that_transformers_would_write(
    name: str, shared_width: int, folders: dict[tuple[str, int], Path], tmp_path: Path
) -> None:
    ours = folders[name, shared_width]
    checks.open_native(ours).save_pretrained(tmp_path)
    theirs = tensors_of(tmp_path)
    written = tensors_of(ours)
    assert set(written) == set(theirs)
    assert all(torch.equal(written[key], theirs[key]) for key in written)


def test_they_open_and_generate_where_this_package_cannot_be_imported(
    folders: dict[tuple[str, int], Path], tmp_path: Path
) -> None:
    program = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ffn2moe":
            raise ImportError("this package is not installed here")

sys.meta_path.insert(0, Blocker())
try:
    import ffn2moe
except ImportError:
    pass
else:
    sys.exit("the package can be imported")
import torch
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    ids = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert ids.shape == (1, 7)
    print(type(model).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, *map(str, folders.values())],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [CONTAINERS[name].model_class for name, _ in folders]


def test_configs_say_what_engines_take_for_granted(folders: dict[tuple[str, int], Path]) -> None:
    read = {key: config_on_disk(folder) for key, folder in folders.items()}
    # llama.cpp hard-codes the renormalisation: off for qwen2moe, on for qwen3moe.
    assert read["qwen2_moe", 0]["norm_topk_prob"] is False
    assert read["qwen3_moe", 0]["norm_topk_prob"] is True
    # Every layer is a mixture.
    for name in ("qwen2_moe", "qwen3_moe"):
        assert (read[name, 0]["decoder_sparse_step"], read[name, 0]["mlp_only_layers"]) == (1, [])
    glm = read["glm4_moe", 11]
    assert glm["first_k_dense_replace"] == 0
    # Its rotary embedding turns half of each head unless told; a multi-token head would be looked for.
    assert glm["rope_parameters"]["partial_rotary_factor"] == glm["partial_rotary_factor"] == 1.0
    assert (glm["n_group"], glm["topk_group"], glm["num_nextn_predict_layers"]) == (1, 1, 0)
    assert (glm["routed_scaling_factor"], glm["norm_topk_prob"]) == (1.0, False)
    granite = read["granitemoeshared", 11]
    assert granite["attention_multiplier"] == (WIDTH / 4) ** -0.5
    assert [granite[f"{what}_multiplier"] for what in ("embedding", "residual")] == [1.0, 1.0]
    assert granite["logits_scaling"] == 1.0
    for config in read.values():
        # transformers 4 finds these under their old names only.
        assert config["rope_theta"] == THETA
        assert config["torch_dtype"] == "float32"
        assert config["model_type"] in CONTAINERS
        assert "auto_map" not in config and "_name_or_path" not in config
    assert read["qwen3_moe", 0]["num_experts"] == 4


def test_rotary_scaling_is_also_under_its_old_name(tmp_path: Path) -> None:
    model, spec = student_of("mixtral", "llama3")
    config = config_on_disk(write.save(model, spec, tmp_path / "out"))
    assert config["rope_scaling"]["factor"] == 8.0
    assert config["rope_scaling"]["rope_type"] == "llama3"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_shared_gate_of_qwen2_moe_is_a_half_and_never_zero(dtype: torch.dtype, tmp_path: Path) -> None:
    model, spec = student_of("qwen2_moe", shared_width=11)
    folder = write.save(model, spec, tmp_path / "out", dtype=dtype)
    gate_D = tensors_of(folder)["model.layers.0.mlp.shared_expert_gate.weight"][0].float()
    assert (gate_D != 0).all()  # llama.cpp computes silu(z) / z, which is 0 / 0 at 0
    z = (torch.randn(64, WIDTH) @ gate_D).abs()
    assert (z > 0).all()
    assert (torch.sigmoid(z) - 0.5).abs().max() < 1e-5
    down = tensors_of(folder)["model.layers.0.mlp.shared_expert.down_proj.weight"]
    shared_out = moe_layers(model)[0].shared_out
    assert shared_out is not None
    assert torch.equal(down[:, :11].float(), (2 * shared_out).to(dtype).float())


def test_the_choice_bias_of_glm4_moe_is_there_zero_or_trained(tmp_path: Path) -> None:
    model, spec = student_of("glm4_moe")
    for layer, moe in enumerate(moe_layers(model)):
        if layer == 1:
            moe.router.balance_bias.zero_()
    held = tensors_of(write.save(model, spec, tmp_path / "out"))
    for layer, moe in enumerate(moe_layers(model)):
        bias_E = held[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
        assert torch.equal(bias_E, moe.router.balance_bias)
        assert bias_E.any() == (layer != 1)


def test_widths_are_multiples_of_8_and_padding_is_zero() -> None:
    for name, shared_width in WAYS:
        model, spec = student_of(name, shared_width=shared_width)
        narrow = spec.expert_width - 5  # as if it were made without padding
        spec = replace(
            spec, stacks=(replace(spec.stacks[0], expert_width=narrow, ffn_width=4 * narrow + shared_width),)
        )
        moe = moe_layers(model)[0]
        for part, dim in (("w_in", 1), ("w_gate", 1), ("w_out", 2)):
            setattr(moe, part, torch.nn.Parameter(getattr(moe, part).narrow(dim, 0, narrow)))
        held = tensors.layer_tensors(CONTAINERS[name], spec, 0, moe)
        widths = {
            size for key, tensor in held.items() if "expert" in key or "linear" in key for size in tensor.shape[-2:]
        }
        assert all(width % 8 == 0 for width in widths - {1, 4}), (name, widths)
        down = held[f"model.layers.0.{CONTAINERS[name].experts.down.format(0)}"]
        assert down[..., :narrow].any() and not down[..., narrow:].any()


def test_glm4_and_qwen2_moe_always_have_a_shared_expert_which_may_be_zeros(
    folders: dict[tuple[str, int], Path],
) -> None:
    for name, key in (("qwen2_moe", "shared_expert"), ("glm4_moe", "shared_experts")):
        up = tensors_of(folders[name, 0])[f"model.layers.0.mlp.{key}.up_proj.weight"]
        assert len(up) and not up.any()
    assert config_on_disk(folders["glm4_moe", 11])["n_shared_experts"] == 2  # 11 neurons in experts of 8
    assert not any("shared" in name for name in tensors_of(folders["granitemoeshared", 0]))


@pytest.mark.parametrize(("name", "source", "written"), [
    ("mixtral", "llama, tied", False),
    ("glm4_moe", "llama, tied", False),
    ("qwen2_moe", "qwen2, tied", True),  # llama.cpp's qwen2moe does not look for a tied output matrix
    ("mixtral", "llama", True),
])  # fmt: skip
def test_a_tied_output_matrix_is_written_where_engines_do_not_tie(
    name: str, source: str, written: bool, tmp_path: Path
) -> None:
    model, spec = student_of(name, source)
    folder = write.save(model, spec, tmp_path / "out")
    assert ("lm_head.weight" in tensors_of(folder)) == written
    assert config_on_disk(folder)["tie_word_embeddings"] == (not written)
    assert checks.same_logits(model, folder, tokens()).largest < 1e-4


def test_what_stands_beside_the_weights_is_copied(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = tmp_path / "dense"
    make_tokenizer(source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": true, "eos_token_id": 3}')
    (source / "LICENSE").write_text("MIT")
    (source / "modeling_custom.py").write_text("raise SystemExit")
    model, spec = student_of("mixtral")
    folder = write.save(model, spec, tmp_path / "out", assets=source)
    assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ messages }}"
    assert checks.open_native(folder).generation_config.temperature == 0.3
    assert (folder / "LICENSE").is_file() and not (folder / "modeling_custom.py").exists()
    assert checkpoint.load_spec(folder) == spec
    bare = write.save(model, spec, tmp_path / "bare", tokenizer=AutoTokenizer.from_pretrained(source))
    assert AutoTokenizer.from_pretrained(bare).vocab_size > 50
    assert checks.open_native(bare).generation_config.eos_token_id == 3


# What is chosen, and what is refused


@pytest.mark.parametrize(("source", "shared_width", "name"), [
    ("llama", 0, "mixtral"),
    ("llama", 8, "granitemoeshared"),
    ("llama with biases", 0, "granitemoeshared"),
    ("mistral with window", 0, "mixtral"),
    ("mistral with window", 8, "qwen2_moe"),
    ("qwen2", 0, "qwen2_moe"),
    ("qwen2", 8, "glm4_moe"),
    ("qwen2 with windows", 8, "qwen2_moe"),
    ("qwen3", 0, "qwen3_moe"),
    ("qwen3", 8, "glm4_moe"),
])  # fmt: skip
def test_the_choice_follows_the_family_and_explains_itself(source: str, shared_width: int, name: str) -> None:
    container, why = choose(config_of(source), shared_width=shared_width)
    assert container.name == name
    assert why.startswith(f"{name}, because the model is a {source.split()[0].rstrip(',')}")
    assert f"it weighs experts by {container.gate}" in why
    assert ("shared expert of 8 neurons" in why) == (shared_width > 0)


@pytest.mark.parametrize(("name", "source", "changes", "reason", "able"), [
    ("glm4_moe", "mistral with window", {}, "it has a sliding window", "mixtral or qwen2_moe can"),
    ("mixtral", "qwen2", {}, "its attention has biases on queries, keys and values", "qwen2_moe or glm4_moe can"),
    ("mixtral", "llama with biases", {}, "on the output projection too", "granitemoeshared can"),
    ("mixtral", "qwen3", {}, "it normalises queries and keys", "qwen3_moe or glm4_moe can"),
    ("qwen3_moe", "llama", {}, "it does not normalise queries", "mixtral or granitemoeshared or glm4_moe or"),
    ("qwen2_moe", "llama with wide heads", {}, "its heads are 16 wide", "mixtral or glm4_moe can"),
    ("mixtral", "qwen2 with windows", {}, "only some of its layers have a sliding window", "qwen2_moe can"),
    ("mixtral", "llama", {"mlp_bias": True}, "its FFNs have biases", "no container can"),
    ("mixtral", "llama", {"hidden_act": "gelu"}, "its activation is 'gelu'", "no container can"),
    ("glm4_moe", "llama", {"rope_parameters": PARTIAL}, "it rotates a part of each head only", "no container can"),
])  # fmt: skip
def test_a_refusal_names_the_property_and_who_can(
    name: str, source: str, changes: dict[str, Any], reason: str, able: str
) -> None:
    with pytest.raises(ValueError, match="cannot hold this model, because") as refusal:
        fit.require_fit(CONTAINERS[name], config_of(source, **changes))
    assert str(refusal.value).startswith(f"{name} cannot")
    assert reason in str(refusal.value) and able in str(refusal.value)


def test_what_the_spec_asks_for_is_refused_too() -> None:
    config = config_of("llama")
    _, spec = student_of("mixtral")
    held = CONTAINERS["mixtral"]
    assert obstacle(held, config, spec=spec) is None
    shape = spec.stacks[0]
    for changed, reason in (
        (replace(spec, router_bias=True), "router has a trained bias"),
        (replace(spec, gate="sigmoid"), "the gate is 'sigmoid', and it weighs experts by 'softmax_topk'"),
        (replace(spec, head="classification", problem="single_label"), "containers are causal language models"),
        (replace(spec, stacks=(shape, shape)), "2 stacks of layers"),
        (replace(spec, stacks=(replace(shape, gated=False, activation="gelu"),)), "not gated with gelu"),
        (replace(spec, stacks=(replace(shape, shared_width=8),)), "a shared expert (8 neurons) is wanted"),
    ):
        assert reason in (obstacle(held, config, spec=changed) or "")


def test_models_that_no_container_holds_are_told_where_to_go() -> None:
    from transformers import BertConfig, GPT2Config

    for config in (BertConfig(), GPT2Config()):
        with pytest.raises(ValueError, match="export it to ONNX"):
            choose(config)
    with pytest.raises(ValueError, match=r"glm4_moe cannot, because it has a sliding window .*; qwen3_moe cannot"):
        choose(config_of("qwen3 with window"), shared_width=8)
    with pytest.raises(ValueError, match=r"unknown container 'mixtal'; did you mean 'mixtral'\? known: glm4_moe, "):
        CONTAINERS["mixtal"]


def test_the_package_gives_the_documented_names_and_lists_containers_without_torch() -> None:
    for name in ("choose", "preflight", "Shards", "save", "save_checkpoint", "audit", "same_logits", "engine_notes"):
        assert callable(getattr(containers, name)), name
    with pytest.raises(AttributeError, match="has no attribute 'merge'"):
        containers.merge  # noqa: B018
    program = (
        "import sys; from ffn2moe.containers import CONTAINERS; "
        "sys.exit(any(row.name != name for name, row in CONTAINERS.items()) or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_layer_that_differs_from_the_others_is_refused(tmp_path: Path) -> None:
    model, spec = student_of("mixtral")
    other, _ = student_of("mixtral", E=3)
    wrong_k, _ = student_of("mixtral", K=1)
    biased, _ = student_of("mixtral")
    moe_layers(biased)[1].router.bias.fill_(0.1)
    balanced, _ = student_of("mixtral")
    moe_layers(balanced)[1].router.balance_bias[0] = 0.1
    for swapped, reason in (
        (other, r"layer 1 has \[E, M, D\] = \[3, 16, 32\] and K = 2, the spec \[4, 16, 32\]"),
        (wrong_k, "layer 1 has .* and K = 1, the spec .* and K = 2"),
        (biased, "layer 1 has biases in its experts or its router"),
        (balanced, "layer 1 has a balance bias, which mixtral does not hold: use glm4_moe"),
    ):
        mixed = deepcopy(model)
        mixed.model.layers[1].mlp = moe_layers(swapped)[1]
        with pytest.raises(ValueError, match=reason):
            write.save(mixed, spec, tmp_path / "out")
        assert not list(tmp_path.iterdir())


def test_engines_that_differ_are_named() -> None:
    def notes(name: str, source: str) -> str:
        return " ".join(fit.engine_notes(CONTAINERS[name], config_of(source)))

    assert notes("mixtral", "llama") == notes("mixtral", "llama3") == notes("qwen3_moe", "qwen3") == ""
    assert "llama.cpp reads no sliding window" in notes("mixtral", "mistral with window")
    assert "llama3 rotary scaling" in notes("qwen2_moe", "llama3")
    assert "vLLM's granitemoeshared has no attention biases" in notes("granitemoeshared", "llama with biases")
    assert "GLM tokenizer" in notes("glm4_moe", "llama") and "SGLang" in notes("glm4_moe", "llama")


# How it is written


def test_shards_are_bounded_indexed_and_written_as_the_tensors_come(tmp_path: Path) -> None:
    model, spec = student_of("qwen2_moe", shared_width=11)
    container = CONTAINERS["qwen2_moe"]
    limit = 24_000
    written_before: list[int] = []

    def pieces() -> Iterator[Mapping[str, Tensor]]:
        yield from tensors.outer_tensors(container, model.config, model.state_dict())
        for layer, moe in enumerate(moe_layers(model)):
            written_before.append(len(list(tmp_path.glob(".out.partial/*.safetensors"))))
            yield tensors.layer_tensors(container, spec, layer, moe)

    folder = write.write(tmp_path / "out", container, spec, model.config, pieces(), shard_bytes=limit)
    assert written_before == sorted(set(written_before))  # shards are on disk before the next layer is asked for
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert [path.name for path in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    assert all(sum(tensor.nbytes for tensor in load_file(path).values()) <= limit for path in shards)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in Shards(folder).values())
    assert set(index["weight_map"]) == set(Shards(folder))
    assert checks.same_logits(model, folder, tokens()).largest < 1e-4


def test_a_saved_checkpoint_becomes_the_same_container_a_layer_at_a_time(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make_tokenizer(tmp_path / "tokenizer")
    model, spec = student_of("glm4_moe", shared_width=11, tie_word_embeddings=True)
    checkpoint.save(model, AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), spec, tmp_path / "saved")
    streamed = write.save_checkpoint(tmp_path / "saved", tmp_path / "streamed", shard_bytes=10_000)
    at_once = write.save(model, spec, tmp_path / "at_once")
    held = Shards(streamed)
    expected = tensors_of(at_once)
    assert set(held) == set(expected)
    assert all(torch.equal(held[name], expected[name]) for name in expected)
    assert AutoTokenizer.from_pretrained(streamed).vocab_size > 50


def test_a_container_is_not_taken_for_a_checkpoint(folders: dict[tuple[str, int], Path], tmp_path: Path) -> None:
    for (name, _), folder in folders.items():
        with pytest.raises(ValueError, match=f"is a native {name} container: open it with transformers"):
            checkpoint.load(folder)
        with pytest.raises(ValueError, match=f"is a {name} container already"):
            write.save_checkpoint(folder, tmp_path / "out")


def test_an_interrupted_write_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    model, spec = student_of("mixtral")
    container = CONTAINERS["mixtral"]

    def cut_short() -> Iterator[Mapping[str, Tensor]]:
        yield from tensors.outer_tensors(container, model.config, model.state_dict())
        yield tensors.layer_tensors(container, spec, 0, moe_layers(model)[0])
        assert (tmp_path / ".out.partial").is_dir() and not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write.write(tmp_path / "out", container, spec, model.config, cut_short())
    assert not list(tmp_path.iterdir())
    (tmp_path / ".out.partial").mkdir()  # as a killed process leaves it
    (tmp_path / ".out.partial" / "model-00007.safetensors").write_text("half")
    folder = write.save(model, spec, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]


def test_tensors_that_do_not_come_or_come_twice_are_noticed_before_the_folder_appears(tmp_path: Path) -> None:
    model, spec = student_of("mixtral")
    container = CONTAINERS["mixtral"]
    layers = [tensors.layer_tensors(container, spec, layer, moe) for layer, moe in enumerate(moe_layers(model))]
    outer = list(tensors.outer_tensors(container, model.config, model.state_dict()))
    for pieces, reason in (
        (outer + layers[:2], r"model\.layers\.2\.block_sparse_moe\.experts\.0\.w1\.weight is missing; .* and \d+ more"),
        (outer + layers + [{"model.layers.3.extra.weight": torch.zeros(1)}], "extra.weight is not of this class"),
        (outer + layers + layers[:1], "is written twice"),
        (outer + layers[:2] + [{key: torch.full_like(value, torch.nan) for key, value in layers[2].items()}],
         "has NaN or infinite values"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            write.write(tmp_path / "out", container, spec, model.config, pieces)
        assert not list(tmp_path.iterdir())


def test_float16_that_overflows_is_refused_by_name(tmp_path: Path) -> None:
    model, spec = student_of("mixtral")
    with torch.no_grad():
        moe_layers(model)[2].w_out[3, 0, 0] = 4e4  # times the scale of 2.5
    with pytest.raises(ValueError, match=r"model\.layers\.2\.block_sparse_moe\.experts\.3\.w2\.weight .*bfloat16"):
        write.save(model, spec, tmp_path / "out", dtype=torch.float16)
    write.save(model, spec, tmp_path / "out", dtype=torch.bfloat16)


def test_a_folder_that_is_taken_is_left_alone(tmp_path: Path) -> None:
    model, spec = student_of("mixtral")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        write.save(model, spec, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="names no container"):
        write.save(model, replace(spec, container=None), tmp_path / "new")
    with pytest.raises(ValueError, match="written in float32, bfloat16 or float16"):
        write.save(model, spec, tmp_path / "new", dtype=torch.float64)


# What the audit sees


@pytest.mark.parametrize("name", CONTAINERS.names())
def test_the_audit_sees_every_difference(name: str, tmp_path: Path) -> None:
    model, spec = student_of(name)
    folder = write.save(model, spec, tmp_path / "out")
    checks.audit(folder)
    whole = tensors_of(folder)
    router = f"model.layers.1.{CONTAINERS[name].router}"
    down = f"model.layers.1.{CONTAINERS[name].experts.down.format(1)}"
    for changed, reason in (
        ({key: value for key, value in whole.items() if key != router}, f"{router} is missing"),
        (whole | {"model.layers.1.mlp.gate_proj.weight": torch.zeros(2, 2)}, "gate_proj.weight is not of this class"),
        (whole | {router: whole[router][:-1].clone()}, r"is \(3, 32\) F32, not \(4, 32\) F32"),
        (whole | {down: whole[down].half()}, f"{down} is .* F16, not .* F32"),
    ):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=reason):
            checks.audit(folder)


def test_the_audit_wants_no_code_and_a_known_class(tmp_path: Path) -> None:
    model, spec = student_of("mixtral")
    folder = write.save(model, spec, tmp_path / "out")
    config = config_on_disk(folder)
    for changed, reason in (({"auto_map": {"AutoConfig": "x.Y"}}, "auto_map"), ({"model_type": "llama"}, "'llama'")):
        (folder / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=reason):
            checks.audit(folder)


def test_shards_that_are_missing_damaged_or_unlisted_are_named(tmp_path: Path) -> None:
    model, spec = student_of("mixtral")
    folder = write.save(model, spec, tmp_path / "out", shard_bytes=20_000)
    shards = sorted(folder.glob("*.safetensors"))
    held = load_file(shards[1])
    save_file(held | {"model.stray.weight": torch.zeros(1)}, shards[1], metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"stray.weight is not of this class"):
        checks.audit(folder)
    shards[1].write_bytes(b"half a header")
    with pytest.raises(ValueError, match=r"cannot be read .* fetch it again"):
        checks.audit(folder)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        checks.audit(folder)


# The preflight of a large model


class Watched(dict[str, Tensor]):
    """A state dict that remembers what was read from it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


def test_the_preflight_reads_the_first_layers_only(tmp_path: Path) -> None:
    config = config_of("llama", num_hidden_layers=4, pad_token_id=90)
    dense = dense_of(config)
    source = Watched(dense.state_dict())
    found = trial.preflight(CONTAINERS["mixtral"], config, source, layers=1, tokens=16, vocabulary=20)
    assert found.largest < 1e-5 and found.positions == 16
    assert not any(".layers.1." in name or ".layers.3." in name for name in source.read)
    dense.save_pretrained(tmp_path, max_shard_size="20KB")
    assert trial.preflight(CONTAINERS["glm4_moe"], config, Shards(tmp_path), shared_width=11).largest < 1e-5
    del source["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"the source lacks model\.layers\.0\.mlp\.up_proj\.weight"):
        trial.preflight(CONTAINERS["mixtral"], config, source)
    with pytest.raises(ValueError, match="qwen3_moe cannot hold this model"):
        trial.preflight(CONTAINERS["qwen3_moe"], config, source)


def test_the_preflight_would_notice_a_wrong_container(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("llama")
    state = dense_of(config).state_dict()
    right = tensors.native_config

    def turned(container: Container, dense: Any, spec: MoESpec) -> Any:
        native = right(container, dense, spec)
        native.rope_parameters["partial_rotary_factor"] = 0.5
        return native

    monkeypatch.setattr(write, "native_config", turned)
    assert trial.preflight(CONTAINERS["glm4_moe"], config, state).largest > 1e-2


def test_a_real_llama_passes_every_container_that_can_hold_it() -> None:
    data = os.environ.get("FFN2MOE_DATA")
    if not data or not Path(data, "stories260k").is_dir():
        pytest.skip("set FFN2MOE_DATA to the folder that holds stories260k to try a real model")
    from transformers import AutoConfig

    folder = Path(data, "stories260k")
    config = AutoConfig.from_pretrained(folder)
    for name, shared_width in WAYS:
        if obstacle(CONTAINERS[name], config, shared_width=shared_width) is None:
            found = trial.preflight(
                CONTAINERS[name], config, Shards(folder), shared_width=shared_width, layers=5, tokens=256
            )
            assert found.largest < 1e-4 and found.top1 == 1, name


def test_temporary_folders_do_not_stay() -> None:
    before = set(os.listdir(tempfile.gettempdir()))
    config = config_of("qwen2")
    trial.preflight(CONTAINERS["qwen2_moe"], config, dense_of(config).state_dict())
    assert not {name for name in set(os.listdir(tempfile.gettempdir())) - before if name.startswith("tmp")}
