"""Compute quality, agreement, load, FLOPs and the Amdahl bound.

Letters as in `ffn2moe.spec`, and in addition N texts or pairs and R rounds of resampling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn2moe.choices import HEADS, PROBLEMS, ROUTINGS
from ffn2moe.moe.layer import moe_layers
from ffn2moe.sentence import SentenceModules
from ffn2moe.spec import FFNShape, MoESpec
from ffn2moe.table import Table

ALIKE = 1e-6  # similarities that differ by less differ by rounding alone


def embedding_cosine(first_ND: Tensor, second_ND: Tensor) -> float:
    """Return the mean cosine between two models' embeddings of the same texts, between -1 and 1."""
    return F.cosine_similarity(first_ND.double(), second_ND.double(), dim=-1).mean().item()


def general_agreement(student_ND: Tensor, teacher_ND: Tensor) -> dict[str, float]:
    """Return how near a student's embeddings are to the teacher's on the same texts: three figures, 1 at best.

    `rank_correlation` is Spearman's of the similarities of all pairs of texts, as in representational similarity
    analysis (Kriegeskorte et al. 2008): whether both models order pairs alike, which is what search and similarity use.
    It is 0 for a student that embeds all texts alike. `cosine` is the mean over the texts, `cosine_low` its 5 %
    quantile. A cosine alone cannot tell such a student where the teacher's own embeddings are all near each other.
    """
    pair = torch.triu_indices(len(teacher_ND), len(teacher_ND), 1)
    student_P, teacher_P = ((side.double() @ side.double().T)[pair[0], pair[1]] for side in (student_ND, teacher_ND))
    cosine_N = F.cosine_similarity(student_ND.double(), teacher_ND.double(), dim=-1)
    alike = (student_P.max() - student_P.min()).item() < ALIKE
    return {
        "rank_correlation": 0.0 if alike else spearman(student_P, teacher_P) / 100,
        "cosine": cosine_N.mean().item(),
        "cosine_low": cosine_N.quantile(0.05).item(),
    }


def comparable(embeddings_ND: Tensor, sentence: SentenceModules | None) -> Tensor:
    """Return embeddings whose inner products compare texts as the model's authors do: by cosines, or as they are.

    They stay as they are where the authors take inner products, and where all have unit length.
    """
    if sentence is None or sentence.unit or sentence.similarity == "dot":
        return embeddings_ND
    return F.normalize(embeddings_ND, dim=-1)


# --- quality ------------------------------------------------------------------------------------------


def retrieval_ranks(query_ND: Tensor, document_ND: Tensor) -> Tensor:
    """Return the rank (1 is best) of document i among all documents for query i, by inner product, [N] int64.

    A tie counts against the query: a model that embeds all texts alike finds nothing. ValueError where queries and
    documents are not pairs, or an embedding is not finite.
    """
    if query_ND.shape != document_ND.shape:
        raise ValueError(f"queries {tuple(query_ND.shape)} and documents {tuple(document_ND.shape)} must come in pairs")
    score_NN = query_ND @ document_ND.T
    if not torch.isfinite(score_NN).all():
        raise ValueError("an embedding holds NaN or infinite values: the model that made it is damaged")
    return (score_NN >= score_NN.diagonal().unsqueeze(1)).sum(1)


