"""Fitting a mixture to a task: which experts are used, which stay, what becomes of the others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import benchmarks.ablation.methods  # noqa: F401 - registers selections whose number of experts varies
import ffn2moe
from ffn2moe import cli, shrink
from ffn2moe.data.encode import encode
from ffn2moe.dense.load import load_dense
from ffn2moe.moe import checkpoint, fit
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.layer import MoEFFN, moe_layers
from ffn2moe.shrinking import fit as shrink_fit
from ffn2moe.shrinking import model as shrink_layers
from ffn2moe.shrinking.model import require_shrinkable, shrink_model
from ffn2moe.shrinking.usage import Tokens, most_used, usage
from ffn2moe.spec import MoESpec
from tests.conftest import make_tiny_llama
from tests.mixtures import carve, flat_spec
from tests.texts import make_texts

E, D = 4, 32


def task(count: int = 300, seed: int = 0, layers: int = 2) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return Tokens([torch.randn(count, D, generator=generator) for _ in range(layers)])


def make_layer(spec: MoESpec, layer: int = 0, *, b_out: bool = True, seed: int = 0) -> MoEFFN:
    generator = torch.Generator().manual_seed(seed)
    moe = MoEFFN(spec, layer, b_in=True, b_out=b_out)
    with torch.no_grad():
        for parameter in moe.parameters():
            if parameter.dim():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        moe.neurons.copy_(torch.arange(moe.neurons.numel()).view_as(moe.neurons))
    return moe.eval()


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def test_use_is_the_number_of_tokens_where_gates_are_one() -> None:
    moe, x_TD = make_layer(flat_spec()), task().inputs[0]
    chosen_TK = moe.router(x_TD).topk(2, dim=1).indices
    assert usage(moe, x_TD).tolist() == torch.bincount(chosen_TK.flatten(), minlength=E).tolist()


def test_use_is_the_sum_of_the_gates_where_they_differ() -> None:
    moe, x_TD = make_layer(flat_spec(gate="softmax")), task().inputs[0]
    p_TE = moe.router(x_TD).softmax(-1)
    best_TE = torch.zeros_like(p_TE).scatter(1, p_TE.topk(2, dim=1).indices, 1.0)
    torch.testing.assert_close(usage(moe, x_TD), (p_TE * best_TE).sum(0).double(), rtol=1e-4, atol=1e-4)


def test_a_token_that_uses_fewer_experts_counts_for_fewer() -> None:
    moe, x_TD = make_layer(flat_spec(selection="threshold", max_active=3)), task().inputs[0]
    fit.calibrate(moe, x_TD)
    choice = moe.router.choose(moe.router(x_TD), 2)
    assert usage(moe, x_TD).tolist() == choice.load_E(E).tolist()
    assert len(set(choice.count_T().tolist())) > 1


def test_the_most_used_are_kept_in_their_order() -> None:
    assert most_used(torch.tensor([3.0, 9.0, 1.0, 5.0]), 2).tolist() == [1, 3]
    assert most_used(torch.tensor([5.0, 5.0, 5.0, 5.0]), 2).tolist() == [0, 1]


def test_drop_keeps_the_most_used_experts_as_they_are(tiny_teacher: Path) -> None:
    model, spec = carve(tiny_teacher)
    before, seen = moe_layers(model), task()
    smaller, reports = shrink_model(model, spec, seen, task(seed=1), keep=3, method="drop")
    assert (smaller.num_experts, smaller.expert_width, smaller.num_active) == (3, spec.expert_width, 2)
    for old, new, report, x_TD in zip(before, moe_layers(model), reports, seen.inputs, strict=True):
        least = usage(old, x_TD).argmin().item()
        kept = [expert for expert in range(E) if expert != least]
        assert list(report.kept) == kept and new.num_experts == 3
        assert report.use == tuple(usage(old, x_TD).tolist())
        assert report.covered == pytest.approx(1 - report.use[least] / sum(report.use))
        for name in ("w_in", "b_in", "neurons"):
            assert torch.equal(getattr(new, name), getattr(old, name)[kept]), name
        assert torch.equal(new.router.weight, old.router.weight[kept])
        assert torch.equal(new.router.balance_bias, old.router.balance_bias[kept])


def test_dropping_what_no_token_uses_changes_nothing(tiny_teacher: Path) -> None:
    model, spec = carve(tiny_teacher)
    for moe in moe_layers(model):
        with torch.no_grad():
            moe.router.bias[2] = -1e4
    before = moe_layers(model)
    _, reports = shrink_model(model, spec, task(), task(seed=1), keep=3, method="drop")
    for old, new, report in zip(before, moe_layers(model), reports, strict=True):
        x_TD = task(seed=2).inputs[0]
        torch.testing.assert_close(new(x_TD), old(x_TD), atol=1e-4, rtol=1e-4)
        assert report.covered == 1 and report.change < 1e-4


@pytest.mark.parametrize("b_out", [False, True])
@pytest.mark.parametrize("gate", ["unit", "softmax"])
def test_what_follows_the_neurons_is_fitted_to_the_layer_before(b_out: bool, gate: str) -> None:
    spec = flat_spec(num_layers=1, gate=gate)
    moe, made, x_TD = make_layer(spec, b_out=b_out), make_layer(spec, b_out=b_out), task().inputs[0]
    with torch.no_grad():
        made.w_in[3] = 0
    before, start = error(made(x_TD), moe(x_TD)), made.w_out.clone()
    shrink_fit.imitate(made, moe, x_TD)
    assert error(made(x_TD), moe(x_TD)) < 0.9 * before
    assert not torch.equal(made.w_out, start)


def test_a_layer_too_wide_for_moments_has_its_scale_and_bias_fitted_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrink_fit, "WIDEST_MOMENTS", 63)
    spec = flat_spec(num_layers=1)
    moe, made, x_TD = make_layer(spec), make_layer(spec), task().inputs[0]
    with torch.no_grad():
        made.w_out[3] = 0
    start = made.w_out.clone()
    shrink_fit.imitate(made, moe, x_TD)
    assert torch.equal(made.w_out, start)
    torch.testing.assert_close(made(x_TD).mean(0), moe(x_TD).mean(0), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        scale, best = made.output_scale.item(), (made(x_TD) - moe(x_TD)).square().sum()
        for factor in (0.99, 1.01):
            made.set_scale(scale * factor)
            assert (made(x_TD) - moe(x_TD)).square().sum() > best


KINDS: list[dict[str, Any]] = [
    {"gate": "softmax"},
    {"gate": "sigmoid", "router_bias": False},
    {"gate": "softmax_topk", "shared_width": 5, "expert_width": 15},
    {"selection": "threshold", "max_active": 4},
    {"elastic": (1, 4)},
    {"active_per_layer": (1, 3)},
    {"gated": True, "activation": "silu"},
]


@pytest.mark.parametrize("changes", KINDS)
def test_every_kind_of_mixture_can_be_shrunk(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check_kind("drop", changes, monkeypatch)


def check_kind(method: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = flat_spec(**changes)
    layers = [make_layer(spec, layer, seed=layer) for layer in range(2)]
    model = torch.nn.ModuleList(layers)
    placed: dict[int, MoEFFN] = {}
    monkeypatch.setattr(shrink_layers, "install", lambda model, layer, ffn: placed.update({layer: ffn}))
    seen, held = task(), task(seed=1)
    for moe in layers:
        fit.calibrate(moe, seen.inputs[0])
    smaller, reports = shrink_model(model, spec, seen, held, keep=3, method=method)
    assert smaller.num_experts == 3 and smaller.shrunk == method and max(smaller.budgets) <= 3
    assert smaller.max_active is None or smaller.max_active == 3
    assert MoESpec.from_dict(json.loads(json.dumps(smaller.to_dict()))) == smaller
    for layer, report in enumerate(reports):
        assert 0 < report.covered <= 1 and report.change < 1.2
        x_TD = held.inputs[layer]
        y_TD = placed[layer](x_TD)
        torch.testing.assert_close(y_TD, placed[layer].reference(x_TD), atol=1e-5, rtol=1e-5)


def test_the_first_blocks_stay_where_experts_are_in_order() -> None:
    spec = flat_spec(selection="prefix")
    layers = [make_layer(spec, layer, seed=layer) for layer in range(2)]
    for moe in layers:
        fit.calibrate(moe, task().inputs[0])
    reports = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shrink_layers, "install", lambda model, layer, ffn: None)
        _, reports = shrink_model(torch.nn.ModuleList(layers), spec, task(), task(seed=1), keep=3, method="drop")
    assert [report.kept for report in reports] == [(0, 1, 2)] * 2


@pytest.mark.parametrize(
    ("changes", "keep", "method", "message"),
    [
        ({}, 4, "drop", "leaves nothing to take away, as the model has 4 experts: keep fewer"),
        ({}, 9, "drop", "keep = 9 leaves nothing to take away"),
        ({"num_active": 3}, 2, "drop", "fewer than the 3 experts that a token uses: keep at least 3"),
        ({"routing": "sequence"}, 3, "drop", "shrink a model with routing token"),
        ({"active_per_layer": (1, 3)}, 2, "drop", "fewer than the 3 experts that a token uses"),
        ({}, 3, "dropp", "unknown shrink method 'dropp'; did you mean 'drop'"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], keep: int, method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_shrinkable(flat_spec(**changes), keep, method)


def test_models_of_several_stacks_are_refused() -> None:
    spec = flat_spec()
    with pytest.raises(ValueError, match="has 2 stacks of layers, and experts are counted in one"):
        require_shrinkable(replace(spec, stacks=spec.stacks * 2), 3, "drop")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("task") / "task.txt"
    file.write_text("\n".join(text.replace("\n", " ") for text in make_texts(40)) + "\n")
    return file


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A checkpoint folder with its tokenizer."""
    model, spec = carve(tiny_teacher)
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    checkpoint.save(model, load_dense(str(tiny_teacher))[1], spec, folder)
    return folder


