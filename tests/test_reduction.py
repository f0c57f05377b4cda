"""Smaller dense models: fewer layers and narrower FFNs, equal to what one cuts by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ffn2moe.choices import head_of_class
from ffn2moe.decompose.elimination import most_needed
from ffn2moe.decompose.narrow import narrowed, relative_error
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import family_of, read_ffn
from ffn2moe.dense.probe import example_inputs
from ffn2moe.dense.reduction import kept_layers, kept_width, reduction, with_ffns, with_layers
from ffn2moe.moe.describe import spec_of
from ffn2moe.spec import FFNShape, MoESpec
from tests.conftest import make_tiny_bert
from tests.test_families import CASES, outputs, tiny

LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


@pytest.fixture
def deep(monkeypatch):
    """Make a model of a case of tests/test_families.py with four layers, and return it with its head."""

    def make(case: str):
        model_class, config_class, settings = CASES[case]
        key = next(key for key in LAYERS if key in settings)
        monkeypatch.setitem(CASES, case, (model_class, config_class, settings | {key: 4}))
        model = tiny(case)
        return model, head_of_class(model_class) or family_of(model).heads[0]

    return make


def opened(model: nn.Module, folder: Path) -> nn.Module:
    """Open a folder as transformers does, with the class of a model."""
    kind = type(model)
    options = {} if head_of_class(kind.__name__) else dict(family_of(model).options)
    return kind.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize(
    ("keep", "of", "kept"),
    [
        ("all", 3, (0, 1, 2)),
        (4, 6, (0, 2, 3, 5)),
        (3, 6, (0, 2, 5)),
        (1, 6, (0,)),
        (6, 12, (0, 2, 4, 7, 9, 11)),
        ((1, 4), 6, (1, 4)),
    ],
)
def test_a_number_of_layers_is_spread_evenly_and_indices_are_taken_as_they_are(keep, of, kept):
    assert kept_layers(keep, of) == kept


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, "between 1 and 6"),
        (7, "between 1 and 6"),
        ((), "at least one"),
        ((1, 1), "each once"),
        ((3, 1), "in order"),
        ((0, 6), "the model has the layers 0 to 5"),
    ],
)
def test_layers_that_are_not_there_are_refused(keep, message):
    with pytest.raises(ValueError, match=message):
        kept_layers(keep, 6)


def test_a_width_is_a_number_of_neurons_or_a_share_and_never_more_than_there_are():
    assert (kept_width("full", 64), kept_width(10, 64), kept_width(0.25, 64)) == (64, 10, 16)
    for width in (0, 65, 0.001):
        with pytest.raises(ValueError, match="from 1 to 64"):
            kept_width(width, 64)


@pytest.mark.parametrize(
    "case",
    ["bert", "mpnet", "distilbert", "modernbert", "llama", "gemma3_text", "smollm3", "gpt2", "t5 gated, encoder alone"],
)
def test_some_layers_of_a_model_are_what_its_own_layers_give_and_an_ordinary_folder(case, deep, tmp_path):
    model, head = deep(case)
    smaller = with_layers(model, (0, 2, 3), head, example_inputs(model))
    by_hand, _ = deep(case)
    layers = next(one for one in by_hand.modules() if isinstance(one, nn.ModuleList) and len(one) == 4)
    del layers[1]
    types = getattr(by_hand.config, "layer_types", None)
    by_hand.config.use_cache = False
    if types:
        by_hand.config.__dict__["layer_types"] = [types[index] for index in (0, 2, 3)]
    assert (outputs(smaller) - outputs(by_hand)).abs().max() <= 1e-6
    smaller.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(
        tmp_path, **dict(() if head_of_class(type(model).__name__) else family_of(model).options)
    )
    assert torch.equal(outputs(opened.eval()), outputs(smaller))


def test_layers_that_depend_on_their_place_are_refused(deep):
    model, head = deep("t5 gated, encoder alone")
    with pytest.raises(ValueError, match=r"the layers 1, 3 of this t5 model .* depend on their place"):
        with_layers(model, (1, 3), head, example_inputs(model))  # the first layer holds the biases of all
    model = tiny("t5 plain")
    with pytest.raises(ValueError, match="a t5 model has 2 stacks of layers"):
        reduction(model, 1, "full")
    assert reduction(model, "all", "full") is None


@pytest.mark.parametrize(
    "case", ["bert", "llama", "llama with biases", "gpt2", "opt", "falcon", "modernbert with biases"]
)
def test_narrower_ffns_are_the_given_ones_and_nothing_else_changes(case, deep, tmp_path):
    model, head = deep(case)
    ffns = [read_ffn(model, layer) for layer in range(4)]
    assert torch.equal(outputs(with_ffns(model, ffns, head)), outputs(model))
    narrow = [replace(ffn.narrow(torch.arange(9)), b_out_D=ffn.b_out_D) for ffn in ffns]
    smaller = with_ffns(model, narrow, head)
    for layer, ffn in enumerate(narrow):
        found = read_ffn(smaller, layer)
        assert all(torch.equal(getattr(found, name), one) for name, one in vars(ffn).items() if torch.is_tensor(one))
    smaller.save_pretrained(tmp_path)
    assert torch.equal(outputs(opened(model, tmp_path)), outputs(smaller))


def test_a_model_whose_config_has_no_width_is_refused(deep):
    model, head = deep("bloom")
    with pytest.raises(ValueError, match="no smaller bloom model can be built"):
        with_ffns(model, [read_ffn(model, layer).narrow(torch.arange(5)) for layer in range(4)], head)


@pytest.mark.parametrize("case", ["bert", "llama"])
def test_a_narrower_ffn_is_the_one_pruned_by_hand_with_least_squares(case):
    ffn = read_ffn(tiny(case), 0)
    x_TD = torch.randn(600, 32, generator=torch.Generator().manual_seed(0))
    found = narrowed(ffn, x_TD, 20)
    h_TF, y_TD = ffn.neurons(x_TD).double(), ffn(x_TD).double()
    kept_S = most_needed((h_TF.T @ h_TF).float(), ffn.w_out_DF, 20)
    assert torch.equal(found.w_in_FD, ffn.w_in_FD[kept_S])
    columns = [h_TF[:, kept_S]] + ([torch.ones(600, 1).double()] if ffn.b_out_D is not None else [])
    start = [ffn.w_out_DF[:, kept_S].T] + ([ffn.b_out_D[None]] if ffn.b_out_D is not None else [])
    h_TP, start_PD = torch.cat(columns, 1), torch.cat(start).double()
    gram_PP = h_TP.T @ h_TP
    gram_PP += 1e-2 * gram_PP.diagonal().mean() * torch.eye(len(gram_PP), dtype=torch.float64)
    best_PD = start_PD + torch.linalg.solve(gram_PP, h_TP.T @ (y_TD - h_TP @ start_PD))
    assert torch.allclose(found.w_out_DF.T.double(), best_PD[:20], atol=1e-4)
    pruned = replace(ffn.narrow(kept_S), b_out_D=ffn.b_out_D)
    assert relative_error(found, ffn, x_TD) < 0.97 * relative_error(pruned, ffn, x_TD)
    assert narrowed(ffn, x_TD, ffn.ffn_width) is ffn


def test_a_spec_says_what_was_kept_and_what_each_layer_is_compared_with(tmp_path):
    model, _ = load_dense(str(make_tiny_bert(tmp_path, num_hidden_layers=6)))
    kept = reduction(model, 4, 0.5)
    settings = {"head": "embedding", "partition": "none", "teacher": "tiny", "max_length": 32}
    spec = spec_of(model, num_experts=1, num_active=1, reduction=kept, **settings)
    shape = spec.stacks[0]
    assert (shape.num_layers, shape.ffn_width, shape.expert_width) == (4, 32, 32)
    assert shape.describe_layers() == "4 of 6 layers (0, 2, 3, 5)" and shape.describe_neurons() == "32 of 64 neurons"
    assert shape.compared_with == (1, 2, 4, 5) and spec.teachers_layers == (0, 2, 3, 5)
    assert spec.is_dense and spec.active_share == pytest.approx(4 / 6 * 0.5)
    assert MoESpec.from_dict(spec.to_dict()) == spec
    whole = spec_of(model, num_experts=4, num_active=1, **settings)
    assert whole.stacks[0].compared_with == tuple(range(6)) and "layers_kept" not in whole.to_dict()["stacks"][0]


def test_layers_that_the_teacher_does_not_have_are_no_spec():
    with pytest.raises(ValueError, match="must name 2 of the teacher's 3 layers"):
        FFNShape("layers", 2, 8, 16, 16, 0, False, "gelu", layers_kept=(0, 3), teacher_layers=3)
