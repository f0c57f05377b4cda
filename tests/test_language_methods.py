"""The rows of `benchmarks.language_model`: each makes a model of the active share it is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import cmoe, flap, language_model
from benchmarks.language_methods import METHODS, Case
from ffn2moe.data.batches import Batch
from ffn2moe.decompose.inputs import layer_inputs
from ffn2moe.dense.load import load_dense
from tests.conftest import make_tiny_llama
from tests.test_token_experts import make_ffn, tokens
from tests.texts import make_texts

SIZES = {  # of the FFNs at half of them active
    **dict.fromkeys(("factorllm_released", "factorllm_published", "cmoe", "coactivation", "clusters"), 1.0),
    **dict.fromkeys(("clusters_widths",), 1.0),
    **dict.fromkeys(("clusters_half_more", "clusters_half_more_widths"), 1.5),
    **dict.fromkeys(("clusters_double", "clusters_double_widths"), 2.0),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("case")
    model, _ = load_dense(str(make_tiny_llama(folder / "dense")))
    (folder / "work").mkdir()
    ids_NL = torch.randint(5, 90, (24, 32), generator=torch.Generator().manual_seed(0))
    batches = [Batch({"input_ids": ids_1L}, None) for ids_1L in ids_NL.split(1)]
    return Case(str(folder / "dense"), layer_inputs(model, batches, max_tokens=700), batches, folder / "work")


@pytest.mark.parametrize("name", METHODS)
def test_each_method_makes_a_model_of_the_share_it_is_asked_for(name, case):
    made = METHODS[name][1](case, 0.5)
    ids = case.batches[0].inputs["input_ids"]
    dense = case.model()(input_ids=ids).logits
    with torch.no_grad():
        found = made.model(input_ids=ids).logits
    assert found.shape == dense.shape and found.isfinite().all() and not torch.equal(found, dense)
    assert made.size == pytest.approx(SIZES.get(name, 0.5), abs=0.1)
    if "layers" not in name:
        errors = [(ffn(x_TD[:50]) - 0).norm() for ffn, x_TD in zip(made.ffns, case.inputs, strict=True)]
        assert len(errors) == len(case.inputs) and all(error > 0 for error in errors)


def test_flap_puts_the_mean_of_what_goes_into_the_bias():
    ffn, (x_TD, _) = make_ffn(), tokens(300, seed=1)
    kept_F = flap.masks([flap.fluctuation(ffn, x_TD)], 0.5, same=True)[0]
    made = flap.pruned(ffn, x_TD, kept_F)
    assert kept_F.sum() == 24
    with torch.no_grad():
        assert torch.allclose(made(x_TD).mean(0), ffn(x_TD).mean(0), atol=1e-3)


def test_flap_gives_more_to_the_layers_whose_scores_have_a_long_tail():
    even_F, tailed_F = torch.linspace(0, 1, 100), torch.cat([torch.zeros(90), torch.full((10,), 10.0)])
    one, other = flap.masks([even_F, tailed_F], 0.3, same=False)
    assert one.sum() + other.sum() == 60 and other.sum() != one.sum()
    assert [mask.sum() for mask in flap.masks([even_F, tailed_F], 0.3, same=True)] == [30, 30]


def test_cmoe_with_every_expert_is_the_dense_ffn():
    ffn, (x_TD, _) = make_ffn(), tokens(300, seed=1)
    assert torch.allclose(cmoe.carved(ffn, x_TD, 1.0)(x_TD), ffn(x_TD), atol=1e-3)
    half = cmoe.carved(ffn, x_TD, 0.5)
    assert half.active == 2 and len(half.experts) == 6 and half.shared.ffn_width == 12
    assert (half(x_TD) - ffn(x_TD)).norm() < ffn(x_TD).norm()


def test_the_command_resumes_and_writes_a_page(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(language_model, "HELD_OUT_TOKENS", 256)
    folder = make_tiny_llama(tmp_path / "llama")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(make_texts(400)), encoding="utf-8")
    options = ["--tokens", "512", "--judged", "256", "--length", "32", "--shares", "0.5", "--work", str(tmp_path)]
    arguments = [str(folder), "--text", str(text), *options, "--methods", "needed", "fewer_layers"]
    assert language_model.main([*arguments, "--out", str(tmp_path / "page.md")]) == 0
    (work,) = (path for path in tmp_path.iterdir() if path.name.startswith("llama-"))
    row = json.loads((work / "needed-0.5.json").read_text())
    assert row["ratio"] > 0 and row["size"] == 0.5
    (work / "inputs.safetensors").unlink()
    assert language_model.main([*arguments, "--out", str(tmp_path / "page.md")]) == 0  # nothing is computed again
    assert not (work / "inputs.safetensors").exists()
    assert "fewer layers, spread evenly" in (tmp_path / "page.md").read_text("utf-8")
