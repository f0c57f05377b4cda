"""Layer by layer is the same as in memory, bounded in memory, resumable, and never looks whole before it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ffn2moe.data.batches import Batch, in_order
from ffn2moe.decompose import memory, stream
from ffn2moe.decompose import statistics as activations
from ffn2moe.decompose.clustering import balanced_kmeans
from ffn2moe.decompose.inputs import layer_inputs
from ffn2moe.decompose.layer import decompose_layer, output_of, outputs
from ffn2moe.decompose.memory import estimate
from ffn2moe.decompose.reconstruct import refit_outputs
from ffn2moe.decompose.route import RouterSettings, fit_router
from ffn2moe.decompose.shards import UnfinishedCheckpoint
from ffn2moe.decompose.source import Source, skeleton
from ffn2moe.decompose.stream import StreamSettings
from ffn2moe.dense.config import head_of
from ffn2moe.dense.locate import read_ffn
from ffn2moe.moe import checkpoint
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.install import install_moe
from ffn2moe.moe.layer import moe_layers
from ffn2moe.progress import Track, untracked
from ffn2moe.spec import MoESpec
from tests.test_families import CASES, tiny

ROUTER = RouterSettings(steps=5, batch_tokens=64, seed=0)
NOT_ONE_STACK = ("t5", "mt5", "umt5", "bart", "mbart", "marian", "pegasus", "m2m_100", "whisper", "clip", "siglip")
IMAGES = ("vit", "deit", "dinov2", "clip_vision", "siglip_vision")
NO_AUTO_CLASS = ("clip_text_model, projected", "siglip_text_model")  # that gives the class of the case
STREAMED = [
    case for case in CASES if case.split()[0] not in NOT_ONE_STACK and not case.startswith((*IMAGES, *NO_AUTO_CLASS))
]


def blocks(count: int = 12, length: int = 8) -> list[Batch]:
    ids = torch.randint(4, 60, (count, length), generator=torch.Generator().manual_seed(3))
    return list(in_order("causal", ids.tolist(), batch_texts=2))


def make(folder: Path, case: str = "llama", **options: Any) -> Path:
    tiny(case).save_pretrained(folder, **options)
    return folder


def spec_for(folder: Path, **changes: Any) -> MoESpec:
    model = skeleton(folder)
    options = {"num_experts": 4, "num_active": 2, "max_length": 8, "teacher": "tiny", "partition": "coactivation"}
    return spec_of(model, head=head_of(model.config), **options | changes)


def decompose(
    folder: Path,
    out: Path,
    batches: list[Batch],
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    track: Track = untracked,
    **changes: Any,
) -> list[dict[str, Any]]:
    settings = StreamSettings(spec_for(folder, **changes), replace(ROUTER, seed=seed), dtype)
    return stream.decompose(folder, out, batches, settings, track=track)


@pytest.mark.parametrize("case", STREAMED)
def test_layer_by_layer_gives_what_the_model_in_memory_gives(case, tmp_path):
    make(tmp_path / "dense", case)
    batches = blocks()
    rows = decompose(tmp_path / "dense", tmp_path / "out", batches)
    assert [row["layer"] for row in rows] == list(range(len(rows)))

    student = checkpoint.load(tmp_path / "out")
    spec = checkpoint.load_spec(tmp_path / "out")
    model = tiny(case)
    fitted = batches[: -max(1, len(batches) // stream.HELD_OUT_SHARE)]
    layers = []
    for index, x_TD in enumerate(layer_inputs(model, fitted, max_tokens=10**6)):
        moe = decompose_layer(read_ffn(model, index), x_TD, spec, index, seed=0)
        fit_router(moe, x_TD, RouterSettings(steps=5, batch_tokens=64, seed=index))
        refit_outputs(moe, x_TD, outputs(read_ffn(model, index), x_TD), penalty=1e-2)
        layers.append(moe)
    for ours, theirs in zip(moe_layers(student), layers, strict=True):
        assert torch.equal(ours.neurons, theirs.neurons)
        torch.testing.assert_close(ours.output_scale, theirs.output_scale, rtol=1e-4, atol=1e-5)
    install_moe(model, layers)
    torch.testing.assert_close(output_of(student, batches[0]), output_of(model, batches[0]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", ["t5 plain", "clip"])
def test_a_model_of_several_stacks_is_refused(case, tmp_path):
    make(tmp_path / "dense", case)
    with pytest.raises(ValueError, match=r"2 stacks of layers.*convert this one in memory"):
        decompose(tmp_path / "dense", tmp_path / "out", blocks())


def test_padding_is_neither_seen_nor_counted(tmp_path):
    make(tmp_path / "dense", "bert")
    texts = [list(range(4, 4 + length)) for length in (5, 8, 8, 3, 7, 6)]
    for name, pad_id in (("a", 1), ("b", 50)):
        batches = list(in_order("embedding", texts, batch_texts=2, pad_id=pad_id))
        decompose(tmp_path / "dense", tmp_path / name, batches)
    for name in sorted(path.name for path in (tmp_path / "a").glob("*.safetensors")):
        one, two = (load_file(tmp_path / side / name) for side in "ab")
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)


class Stop(Exception):
    pass


def test_a_run_that_was_stopped_goes_on_where_it_was_and_ends_in_the_same_bytes(tmp_path, monkeypatch):
    make(tmp_path / "dense")
    decompose(tmp_path / "dense", tmp_path / "whole", blocks())
    write, finished = UnfinishedCheckpoint.write, []

    def stopping(self, shard, tensors):
        if len(finished) == 1:
            raise Stop
        finished.append(shard)
        write(self, shard, tensors)

    monkeypatch.setattr(UnfinishedCheckpoint, "write", stopping)
    with pytest.raises(Stop):
        decompose(tmp_path / "dense", tmp_path / "out", blocks())
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial/config.json").exists(), "nothing would take it for a model"

    monkeypatch.undo()

    def watching(self, shard, tensors):
        finished.append(shard)
        write(self, shard, tensors)

    monkeypatch.setattr(UnfinishedCheckpoint, "write", watching)
    rows = decompose(tmp_path / "dense", tmp_path / "out", blocks())
    assert len(rows) == 2 and len(finished) == len(set(finished)), "no shard is made twice"
    assert not (tmp_path / "out.partial").exists()
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert not any(path.name.startswith(("progress", "states")) for path in (tmp_path / "out").iterdir())


def test_a_run_with_other_settings_does_not_go_on_with_what_is_there(tmp_path, monkeypatch):
    make(tmp_path / "dense")
    keep = UnfinishedCheckpoint.keep

    def stopping(self, rows, hidden):
        keep(self, rows, hidden)
        raise Stop

    monkeypatch.setattr(UnfinishedCheckpoint, "keep", stopping)
    with pytest.raises(Stop):
        decompose(tmp_path / "dense", tmp_path / "out", blocks())
    monkeypatch.undo()
    tracked: list[int] = []

    def track(items, total, what):
        tracked.append(total)
        return items

    decompose(tmp_path / "dense", tmp_path / "out", blocks(), seed=1, track=track)
    assert tracked == [2]


def test_what_exists_is_not_written_over(tmp_path):
    make(tmp_path / "dense")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists: remove it"):
        decompose(tmp_path / "dense", tmp_path / "out", blocks())


def test_weights_keep_their_dtype_unless_another_is_wanted_and_routers_stay_float32(tmp_path):
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    decompose(tmp_path / "dense", tmp_path / "same", blocks())
    decompose(tmp_path / "dense", tmp_path / "wide", blocks(), dtype=torch.float32)
    for folder, dtype in (("same", torch.bfloat16), ("wide", torch.float32)):
        found = {}
        for path in (tmp_path / folder).glob("*.safetensors"):
            found |= {name: tensor.dtype for name, tensor in load_file(path).items()}
        assert found["model.layers.0.mlp.w_in"] == found["model.embed_tokens.weight"] == dtype
        assert found["model.layers.0.mlp.router.weight"] == torch.float32
    one, two = (checkpoint.load(tmp_path / name) for name in ("same", "wide"))
    for ours, theirs in zip(moe_layers(one), moe_layers(two), strict=True):
        assert torch.equal(ours.w_in, theirs.w_in), "bfloat16 holds what came from bfloat16"


@pytest.mark.parametrize("tie", [True, False])
def test_tied_weights_are_written_once_and_opened_as_one(tie, tmp_path):
    model = tiny("qwen3" if tie else "llama")
    model.config.tie_word_embeddings = tie
    if tie:
        model.tie_weights()
    model.save_pretrained(tmp_path / "dense")
    decompose(tmp_path / "dense", tmp_path / "out", blocks())
    student = checkpoint.load(tmp_path / "out")
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tie
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert ("lm_head.weight" in index["weight_map"]) == (not tie)


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_damaged_and_incomplete_sources_are_refused_with_the_cause(tmp_path):
    def refused(name: str, change: Any, message: str, **settings: Any) -> None:
        folder = make(tmp_path / name)
        rewrite(folder, change)
        with pytest.raises(ValueError, match=message):
            decompose(folder, tmp_path / f"{name}.out", blocks(), **settings)
        assert not (tmp_path / f"{name}.out").exists()

    def poison(name: str, value: float) -> Any:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors[name][1] = value

        return change

    up = "model.layers.1.mlp.up_proj.weight"
    refused("nan", poison(up, float("nan")), r"NaN or infinite values in model\.layers\.1\.mlp\.up_proj\.weight")
    refused("missing", lambda tensors: tensors.pop(up), r"lacks weights \(model\.layers\.1\.mlp\.up_proj\.weight")
    refused(
        "shape",
        lambda tensors: tensors.update({up: tensors[up][:-1].clone()}),
        r"is \[171, 32\], and by config.json \[172, 32\]",
    )
    refused(
        "doubled",
        lambda tensors: tensors.update({"layers.0.mlp.up_proj.weight": tensors[up].clone()}),
        r"holds model\.layers\.0\.mlp\.up_proj\.weight twice",
    )
    refused("overflow", poison(up, 7e4), r"reaches 7e\+04, and float16 ends at 65504", dtype=torch.float16)


def test_a_missing_shard_is_named(tmp_path):
    make(tmp_path / "dense", max_shard_size="40KB")
    next((tmp_path / "dense").glob("model-00002-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of"):
        decompose(tmp_path / "dense", tmp_path / "out", blocks())


def test_two_different_tensors_under_tied_names_are_refused(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense/config.json").read_text())
    (tmp_path / "dense/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        decompose(tmp_path / "dense", tmp_path / "out", blocks())


def test_texts_that_the_model_cannot_read_are_refused(tmp_path):
    make(tmp_path / "dense")
    with pytest.raises(ValueError, match="41 tokens are longer than the model's context, 40"):
        decompose(tmp_path / "dense", tmp_path / "out", blocks(2, 41))
    with pytest.raises(ValueError, match="token 60 and the model knows 60"):
        decompose(tmp_path / "dense", tmp_path / "out", [Batch({"input_ids": torch.tensor([[60]])}, None)])
    with pytest.raises(ValueError, match="no calibration tokens"):
        decompose(tmp_path / "dense", tmp_path / "out", [])


def test_an_unknown_activation_is_refused_before_any_work(tmp_path):
    make(tmp_path / "dense")
    config = json.loads((tmp_path / "dense/config.json").read_text())
    (tmp_path / "dense/config.json").write_text(json.dumps(config | {"hidden_act": "mish"}))
    with pytest.raises(ValueError, match="'mish' is not supported"):
        decompose(tmp_path / "dense", tmp_path / "out", blocks())


def test_no_weight_is_read_for_the_estimate_and_layers_add_nothing_to_memory(tmp_path, monkeypatch):
    import transformers

    found = {}
    for layers in (2, 6):
        folder = tmp_path / str(layers)
        config = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4, vocab_size=60
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        monkeypatch.setattr(memory, "resident", lambda: 0)
        with monkeypatch.context() as patch:
            patch.setattr(Source, "read", None)
            found[layers] = estimate(folder, spec_for(folder), calibration_tokens=64, batch_tokens=32)
    assert found[2].memory == found[6].memory > 0
    assert found[6].disk > 2.5 * found[2].disk - 60 * 64 * 8 * 2
    assert found[2].layer == 4 * (4 * 64 * 64 + 3 * 64 * 256 + 2 * 64)
    assert "2" in str(found[2]) and "GiB of memory" in str(found[2])


def test_what_the_model_computes_itself_is_there_without_its_weights(tmp_path):
    for case in ("llama", "gemma3_text", "bert", "gpt_neox", "gptj"):
        make(tmp_path / case, case)
        real = dict(tiny(case).named_buffers())
        for name, buffer in skeleton(tmp_path / case).named_buffers():
            if buffer.device.type != "meta":
                torch.testing.assert_close(buffer, real[name])


def test_wide_ffns_are_partitioned_as_narrow_ones_are(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    groups_FP = torch.nn.functional.one_hot(torch.arange(96) % 4).float()
    h_TF = torch.randn(2000, 4, generator=generator) @ groups_FP.T + 0.3 * torch.randn(2000, 96, generator=generator)
    found = []
    for widest in (96, 95):
        monkeypatch.setattr(activations, "WIDEST_MOMENTS", widest)
        statistics = activations.NeuronStatistics(96)
        for h in h_TF.split(700):
            statistics.update(h)
        assert (statistics.second_FF is None) == (widest == 95)
        profile_FP = statistics.profiles(8, 0)
        found.append(
            (balanced_kmeans(statistics.profiles(64, 0), 4, 0), profile_FP @ profile_FP.T, statistics.square_F)
        )
    (expert, correlation, square), (wide_expert, wide_correlation, wide_square) = found
    assert torch.equal(expert, wide_expert)
    torch.testing.assert_close(correlation, wide_correlation, atol=0.02, rtol=0)
    torch.testing.assert_close(square, wide_square, rtol=1e-4, atol=1e-4)


def test_the_finished_folder_says_what_it_is(tmp_path):
    make(tmp_path / "dense")
    (tmp_path / "dense/tokenizer_config.json").write_text("{}")
    decompose(tmp_path / "dense", tmp_path / "out", blocks(), shared_width=12, gate="softmax_topk")
    spec = checkpoint.load_spec(tmp_path / "out")
    assert (spec.num_experts, spec.shared_width, spec.gate, spec.head) == (4, 12, "softmax_topk", "causal")
    assert (tmp_path / "out/tokenizer_config.json").is_file()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["use_cache"] is True and head_of(tiny("llama").config) == "causal"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    total = 0
    for shard in set(index["weight_map"].values()):
        with safe_open(tmp_path / "out" / shard, framework="pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert index["metadata"]["total_size"] == total
