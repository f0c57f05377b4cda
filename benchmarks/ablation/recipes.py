"""Recipes: what a method does that no option of the core does, and how it spends the steps of distillation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.ablation.bench import Bench
from benchmarks.ablation.grid import Cell
from ffn2moe.decompose.partition import Partition
from ffn2moe.decompose.route import RouterSettings
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.distill.distiller import Distiller, Training
from ffn2moe.distill.layerwise import LayerTraining, distil_layers
from ffn2moe.distill.objectives import LossWeights, Objective, objective_for
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.spec import MoESpec
from ffn2moe.table import Table


@dataclass(frozen=True)
class Made:
    """The model of a cell; `spec` is None if it holds no mixture.

    `routed` is `oracle.diagnose` of each layer before the experts' outputs are fitted, while their sum is still the
    dense FFN.
    """

    model: Any
    spec: MoESpec | None
    routed: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True)
class Guard:
    """Neurons that always belong to the shared expert."""

    neurons: Callable[[Sequence[DenseFFN], Sequence[Tensor]], list[Tensor]]  # the guarded neurons of every layer
    # FFN, inputs [T, D], partition, width S and guarded neurons of a layer -> the neurons of its shared expert, [S]
    shared: Callable[[DenseFFN, Tensor, Partition, int, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """What a method does differently from ours.

    `train` spends the steps of distillation on a model, from a teacher and the cell's objective. `set_router` replaces
    the fit of each router and of the experts' outputs. `partitions` binds the partition to each layer, from the inputs
    [T, D] of all layers. `guard` keeps some neurons in the shared expert. `fit` fits the router of a layer to tokens
    [T, D], `diagnose` judges it on held-out tokens, and `diagnose_own` on its model's own inputs (of the layer, and of
    the first mixture) with the text of each token.
    """

    train: Callable[[Bench, Cell, Made, Any, Objective], None]
    set_router: Callable[[MoEFFN], None] | None = None
    partitions: Callable[[Bench, Cell, Sequence[Tensor]], list[Partition]] | None = None
    guard: Guard | None = None
    fit: Callable[[Bench, MoEFFN, Tensor, RouterSettings], None] | None = None
    diagnose: Callable[[Bench, MoEFFN, int], dict[str, float]] | None = None
    diagnose_own: Callable[[MoEFFN, Tensor, Tensor, Tensor], dict[str, float]] | None = None


RECIPES: Table[Recipe] = Table("recipe")


def distil(bench: Bench, made: Made, cell: Cell) -> None:
    """Spend the budget of steps as the method's recipe does; leave the model on the CPU in eval mode."""
    RECIPES[cell.method.recipe].train(bench, cell, made, bench.model(), objective_of(bench, cell))
    made.model.to("cpu").eval()


def objective_of(bench: Bench, cell: Cell) -> Objective:
    """Return the objective of every student of the grid, with the method's divergence if there are logits."""
    parts = {part: getattr(bench.budget, f"{part}_weight") for part in ("hidden", "embedding", "relational", "logits")}
    weights = LossWeights(**parts, divergence=cell.method.divergence)
    return objective_for(bench.head, weights, problem=bench.problem)


def steps_apart(bench: Bench, cell: Cell) -> int:
    """Return how many of the steps train each layer by itself."""
    return round(cell.method.layerwise_share * bench.budget.steps)


def training(bench: Bench, cell: Cell, made: Made, *, steps: int, balance: bool = True) -> Training:
    """Return the settings of an end-to-end training of this many steps."""
    return Training(
        steps=steps,
        learning_rate=bench.budget.learning_rate,
        balance_step=bench.budget.balance_step if balance else 0.0,
        elastic=made.spec.elastic if made.spec else (),
        seed=cell.seed,
        device=bench.setup.device,
        bf16=bench.bf16,
    )


def end_to_end(bench: Bench, cell: Cell, made: Made, teacher: Any, objective: Objective, settings: Training) -> None:
    """Distil the model on the grid's batches."""
    if settings.steps:
        exhaust(Distiller(teacher, made.model, bench.batches(cell.seed), objective, settings).run())


def exhaust(steps: Iterable[object]) -> None:
    """Run a generator to its end."""
    for _ in steps:
        pass


def train_ours(bench: Bench, cell: Cell, made: Made, teacher: Any, objective: Objective) -> None:
    """Train the layers by themselves for their share of the steps, then end to end.

    A step of the layers runs its tokens once through the FFNs of all layers, side by side.
    """
    budget, apart = bench.budget, steps_apart(bench, cell)
    if apart:
        alone = LayerTraining(
            steps=apart,
            batch_tokens=budget.batch_tokens,
            learning_rate=budget.learning_rate,
            seed=cell.seed,
            device=bench.setup.device,
            bf16=bench.bf16,
        )
        exhaust(distil_layers(teacher, made.model, bench.batches(cell.seed), alone))
    end_to_end(bench, cell, made, teacher, objective, training(bench, cell, made, steps=budget.steps - apart))


RECIPES.register("ours", Recipe(train_ours))
