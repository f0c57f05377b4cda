"""Take layers apart into the tensors of a job, and put them together again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ffn2moe.decompose.layer_map import LayerJob, under
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.spec import MoESpec


def dense_parts(ffn: DenseFFN) -> dict[str, Tensor]:
    """Return the tensors of a dense FFN, named as in a job."""
    return {f"dense.{name}": value for name, value in vars(ffn).items() if isinstance(value, Tensor)}


def dense_of(job: LayerJob) -> DenseFFN:
    """Return the dense FFN of a job, whose settings name the activation."""
    return DenseFFN(activation=job.settings["activation"], **under("dense.", job.tensors))


def mixture_parts(moe: MoEFFN) -> dict[str, Tensor]:
    """Return the tensors of a mixture, named as in a job."""
    return {f"ffn.{name}": tensor for name, tensor in moe.state_dict().items()}


def mixture_of(job: LayerJob) -> MoEFFN:
    """Return the mixture of a job, whose settings hold the spec."""
    return mixture_from(under("ffn.", job.tensors), MoESpec.from_dict(job.settings["spec"]), job.layer)


def mixture_from(tensors: Mapping[str, Tensor], spec: MoESpec, layer: int) -> MoEFFN:
    """Return the mixture of a layer that has these tensors."""
    biases = {name: name in tensors for name in ("b_in", "b_out", "b_gate")}
    moe = MoEFFN(spec, layer, **biases)
    moe.load_state_dict(tensors)
    return moe.eval()
