"""The fast forward and backward pass of the mixtures is the slow one, and the benchmarks of training measure it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import benchmarks.ablation.methods  # noqa: F401 - registers selections whose number of experts varies
from benchmarks import gpu, memory, partition, training
from benchmarks.race import Spread, race
from ffn2moe.choices import GATES
from ffn2moe.moe import fit, grouped
from ffn2moe.moe.choice import Choice
from ffn2moe.moe.grouped import LEAST_TILE, TILE, Layout, tile_of
from ffn2moe.moe.layer import MoEFFN
from tests.mixtures import flat_spec
from tests.texts import make_texts

D, E, M = 16, 4, 8
WAYS = [(selection, gate) for selection in ("topk", "threshold") for gate in GATES.names()] + [("prefix", "unit")]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_moe(*, gated: bool = False, shared: int = 0, **changes: object) -> MoEFFN:
    """A layer with random weights and a random router."""
    values = {"width": D, "ffn_width": E * M + shared, "expert_width": M, "shared_width": shared, "gated": gated}
    spec = flat_spec(num_experts=E, activation="silu" if gated else "gelu", **values, **changes)
    moe = MoEFFN(spec, b_in=True, b_out=True, b_gate=gated)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(moe.named_parameters()):
            if parameter.dim():
                parameter.copy_(normal(*parameter.shape, seed=seed) * (1.0 if "router" in name else 0.3))
        moe.set_scale(1.3)
        fit.calibrate(moe, normal(200, D, seed=99))
    return moe


def gradients(moe: MoEFFN, way: str, x_TD: Tensor) -> dict[str, Tensor]:
    """Output of one way to compute the layer, and the gradients of a sum of it, by name; none where there is none."""
    moe.zero_grad()
    x_TD = x_TD.clone().requires_grad_(True)
    y_TD = moe(x_TD) if way == "grouped" else moe.reference(x_TD)
    (y_TD.float() * normal(*y_TD.shape, seed=7)).sum().backward()
    told = {name: p.grad.clone() for name, p in moe.named_parameters() if p.grad is not None}
    assert x_TD.grad is not None
    return told | {"y": y_TD.detach(), "x": x_TD.grad}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("gated", "shared"), [(False, 0), (True, 6)])
@pytest.mark.parametrize(("selection", "gate"), WAYS)
def test_every_gradient_of_the_grouped_layer_is_that_of_the_reference(selection, gate, gated, shared, training):
    moe = make_moe(gated=gated, shared=shared, selection=selection, gate=gate).train(training)
    x_TD = normal(70, D, seed=5)
    found, wanted = (gradients(moe, way, x_TD) for way in ("grouped", "reference"))
    for name in wanted:
        if training and name.startswith("router"):
            continue  # in training constant gates pass a gradient straight through, and the reference has none
        if training and name == "x" and "router.weight" in found:
            continue  # of which a part comes back to x
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_gates_that_differ_pass_their_gradient_to_the_router_in_training_too():
    moe = make_moe(gate="softmax").train()
    found, wanted = (gradients(moe, way, normal(70, D, seed=5)) for way in ("grouped", "reference"))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_an_expert_that_no_token_uses_has_a_gradient_of_zero(training):
    moe = make_moe().train(training)
    with torch.no_grad():
        moe.router.bias[2] = -1e6
    found = gradients(moe, "grouped", normal(30, D))
    assert not found["w_in"][2].any() and not found["w_out"][2].any() and not found["b_in"][2].any()
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert found["w_in"][0].any()


@pytest.mark.parametrize("training", [False, True])
def test_no_tokens_give_no_output_and_no_error(training):
    moe = make_moe().train(training)
    y_TD = moe(torch.zeros(0, D))
    y_TD.sum().backward()
    assert y_TD.shape == (0, D) and not moe.w_in.grad.any()


def test_the_steps_of_a_layout_have_the_gradients_of_finite_differences():
    experts_TK = torch.tensor([[0, 2], [2, 0], [2, 3]])
    used_TK = torch.tensor([[True, True], [True, False], [False, False]])
    for choice in (Choice(experts_TK, None), Choice(experts_TK, used_TK)):
        layout = Layout.of(choice, E, tile=2)
        x_TD, weight, bias = (normal(*s).double().requires_grad_(True) for s in ((3, 5), (E, 4, 5), (E, 4)))
        # Padding slots name token 0, too, and are read by nobody.
        assert torch.autograd.gradcheck(lambda x, at=layout: at.gather(x)[at.slot_P], (x_TD,))
        x_SD = layout.gather(x_TD).detach().requires_grad_(True)
        assert torch.autograd.gradcheck(layout.linear, (x_SD, weight, bias))
        assert torch.autograd.gradcheck(layout.add_up, (x_SD,))


def test_padding_is_read_by_nobody_and_gives_no_gradient():
    layout = Layout.of(Choice(torch.tensor([[1], [1], [3]]), None), E, tile=4)
    assert layout.widths == [0, 4, 0, 4] and layout.counts == [0, 2, 0, 1]
    y_SD = normal(8, D).requires_grad_(True)
    layout.add_up(y_SD).sum().backward()
    used_S = torch.zeros(8, dtype=torch.bool)
    used_S[layout.slot_P] = True
    assert (y_SD.grad[used_S] == 1).all() and not y_SD.grad[~used_S].any()
    assert not layout.spread(torch.ones(3))[~used_S].any()


def test_bfloat16_under_autocast_is_near_float32_and_the_same_every_time():
    moe = make_moe().train()
    exact = gradients(moe, "grouped", normal(300, D, seed=5))

    def half() -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(moe, "grouped", normal(300, D, seed=5))

    once, again = half(), half()
    for name, tensor in once.items():
        assert torch.equal(tensor, again[name]), name
        assert (tensor.float() - exact[name]).norm() <= 0.03 * exact[name].norm() + 1e-6, name
    assert once["w_in"].dtype == torch.float32


@pytest.mark.parametrize("gated", [False, True])
def test_runs_of_one_length_in_a_batch_give_what_one_product_an_expert_gives(monkeypatch, gated):
    moe = make_moe(gated=gated, gate="softmax").bfloat16().train()
    found, widths = [], []
    of = Layout.of

    def watched(*arguments: object) -> Layout:
        layout = of(*arguments)
        widths.append(layout.widths)
        return layout

    monkeypatch.setattr(Layout, "of", watched)
    for overhead in (0.0, 1e6):
        monkeypatch.setattr(grouped, "OVERHEAD", overhead)
        found.append(gradients(moe, "grouped", normal(60, D, seed=5).bfloat16()))
    assert len(set(widths[0])) > 1 and set(widths[1]) == {max(widths[0])}
    for name, wanted in found[0].items():
        assert (found[1][name] - wanted).norm() <= 0.02 * wanted.norm(), name


def test_runs_are_made_equally_long_where_that_adds_little():
    choice = Choice(torch.tensor([[0], [0], [0], [1]]), None)
    assert Layout.of(choice, 2).widths == [3, 1]
    assert Layout.of(choice, 2, 1, 1).widths == [3, 1]
    assert Layout.of(choice, 2, 1, 2).widths == [3, 3]
    assert Layout.of(choice, 2, 1, 2).slot_P.tolist() == [0, 1, 2, 3]
    assert Layout.of(choice, 2, 4, 8).widths == [4, 4]


def test_grouped_products_of_an_accelerator_give_what_one_product_an_expert_gives(monkeypatch):
    moe = make_moe(gated=True, gate="softmax").bfloat16().train()
    found = []
    for hardware in (False, True):  # torch computes the grouped product on a CPU as well, slowly
        monkeypatch.setattr(grouped, "_grouped_in_hardware", lambda *_, answer=hardware: answer)
        found.append(gradients(moe, "grouped", normal(60, D, seed=5).bfloat16()))
    for name, tensor in found[0].items():
        assert (found[1][name].float() - tensor.float()).norm() <= 0.02 * tensor.float().norm(), name


def test_runs_are_rounded_up_by_little_where_they_are_short():
    assert tile_of(8192, 8) == TILE and tile_of(8, 8) == LEAST_TILE
    assert all(tile_of(pairs, 8) * 8 * 4 <= pairs for pairs in (512, 1000, 4096, 10**6))


# --- benchmarks -----------------------------------------------------------------------------------------------------


def test_ratios_are_taken_within_rounds():
    assert Spread.between([2.0, 40.0, 3.0], [1.0, 10.0, 1.0]) == Spread(3.0, 2.5, 3.5)
    assert Spread.between([6.0], [2.0]) == Spread(3.0, 3.0, 3.0)
    calls: list[str] = []
    works = {name: lambda _, name=name: {"order": calls.append(name) or len(calls)} for name in "ab"}
    found = race(works, rounds=3, fewest=1, warm_up=1)["order"]
    assert {"".join(calls[start : start + 2]) for start in range(0, 8, 2)} <= {"ab", "ba"} and len(calls) == 8
    assert all(figure > 2 for figures in found.seconds.values() for figure in figures)  # the warm-up does not count
    with pytest.raises(ValueError, match="at least one round"):
        Spread.between([], [])
    with pytest.raises(ValueError, match="0 rounds time nothing"):
        race(works, rounds=0, fewest=1)


def write_texts(path: Path) -> Path:
    path.write_text("\n".join(text.replace("\n", " ") for text in make_texts(120)))
    return path


def test_a_step_of_distillation_is_timed_beside_the_dense_models(tiny_teacher: Path, tmp_path: Path, capsys):
    arguments = f"--model {tiny_teacher} --experts 4 --tokens 128 --rounds 2 --threads 1 --ffn-tokens 40"
    texts, out = write_texts(tmp_path / "texts.txt"), tmp_path / "training.md"
    code = training.main([*arguments.split(), "--texts", str(texts), "--out", str(out), "--dtype", "bf16"])
    told = json.loads(out.with_suffix(".json").read_text())
    assert code == (told["step"]["ratio"]["median"] > training.LIMIT)
    for name in ("dense", "mixture"):
        parts = [told["step"][name][part] for part in training.PARTS]
        assert min(parts) > 0
    assert told["ffn"][0]["tokens"] == 40 and told["ffn"][0]["ratio"]["median"] > 0
    assert "| mixture / dense |" in out.read_text() and "python -m benchmarks.training" in out.read_text()


def test_a_model_that_cannot_be_distilled_so_is_refused(tmp_path: Path, capsys):
    assert training.main(["--model", str(tmp_path / "nothing"), "--threads", "1"]) == 2
    assert "error:" in capsys.readouterr().err


def test_the_benchmark_of_gpus_says_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "_there", lambda device: False)
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_benchmark_of_gpus_can_be_tried_on_a_cpu(dtype: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(gpu, "SHORTEST_SAMPLE", 0.0)
    out = tmp_path / "gpu.md"
    arguments = f"--device cpu --dtype {dtype} --shapes 16x64 16x64g --tokens 1 20 --rounds 1 --out {out}"
    assert gpu.main(arguments.split()) == 0
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [(row["shape"], row["tokens"], row["pass"]) for row in rows[:2]] == [
        ("16 x 64", 1, "forward"),
        ("16 x 64", 1, "forward + backward"),
    ]
    assert all({"dense", "loop", "grouped"} <= set(row["milliseconds"]) and not row["wrong"] for row in rows)


def test_a_way_that_is_wrong_is_told_and_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "SHORTEST_SAMPLE", 0.0)
    monkeypatch.setattr(gpu, "loop", lambda moe, x_TD: 2 * moe.reference(x_TD))
    assert (
        gpu.main(["--device", "cpu", "--dtype", "float32", "--shapes", "16x64", "--tokens", "9", "--rounds", "1"]) == 1
    )
    told = capsys.readouterr().out
    assert "wrong, so not timed: 16 x 64 9 loop" in told and "  loop  " not in told


def test_the_memory_of_a_plan_is_that_of_a_process_of_its_own(exported: Path, tmp_path: Path):
    texts, out = write_texts(tmp_path / "texts.txt"), tmp_path / "memory.md"
    arguments = ["--texts", str(texts), "--shapes", "1x8", "2x16", "--plans", "dense", "--out", str(out)]
    assert memory.main([str(exported / "models/exported"), *arguments]) == 0
    told = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [row["plan"] for row in told] == ["dense", "dense8"]
    for row in told:
        assert 0 < row["imported_bytes"] < row["opened_bytes"] <= row["peak_bytes"][0] <= row["peak_bytes"][1]
        assert row["file_bytes"] > 0
    assert "| dense8 |" in out.read_text()
    assert memory.main([str(exported / "models/exported"), "--texts", str(texts), "--plans", "none"]) == 2


def test_a_layer_is_calibrated_step_by_step(tmp_path: Path):
    out = tmp_path / "calibration.md"
    arguments = f"--calibrate --shape 16 64 --tokens 300 --rounds 1 --threads 1 --out {out}"
    assert partition.main(arguments.split()) == 0
    page = out.read_text()
    assert all(f"| {step} | " in page for step in partition.STEPS)
