"""Figures equal what brute force and the textbook say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ffn2moe import metrics
from ffn2moe.sentence import SentenceModules
from ffn2moe.spec import FFNShape
from tests.mixtures import flat_spec

SPEC = flat_spec(
    family="bert",
    model_class="BertModel",
    width=384,
    ffn_width=1536,
    num_layers=6,
    num_experts=8,
    expert_width=192,
    num_active=2,
    gated=False,
    activation="gelu",
    partition="contiguous",
    teacher="tiny",
    sentence=SentenceModules(),
    max_length=128,
)


class Config:
    num_attention_heads = 12


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


@settings(deadline=None)
@given(st.integers(1, 25), st.integers(0, 10**6))
def test_retrieval_equals_brute_force(count, seed):
    query, document = unit(count, 4, seed=seed), unit(count, 4, seed=seed + 1)
    ndcg = mrr = 0.0
    for i in range(count):
        scores = [float(query[i] @ document[j]) for j in range(count)]
        rank = sorted(range(count), key=lambda j: -scores[j]).index(i) + 1
        ndcg += 1 / math.log2(1 + rank) if rank <= 10 else 0.0
        mrr += 1 / rank
    found = metrics.retrieval(query, document)
    assert found["ndcg_at_10"] == pytest.approx(ndcg / count)
    assert found["mrr"] == pytest.approx(mrr / count)


def test_retrieval_golden_values():
    """Ranks 1, 2 and 11 of 11 documents: (1 + 1/log2(3) + 0) / 3 and (1 + 1/2 + 1/11) / 3."""
    ranks = torch.tensor([1, 2, 11])
    assert metrics.ndcg_at_10(ranks).mean().item() == pytest.approx(0.5436432511904858)
    assert metrics.reciprocal_rank(ranks).mean().item() == pytest.approx(0.5303030303030303)


def test_a_model_that_embeds_everything_alike_finds_nothing():
    same = torch.ones(20, 3)
    assert metrics.retrieval(same, same) == {"ndcg_at_10": 0.0, "mrr": pytest.approx(1 / 20)}


def test_perfect_retrieval_is_one():
    assert metrics.retrieval(torch.eye(12), torch.eye(12)) == {"ndcg_at_10": 1.0, "mrr": 1.0}


def test_retrieval_refuses_what_is_not_paired_or_not_finite():
    with pytest.raises(ValueError, match="in pairs"):
        metrics.retrieval(torch.eye(3), torch.eye(4))
    with pytest.raises(ValueError, match="NaN"):
        metrics.retrieval(torch.full((3, 2), torch.nan), torch.ones(3, 2))


def test_spearman_golden_values_with_ties():
    """Ranks 1, 2.5, 2.5, 4 against 1..4: Pearson of the ranks is 4.5 / sqrt(4.5 * 5)."""
    found = metrics.spearman(torch.tensor([0.1, 0.5, 0.5, 0.9]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert found == pytest.approx(100 * 4.5 / math.sqrt(4.5 * 5))
    with pytest.raises(ValueError, match="constant"):
        metrics.spearman(torch.ones(4), torch.arange(4.0))


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=20)
def test_spearman_sees_order_only(seed):
    first, second = unit(30, 1, seed=seed).flatten(), torch.rand(30)
    assert metrics.spearman(first, second) == pytest.approx(metrics.spearman(first.exp() * 3 + 1, second))


def test_the_probe_learns_separable_labels_and_is_repeatable():
    train, dev = unit(80, 6), unit(40, 6, seed=1)
    labels = [["no", "yes"][int(x[0] > 0)] for x in train]
    wanted = [["no", "yes"][int(x[0] > 0)] for x in dev]
    right = metrics.probe(train, labels, dev, wanted, seed=0)
    assert right.dtype == torch.bool and right.double().mean() > 0.85
    assert torch.equal(right, metrics.probe(train, labels, dev, wanted, seed=0))
    with pytest.raises(ValueError, match="two labels"):
        metrics.probe(train, ["yes"] * 80, dev, wanted, seed=0)


def test_embedding_cosine_is_one_of_a_model_with_itself():
    a = unit(10, 5)
    assert metrics.embedding_cosine(a, a) == pytest.approx(1)
    assert metrics.embedding_cosine(a, -a) == pytest.approx(-1)


def test_the_agreement_on_general_sentences_tells_a_right_student_from_a_constant_one():
    near = torch.nn.functional.normalize(unit(60, 16) + 3 * torch.ones(16), dim=-1)  # all near each other, as in E5
    noisy = torch.nn.functional.normalize(near + 0.05 * unit(60, 16, seed=1), dim=-1)
    constant = near.mean(0).expand(60, 16)
    right, worse, none = (metrics.general_agreement(student, near) for student in (near, noisy, constant))
    assert right == pytest.approx({"rank_correlation": 1, "cosine": 1, "cosine_low": 1})
    assert none["rank_correlation"] == 0, "though its cosines are high"
    assert none["cosine"] > 0.95 and 0 < worse["rank_correlation"] < 0.98
    assert worse["cosine_low"] < worse["cosine"]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert abs(metrics.general_agreement(near[order], near)["rank_correlation"]) < 0.2, (
        "the right vectors, of other texts"
    )


def test_the_interval_of_a_ratio_holds_the_ratio_and_is_repeatable():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.rand(500, generator=generator)
    student = teacher * 0.9 + 0.05 * torch.rand(500, generator=generator)
    ratio = (student.mean() / teacher.mean()).item()
    interval = metrics.mean_ratio_interval(student, teacher)
    assert interval.low < ratio < interval.high
    assert interval == metrics.mean_ratio_interval(student, teacher)


def test_the_interval_is_paired_so_that_what_is_hard_for_both_cancels():
    teacher = torch.rand(200, generator=torch.Generator().manual_seed(0))
    interval = metrics.mean_ratio_interval(0.9 * teacher, teacher)
    assert interval.low == pytest.approx(0.9) and interval.high == pytest.approx(0.9)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    covered = 0
    for seed in range(100):
        draws = np.random.default_rng(seed)
        teacher = torch.from_numpy(draws.uniform(0.5, 1.5, 100))
        student = 0.8 * teacher + torch.from_numpy(draws.normal(0, 0.2, 100))
        interval = metrics.mean_ratio_interval(student, teacher, rounds=200, seed=seed)
        covered += interval.low <= 0.8 <= interval.high
    assert 88 <= covered <= 100


def test_the_interval_of_rank_correlations_agrees_with_scipy():
    from scipy import stats

    first, second, target = torch.rand(50), torch.rand(50).round(decimals=1), torch.rand(50).round(decimals=1)
    ratios = []
    generator = np.random.default_rng(3)
    for _ in range(50):
        index = generator.integers(0, 50, 50)
        rho = [stats.spearmanr(side[index], target[index]).statistic for side in (first, second)]
        ratios.append(rho[0] / rho[1])
    expected = np.percentile(ratios, [2.5, 97.5])
    found = metrics.spearman_ratio_interval(first, second, target, rounds=50, seed=3)
    assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_load_of_experts():
    load = metrics.load(torch.tensor([[0, 1], [0, 1], [0, 2], [0, 1]]), 4)
    assert load.share_E == [0.5, 0.375, 0.125, 0.0]
    assert load.max_over_mean == 2.0
    assert load.dead_experts == 1


def test_flops_of_minilm_by_hand():
    """Per layer and token: projections 8 D^2, attention 4 L D, FFN 4 D F, of which a quarter is active."""
    D, F, L = 384, 1536, 128
    teacher, student = metrics.flops_per_token(SPEC, Config(), L)
    assert teacher.total == 6 * (8 * D * D + 4 * L * D + 4 * D * F)
    assert student.total == 6 * (8 * D * D + 4 * L * D + D * F + 2 * D * 8)


def test_flops_equal_what_torch_counts(tiny_teacher):
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import BertModel

    model = BertModel.from_pretrained(tiny_teacher, add_pooling_layer=False, attn_implementation="eager").eval()
    length = 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(1, length, dtype=torch.long))
    spec = flat_spec(num_experts=8, width=32, ffn_width=64, num_layers=2, expert_width=8)
    teacher, _ = metrics.flops_per_token(spec, model.config, length)
    assert teacher.total * length == counter.get_total_flops()


# No subnormal numbers: ONNX Runtime sessions of other tests set the process to take them as zero.
@given(st.floats(0.01, 1), st.floats(0, 1e6, allow_subnormal=False), st.floats(1, 1e6))
def test_the_amdahl_bound_is_between_one_and_its_two_limits(active, attention, ffn):
    bound = metrics.amdahl_bound(metrics.Flops(attention, ffn), metrics.Flops(attention, active * ffn, router=7))
    assert 1 - 1e-9 <= bound <= 1 / active + 1e-9


def test_the_amdahl_bound_golden_value():
    """FFN 65 % of the work: a quarter of it active gives at most 1.95, half of it 1.48."""
    assert metrics.amdahl_bound(metrics.Flops(3500, 6500), metrics.Flops(3500, 1625)) == pytest.approx(1.951, abs=1e-3)
    assert metrics.amdahl_bound(metrics.Flops(3500, 6500), metrics.Flops(3500, 3250)) == pytest.approx(1.481, abs=1e-3)


def test_the_bound_of_fewer_layers_is_their_number_without_a_vocabulary():
    shape = FFNShape("encoder.layer", 4, 24, 96, 96, 0, False, "gelu", layers_kept=(0, 2, 3, 5), teacher_layers=6)
    spec = replace(SPEC, stacks=(shape,), num_experts=1, num_active=1)
    teacher, student = metrics.flops_per_token(spec, Config(), 16)
    assert student.router == 0 and metrics.amdahl_bound(teacher, student) == pytest.approx(1.5)


def test_perplexity_is_that_of_a_uniform_guess_and_its_interval_holds_it():
    logits_TV, target_T = torch.zeros(60, 7), torch.arange(60) % 7
    nats_T = metrics.nats(logits_TV, target_T)
    assert metrics.perplexity(nats_T.view(6, 10).sum(1), torch.full((6,), 10)) == pytest.approx(7)
    generator = torch.Generator().manual_seed(0)
    nats_N, tokens_N = torch.rand(50, generator=generator) * 20, torch.randint(5, 15, (50,), generator=generator)
    interval = metrics.perplexity_interval(nats_N, tokens_N)
    assert interval.low < metrics.perplexity(nats_N, tokens_N) < interval.high


def test_what_is_kept_of_a_perplexity_is_teacher_over_student_on_the_same_texts():
    generator = torch.Generator().manual_seed(0)
    teacher_N, tokens_N = torch.rand(50, generator=generator) * 20, torch.full((50,), 10)
    student_N = teacher_N + tokens_N * 0.1  # a tenth of a nat worse everywhere: exp(-0.1), without any spread
    interval = metrics.perplexity_ratio_interval(teacher_N, student_N, tokens_N)
    assert interval.low == pytest.approx(math.exp(-0.1)) == interval.high


def test_divergence_is_zero_for_the_same_distribution_and_positive_for_another():
    logits_TV = torch.randn(20, 9, generator=torch.Generator().manual_seed(0))
    assert metrics.divergence(logits_TV, logits_TV + 3).abs().max() < 1e-12
    other_TV = logits_TV.flip(-1)
    expected = torch.nn.functional.kl_div(
        other_TV.double().log_softmax(-1), logits_TV.double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    assert torch.allclose(metrics.divergence(logits_TV, other_TV), expected) and (expected > 0).all()