def nearest(query_ND: Tensor, document_ND: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` documents nearest to each query, best first, [N, count]."""
    return (query_ND @ document_ND.T).topk(min(count, len(document_ND)), dim=1).indices


def ndcg_at_10(ranks_N: Tensor) -> Tensor:
    """Return nDCG@10 of each query that has one right answer, [N] float64: ``1 / log2(1 + rank)``, 0 below rank 10.

    The ideal gain is 1, as there is one right answer (Järvelin and Kekäläinen 2002).
    """
    ranks_N = ranks_N.double()
    return torch.where(ranks_N <= 10, 1 / torch.log2(1 + ranks_N), 0.0)


def reciprocal_rank(ranks_N: Tensor) -> Tensor:
    """Return the reciprocal rank of each query, [N] float64; its mean is the MRR."""
    return 1 / ranks_N.double()


def retrieval(query_ND: Tensor, document_ND: Tensor) -> dict[str, float]:
    """Return nDCG@10 and MRR, between 0 and 1; the one right answer to query i is document i."""
    ranks_N = retrieval_ranks(query_ND, document_ND)
    return {
        "ndcg_at_10": ndcg_at_10(ranks_N).mean().item(),
        "mrr": reciprocal_rank(ranks_N).mean().item(),
    }


def spearman(predicted_N: Tensor, target_N: Tensor) -> float:
    """Return Spearman's rank correlation x 100, ties at their mean rank. ValueError where one side is constant."""
    from scipy import stats

    predicted, target = predicted_N.double().numpy(), target_N.double().numpy()
    if np.ptp(predicted) == 0 or np.ptp(target) == 0:
        raise ValueError("the rank correlation of a constant is undefined: all scores are equal")
    return 100 * float(stats.spearmanr(predicted, target).statistic)


def similarity(first_ND: Tensor, second_ND: Tensor) -> Tensor:
    """Return the inner product of each pair of embeddings, [N]: the cosine, as they have unit length."""
    return (first_ND * second_ND).sum(1)


def probe(train_ND: Tensor, train_labels: list[str], dev_ND: Tensor, dev_labels: list[str], *, seed: int) -> Tensor:
    """Return which dev texts a logistic regression on the embeddings of the train texts gets right, [N] bool.

    This is the probe of SentEval (Conneau and Kiela 2018): L2-regularised with C = 1, on embeddings as they are (unit
    length, not standardised). Nothing is tuned, so that every model is judged alike. ValueError for fewer than two
    labels.
    """
    from sklearn.linear_model import LogisticRegression

    if len(set(train_labels)) < 2:
        raise ValueError("a classifier needs examples of at least two labels; the train set has one")
    classifier = LogisticRegression(C=1.0, max_iter=1000, random_state=seed)
    classifier.fit(train_ND.double().numpy(), train_labels)
    return torch.from_numpy(classifier.predict(dev_ND.double().numpy()) == np.array(dev_labels))


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float


def ratio_interval(
    statistic: Callable[[np.ndarray], tuple[float, float]], size: int, *, rounds: int = 1000, seed: int = 0
) -> Interval:
    """Return the percentile bootstrap of the ratio of two figures on one set of `size` examples (Efron 1979).

    `statistic` takes the indices of a resample, [size], and returns (numerator, denominator). Both are computed on the
    same resample, so that examples which are hard for both models cancel (a paired bootstrap).
    """
    generator = np.random.default_rng(seed)
    ratios_R = []
    for _ in range(rounds):
        numerator, denominator = statistic(generator.integers(0, size, size))
        if denominator != 0:
            ratios_R.append(numerator / denominator)
    if not ratios_R:
        return Interval(0.0, 0.0)
    low, high = np.percentile(ratios_R, [2.5, 97.5])
    return Interval(float(low), float(high))


def mean_ratio_interval(numerator_N: Tensor, denominator_N: Tensor, *, rounds: int = 1000, seed: int = 0) -> Interval:
    """Return `ratio_interval` for two means over the same examples, such as nDCG@10 of student and teacher."""
    numerator, denominator = numerator_N.double().numpy(), denominator_N.double().numpy()
    return ratio_interval(
        lambda index: (numerator[index].mean(), denominator[index].mean()),
        len(numerator),
        rounds=rounds,
        seed=seed,
    )


def spearman_ratio_interval(
    first_N: Tensor, second_N: Tensor, target_N: Tensor, *, rounds: int = 1000, seed: int = 0
) -> Interval:
    """Return `ratio_interval` for two rank correlations with the same target."""
    from scipy import stats

    first, second, target = (side.double().numpy() for side in (first_N, second_N, target_N))

    def both(index: np.ndarray) -> tuple[float, float]:
        ranks = [stats.rankdata(side[index]) for side in (first, second, target)]
        correlation = np.corrcoef(ranks)
        return float(correlation[0, 2]), float(correlation[1, 2])

    return ratio_interval(both, len(target), rounds=rounds, seed=seed)


# --- distributions over tokens or classes ---------------------------------------------------------------


def nats(logits_TV: Tensor, target_T: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target, [T] float64, in nats."""
    return -logits_TV.double().log_softmax(-1).gather(-1, target_T.unsqueeze(-1)).squeeze(-1)


def divergence(teacher_TV: Tensor, student_TV: Tensor) -> Tensor:
    """Return ``KL(teacher || student)`` at each position, [T] float64, in nats, from logits."""
    teacher, student = teacher_TV.double().log_softmax(-1), student_TV.double().log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1)


def perplexity(nats_N: Tensor, tokens_N: Tensor) -> float:
    """Return ``exp`` of the mean nats over all tokens, from the sum of nats and the number of tokens of each text."""
    return float(np.exp((nats_N.double().sum() / tokens_N.sum()).item()))


def perplexity_interval(nats_N: Tensor, tokens_N: Tensor, *, rounds: int = 1000, seed: int = 0) -> Interval:
    """Return the 95 % interval of `perplexity`, by a bootstrap over texts: tokens of one text are not independent."""
    mean = mean_ratio_interval(nats_N, tokens_N, rounds=rounds, seed=seed)
    return Interval(float(np.exp(mean.low)), float(np.exp(mean.high)))


def perplexity_ratio_interval(
    teacher_nats_N: Tensor, student_nats_N: Tensor, tokens_N: Tensor, *, rounds: int = 1000, seed: int = 0
) -> Interval:
    """Return the 95 % interval of the teacher's perplexity over the student's: 1 where nothing is lost."""
    return perplexity_interval(teacher_nats_N - student_nats_N, tokens_N, rounds=rounds, seed=seed)


# --- classifiers --------------------------------------------------------------------------------------

KEPT = "concordance"  # the figure of `fidelity` that says how much of a teacher's scores a student keeps


def fidelity(problem: str, teacher_NC: Tensor, student_NC: Tensor) -> dict[str, float]:
    """Return how near a student's logits are to the teacher's, for texts or tokens, as the classifier's problem asks.

    Every problem has `concordance`, which is 1 for equal scores and 0 for a student that gives every text the same
    (`concordance`). Agreement alone cannot tell such a student where most texts have one label.

    - single_label: `agreement` of the most probable label, `kappa`, and `divergence` in nats;
    - multi_label: `agreement` of the decisions at 0.5, over all labels, and the mean `difference` of the probabilities;
    - regression, one_label: `correlation` (Pearson) and `rank_correlation` (Spearman), the mean over the labels, and
      the `relative_error`: the root of the mean squared error over the teacher's standard deviation.

    A figure is left out where the teacher gives every text the same, so that it is not defined.
    """
    teacher_NC, student_NC = teacher_NC.double(), student_NC.double()
    found = {KEPT: concordance(*_compared(problem, teacher_NC, student_NC))}
    return found | _FIDELITIES[problem](teacher_NC, student_NC)


def concordance(teacher_NC: Tensor, student_NC: Tensor) -> float:
    """Return Lin's concordance correlation of two models' scores, pooled over the labels, between -1 and 1.

    It is ``2 cov / (var + var + (difference of means)^2)``, each summed over the labels (Lin 1989, Biometrics 45): the
    continuous form of Cohen's kappa. Unlike a correlation it also falls where the student's scale or offset is another.
    """
    return _concordance(_moments(teacher_NC, student_NC).sum(0).numpy())


def concordance_interval(
    problem: str,
    teacher_NC: Tensor,
    student_NC: Tensor,
    *,
    text_N: Tensor | None = None,
    rounds: int = 1000,
    seed: int = 0,
) -> Interval:
    """Return the 95 % interval of a `fidelity`'s concordance, by a bootstrap over texts.

    `text_N` is the text of each row where rows are tokens: those of one text are not independent.
    """
    moments = _moments(*_compared(problem, teacher_NC.double(), student_NC.double()))
    if text_N is not None:
        moments = torch.zeros(int(text_N.max()) + 1, *moments.shape[1:], dtype=moments.dtype).index_add_(
            0, text_N, moments
        )
    each = moments.numpy()
    return ratio_interval(lambda index: (_concordance(each[index].sum(0)), 1.0), len(each), rounds=rounds, seed=seed)


def kappa(teacher_N: Tensor, student_N: Tensor) -> float | None:
    """Return Cohen's kappa of two models' decisions; None where the teacher decides all alike (Cohen 1960)."""
    if len(teacher_N.unique()) < 2:
        return None
    beyond, possible = _beyond_chance(*_numbered(teacher_N, student_N))(np.ones(len(teacher_N)))
    return beyond / possible


def kappa_interval(
    teacher_N: Tensor, student_N: Tensor, *, text_N: Tensor, rounds: int = 1000, seed: int = 0
) -> Interval:
    """Return the 95 % interval of `kappa`, by a bootstrap over texts; `text_N` is the text of each decision."""
    text, beyond_chance = text_N.numpy(), _beyond_chance(*_numbered(teacher_N, student_N))
    texts = int(text.max()) + 1
    return ratio_interval(
        lambda index: beyond_chance(np.bincount(index, minlength=texts)[text]), texts, rounds=rounds, seed=seed
    )


def _numbered(teacher_N: Tensor, student_N: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the decisions numbered from 0: of a large vocabulary few tokens occur."""
    number_N = torch.cat([teacher_N, student_N]).unique(return_inverse=True)[1].numpy()
    return number_N[: len(teacher_N)], number_N[len(teacher_N) :]


def _beyond_chance(teacher_N: np.ndarray, student_N: np.ndarray) -> Callable[[np.ndarray], tuple[float, float]]:
    """Return a function of weights [N]: the agreement above chance, and the most that it can be."""
    known = int(max(teacher_N.max(), student_N.max())) + 1
    agreed_N = teacher_N == student_N

    def shares(weight_N: np.ndarray) -> tuple[float, float]:
        total = weight_N.sum()
        first, second = (np.bincount(side, weight_N, known) / total for side in (teacher_N, student_N))
        chance = float(first @ second)
        return float(weight_N @ agreed_N / total) - chance, 1 - chance

    return shares


def _compared(problem: str, teacher_NC: Tensor, student_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores that a concordance compares: probabilities of labels, or values in the teacher's spread.

    A reranker's logits are compared, not the scores between 0 and 1: there most of its order is lost to rounding.
    """
    if problem in ("single_label", "multi_label"):
        scores = PROBLEMS[problem].scores
        return torch.from_numpy(scores(teacher_NC.numpy())), torch.from_numpy(scores(student_NC.numpy()))
    spread_C = teacher_NC.std(0, correction=0).clamp(min=1e-12)
    return teacher_NC / spread_C, student_NC / spread_C


def _moments(teacher_NC: Tensor, student_NC: Tensor) -> Tensor:
    """Return for each row what a concordance is summed from, [N, 6, C]: 1 and the first and second powers."""
    teacher, student = teacher_NC.double(), student_NC.double()
    centre_C = teacher.mean(0)  # so that little is lost to rounding
    teacher, student = teacher - centre_C, student - centre_C
    ones = torch.ones_like(teacher)
    return torch.stack([ones, teacher, student, teacher**2, student**2, teacher * student], 1)


def _concordance(sums_6C: np.ndarray) -> float:
    count_C, teacher, student, teacher2, student2, product = sums_6C
    first, second = teacher / count_C, student / count_C
    covariance = (product / count_C - first * second).sum()
    whole = (teacher2 / count_C - first**2 + student2 / count_C - second**2 + (first - second) ** 2).sum()
    return float(2 * covariance / whole) if whole > 0 else 1.0  # 0: all scores are one number


def _of_choices(teacher_NC: Tensor, student_NC: Tensor) -> dict[str, float]:
    first_N, second_N = teacher_NC.argmax(-1), student_NC.argmax(-1)
    found = {
        "agreement": (first_N == second_N).double().mean().item(),
        "divergence": divergence(teacher_NC, student_NC).mean().item(),
    }
    corrected = kappa(first_N, second_N)
    return found if corrected is None else found | {"kappa": corrected}


def _of_labels(teacher_NC: Tensor, student_NC: Tensor) -> dict[str, float]:
    first_NC, second_NC = teacher_NC.sigmoid(), student_NC.sigmoid()
    return {
        "agreement": ((first_NC > 0.5) == (second_NC > 0.5)).double().mean().item(),
        "difference": (first_NC - second_NC).abs().mean().item(),
    }


def _of_values(teacher_NC: Tensor, student_NC: Tensor) -> dict[str, float]:
    from scipy import stats

    spread = teacher_NC.std(0, correction=0).square().mean().sqrt().item()
    varied = [label for label in range(teacher_NC.shape[1]) if np.ptp(teacher_NC[:, label].numpy()) > 0]
    if not varied:
        return {}
    found = {"relative_error": (teacher_NC - student_NC).square().mean().sqrt().item() / spread}
    for name, function in (("correlation", stats.pearsonr), ("rank_correlation", stats.spearmanr)):
        values = []
        for label in varied:
            first, second = teacher_NC[:, label].numpy(), student_NC[:, label].numpy()
            values.append(0.0 if np.ptp(second) == 0 else float(function(first, second).statistic))
        found[name] = float(np.mean(values))
    return found


_FIDELITIES: Table[Callable[[Tensor, Tensor], dict[str, float]]] = Table("problem")
_FIDELITIES.register("single_label", _of_choices)
_FIDELITIES.register("multi_label", _of_labels)
_FIDELITIES.register("regression", _of_values)
_FIDELITIES.register("one_label", _of_values)


# --- load ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """The distribution of one layer's tokens over its experts."""

    share_E: list[float]  # of the routed tokens; sums to 1
    max_over_mean: float  # 1 is an even load
    dead_experts: int  # chosen by no token


def load(expert_P: Tensor, num_experts: int) -> Load:
    """Return statistics of the experts that the tokens of one layer use; any shape, one index for each used pair."""
    counts_E = torch.bincount(expert_P.flatten(), minlength=num_experts)
    share_E = counts_E.double() / expert_P.numel()
    return Load(
        share_E=share_E.tolist(),
        max_over_mean=(share_E.max() * num_experts).item(),
        dead_experts=int((counts_E == 0).sum().item()),
    )


# --- cost ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one token in all layers; a product of [m, k] and [k, n] is 2 m k n."""

    attention: int
    ffn: int
    router: int = 0
    head: int = 0  # the map from hidden states to logits

    @property
    def total(self) -> int:
        """All of them together."""
        return self.attention + self.ffn + self.router + self.head


def attention_flops(width: int, length: int, *, heads: int, key_value_heads: int, head_width: int) -> int:
    """Return the FLOPs of one token in one attention layer: the four projections, the scores and their mixture.

    Each of the `length` tokens of a text attends to all of them, as in an encoder.
    """
    query, key_value = heads * head_width, key_value_heads * head_width
    projections = 2 * width * (query + 2 * key_value) + 2 * query * width
    return projections + 2 * (2 * length * query)


def ffn_flops(width: int, neurons: int, *, gated: bool) -> int:
    """Return the FLOPs of one token in an FFN of so many active neurons: two matrices, or three if gated."""
    return 2 * (3 if gated else 2) * width * neurons


def flops_per_token(spec: MoESpec, config: object, length: int) -> tuple[Flops, Flops]:
    """Return the FLOPs of a token in the matrix products of teacher and student, for texts of `length` tokens.

    `config` is the transformers configuration, for the attention heads. Norms and activations do not count. Where the
    number of experts differs from token to token, the mean of the spec counts.
    """
    chosen_for = ROUTINGS[spec.routing].tokens_per_choice(length)
    teachers = attention = dense = active = router = 0
    for shape in spec.stacks:
        settings = _settings_of_stack(config, shape)
        heads = _setting(settings, *(("decoder_attention_heads",) if "decoder" in shape.layers else ()), *_HEADS)
        if heads is None:
            raise ValueError(f"the configuration {type(config).__name__} does not say how many attention heads it has")
        each = attention_flops(
            shape.width,
            length,
            heads=heads,
            key_value_heads=_setting(settings, "num_key_value_heads") or heads,
            head_width=_setting(settings, "head_dim", "d_kv") or shape.width // heads,
        )
        crossed = spec.head == "seq2seq" and "decoder" in shape.layers
        each *= 2 if crossed else 1
        teachers += shape.dense_layers * each
        attention += shape.num_layers * each
        dense += shape.dense_layers * ffn_flops(shape.width, shape.dense_ffn_width, gated=shape.gated)
        if not spec.is_dense:
            router += shape.num_layers * 2 * shape.width * spec.num_experts // chosen_for
    for layer in range(spec.num_layers):
        shape = spec.shape_of(layer)
        used = shape.shared_width + spec.active_of(layer) * shape.expert_width
        active += ffn_flops(shape.width, used, gated=shape.gated)
    vocabulary = _setting(config, "vocab_size") if HEADS[spec.head].generates else 0
    head = 2 * spec.stacks[-1].width * (vocabulary or 0)
    return Flops(teachers, dense, head=head), Flops(attention, active, router, head)


_HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads", "encoder_attention_heads")


def _setting(config: object, *names: str) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _settings_of_stack(config: object, shape: FFNShape) -> object:
    """Return the configuration of the tower that holds this stack; for a model without towers, its own."""
    for tower in ("text", "vision"):
        if shape.layers.startswith(f"{tower}_model"):
            return getattr(config, f"{tower}_config")
    return config


def amdahl_bound(teacher: Flops, student: Flops) -> float:
    """Return the largest speedup of the student: the teacher's FLOPs over its own (Amdahl 1967).

    With a share f of the teacher's FLOPs in FFNs, of which a token runs the share a, and the same attention, this is
    ``1 / ((1 - f) + f * a)``. Routing counts as free and every FLOP as equally long.
    """
    return teacher.total / (student.total - student.router)


def parameters(teacher: nn.Module, student: nn.Module) -> dict[str, int]:
    """Return the numbers of parameters of the teacher, of the student, and that a token uses, on average."""
    total = sum(parameter.numel() for parameter in student.parameters())
    idle = 0
    for moe in moe_layers(student):
        stacks = (moe.w_in, moe.w_out, moe.b_in, moe.w_gate, moe.b_gate)
        one_expert = sum(stack[0].numel() for stack in stacks if stack is not None)
        idle += (moe.num_experts - moe.num_active) * one_expert
    return {
        "teacher": sum(parameter.numel() for parameter in teacher.parameters()),
        "student": total,
        "student_active": total - idle,
    }
