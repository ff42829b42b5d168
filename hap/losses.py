"""Losses that know their Hessian in the model's outputs, which is all that `hap.curvature` must know of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hap import HapError
from hap.layers import Call, forward

Batches = Iterable[Any]  # of (inputs, targets)


@runtime_checkable
class Loss(Protocol):
    """A mean loss of (inputs, targets) whose Hessian in the outputs is a sum of squares of known vectors."""

    @property
    def call(self) -> Call:
        """How the outputs come from model and inputs."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch."""

    def total(self, outputs: Tensor, targets: Tensor, /) -> Tensor:
        """The summed loss."""

    def mass(self, targets: Tensor, /) -> Tensor:
        """What the sum is divided by to give the mean."""

    def columns(self, outputs: Tensor, targets: Tensor, k: int | None, rng: torch.Generator | None, /) -> Tensor:
        """Vectors s [columns, batch, outputs] with sum_c s_c s_c^T the Hessian of the summed loss of each sample."""


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy of `call(model, inputs)` and class indices, in nats, with torch's smoothing and weights.

    The Hessian in the logits of a sample is a (diag(p) - p p^T) = a sum_c p_c (e_c - p)(e_c - p)^T, where a is the
    total weight of the sample's targets.
    """

    call: Call = forward
    label_smoothing: float = 0.0
    weight: Tensor | None = None

    def __call__(self, model: nn.Module, batch: Any) -> Float[Tensor, ""]:
        """The mean loss of a batch (inputs, targets)."""
        return self.total(self.call(model, batch[0]), batch[1]) / self.mass(batch[1])

    def total(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, ""]:
        """The summed loss."""
        _check(outputs, targets)
        weight = None if self.weight is None else self.weight.to(outputs)
        return F.cross_entropy(outputs, targets, weight, reduction="sum", label_smoothing=self.label_smoothing)

    def mass(self, targets: Tensor) -> Tensor:
        """The number of samples, or the sum of their class weights."""
        return torch.ones_like(targets).sum() if self.weight is None else self.weight.to(targets.device)[targets].sum()

    def columns(
        self, outputs: Tensor, targets: Tensor, k: int | None, rng: torch.Generator | None
    ) -> Float[Tensor, "columns batch classes"]:
        """One vector a class, or one for each of a sample's k likeliest classes and one drawn from the rest.

        The drawn one stands for all the others: class c with probability p_c / r, scaled by sqrt(r), where r is the
        probability that is left; its square is unbiased.
        """
        _check(outputs, targets)
        if k is not None and (k < 0 or rng is None):
            raise HapError(
                f"columns: a count of at least 0, and a generator to draw with, expected; found {k} and {rng}"
            )
        p = outputs.softmax(-1)
        share, order = p.sort(-1, descending=True)
        if k is not None and k < p.shape[-1] - 1:
            rest = share[:, k:].clamp_min(torch.finfo(p.dtype).tiny)
            assert rng is not None
            drawn = torch.multinomial(rest.to(rng.device), 1, generator=rng).to(order.device)
            order = torch.cat([order[:, :k], order[:, k:].gather(1, drawn)], 1)
            share = torch.cat([share[:, :k], rest.sum(1, keepdim=True)], 1)
        weight = torch.ones_like(p[0]) if self.weight is None else self.weight.to(p)
        a = (1 - self.label_smoothing) * weight[targets] + self.label_smoothing * weight.mean()
        vectors = F.one_hot(order.T, p.shape[-1]).to(p) - p
        return vectors * (share * a[:, None]).sqrt().T[..., None]


def _check(outputs: Any, targets: Tensor) -> None:
    _check_outputs(outputs)
    if targets.dtype != torch.long or targets.shape != outputs.shape[:1]:
        found = f"{targets.dtype} of shape {tuple(targets.shape)}"
        raise HapError(f"cross-entropy: a class index for each of {len(outputs)} samples expected, found {found}")


def _check_outputs(outputs: Any) -> None:
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise HapError(f"loss: outputs [batch, classes] expected, found {found}; pass call= that returns them")


@dataclass(frozen=True)
class SquaredError:
    """Mean over all elements of the squared error of `call(model, inputs)`; the Hessian of its sum is 2."""

    call: Call = forward

    def __call__(self, model: nn.Module, batch: Any) -> Float[Tensor, ""]:
        """The mean loss of a batch (inputs, targets)."""
        return self.total(self.call(model, batch[0]), batch[1]) / self.mass(batch[1])

    def total(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, ""]:
        """The summed loss."""
        return (outputs - targets).square().sum()

    def mass(self, targets: Tensor) -> Tensor:
        """The number of elements."""
        return torch.ones_like(targets).sum()

    def columns(
        self, outputs: Tensor, targets: Tensor, k: int | None, rng: torch.Generator | None
    ) -> Float[Tensor, "columns batch outputs"]:
        """Unit vectors times sqrt 2, whatever k: no output matters more than another."""
        _check_outputs(outputs)
        n, outs = outputs.shape
        return 2**0.5 * torch.eye(outs).to(outputs)[:, None].expand(outs, n, outs)