def test_a_checkpoint_becomes_an_export_with_fewer_experts(
    saved: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_command("drop", saved, texts, tmp_path, capsys)


def check_command(
    method: str, saved: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, graphs: bool = True
) -> None:
    out = tmp_path / "small"
    arguments = [str(saved), str(texts), "--keep", "3", "--method", method, "--out", str(out)]
    assert cli.main(["shrink", *arguments, *([] if graphs else ["--no-onnx"])]) == 0
    shown = capsys.readouterr().out
    assert "load covered" in shown and "32 texts show which experts are used, 8 what is lost" in shown
    assert {file.name for file in tmp_path.iterdir()} == {"small"}
    spec = checkpoint.load_spec(out / "checkpoint")
    assert (spec.num_experts, spec.num_active, spec.shrunk) == (3, 2, method)
    assert spec.expert_width == (22 if method == "regroup" else 16)
    assert spec.active_share == pytest.approx(2 * spec.expert_width / 64)
    manifest = json.loads((out / "manifest.json").read_text())
    assert [row["layer"] for row in manifest["shrink"]["layers"]] == [0, 1]
    assert manifest["shrink"]["from"]["num_experts"] == 4

    assert cli.main(["info", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"3 of {spec.expert_width} neurons" in shown and f"contiguous, then fitted to a task: {method}" in shown
    if not graphs:
        assert "there are no ONNX graphs" in shown
        assert cli.main(["encode", str(out), "a word"]) == 2
        assert "open" in (printed := capsys.readouterr().err) and "with ffn2moe.load" in printed
        return
    assert cli.main(["verify", str(out), "--texts", "4", "--threads", "1"]) == 0
    capsys.readouterr()
    assert cli.main(["encode", str(out), "a word", "--threads", "1", "--plan", "sorted"]) == 0
    made = torch.tensor(json.loads(capsys.readouterr().out)["embedding"])
    model = ffn2moe.load(out / "checkpoint")
    tokenizer = load_dense_tokenizer(saved)
    wanted = encode(model, tokenizer, ["a word"], max_length=32)[0]
    torch.testing.assert_close(made, wanted, atol=1e-4, rtol=1e-3)


def load_dense_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_an_export_can_be_shrunk_and_what_was_shrunk_again(exported: Path, texts: Path, tmp_path: Path) -> None:
    export, half, less = exported / "models/exported", tmp_path / "a/half", tmp_path / "b/less"
    before = {file: file.read_bytes() for file in sorted(export.rglob("*")) if file.is_file()}
    options = ["--no-onnx", "--out"]
    assert cli.main(["shrink", str(export), str(texts), "--keep", "3", *options, str(half)]) == 0
    assert cli.main(["shrink", str(half), str(texts), "--keep", "2", *options, str(less)]) == 0
    assert checkpoint.load_spec(less / "checkpoint").num_experts == 2
    assert {file: file.read_bytes() for file in before} == before


def test_a_language_model_without_output_bias_can_be_shrunk(tmp_path: Path, texts: Path) -> None:
    check_language_model("drop", 12, tmp_path, texts)


def check_language_model(method: str, width: int, tmp_path: Path, texts: Path) -> None:
    from ffn2moe.dense.locate import read_ffn
    from ffn2moe.moe.experts import neurons_by_expert, slice_experts
    from ffn2moe.moe.install import install_moe

    source = make_tiny_llama(tmp_path / "llama")
    model, tokenizer = load_dense(str(source))
    spec = spec_of(
        model, head="causal", num_experts=E, num_active=2, partition="contiguous", teacher="tiny", max_length=32
    )
    layers = []
    for layer in range(2):
        neurons_EM = neurons_by_expert(torch.arange(48) % E, E)
        moe = MoEFFN.from_experts(spec, slice_experts(read_ffn(model, layer), neurons_EM), neurons_EM)
        torch.nn.init.normal_(moe.router.weight, generator=torch.Generator().manual_seed(layer))
        layers.append(moe)
    install_moe(model, layers)
    checkpoint.save(model, tokenizer, spec, tmp_path / "checkpoint")
    manifest = shrink.shrink(
        tmp_path / "checkpoint", texts, tmp_path / "out", keep=3, method=method, onnx=False, device="cpu"
    )
    assert manifest["spec"]["stacks"][0]["expert_width"] == width
    assert all(moe.b_out is None for moe in moe_layers(ffn2moe.load(tmp_path / "out/checkpoint")))


def test_a_mistake_is_one_line_and_leaves_nothing(
    saved: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, one, container, bare = (tmp_path / name for name in ("empty.txt", "one.txt", "mixtral", "bare"))
    empty.write_text("\n\n")
    one.write_text("a word\n")
    container.mkdir()
    (container / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    bare.mkdir()
    there = tmp_path / "there"
    there.mkdir()
    start = {file.name for file in tmp_path.iterdir()}
    for path, file, keep, out, message in (
        (saved, empty, "3", "new", "holds no text"),
        (saved, one, "3", "new", "holds one text"),
        (saved, tmp_path / "none.txt", "3", "new", "there is no file"),
        (saved, texts, "4", "new", "leaves nothing to take away"),
        (saved, texts, "1", "new", "fewer than the 2 experts that a token uses"),
        (saved, texts, "3", "there", "exists: remove it, or name another folder"),
        (container, texts, "3", "new", "is a native mixtral container"),
        (bare, texts, "3", "new", "is not an ffn2moe checkpoint"),
    ):
        arguments = [str(path), str(file), "--keep", keep, "--method", "drop", "--out", str(tmp_path / out)]
        assert cli.main(["shrink", *arguments]) == 2
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1, printed.err
    assert {file.name for file in tmp_path.iterdir()} == start


def test_a_failure_while_writing_leaves_no_half_of_an_export(
    saved: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object, **named: object) -> None:
        raise OSError("no space left on the device")

    monkeypatch.setattr("ffn2moe.onnx.write.write_manifest", fail)
    with pytest.raises(OSError, match="no space left"):
        shrink.shrink(saved, texts, tmp_path / "out", keep=3, method="drop", onnx=False, device="cpu")
    assert list(tmp_path.iterdir()) == []
