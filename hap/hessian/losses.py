"""Losses that know their Hessian in the model's outputs, which is all that `hap.hessian.exact` must know of them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hap import HapError
from hap.structure.layers import Call, forward

Batches = Iterable[Any]  # of (inputs, targets)


class Columns(NamedTuple):
    """Vectors s with sum_c s_c s_c^T the Hessian in the outputs; of one that was drawn, in expectation."""

    vectors: Float[Tensor, "columns batch outputs"]
    drawn: bool  # whether the last was, for all that the others leave out


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

    def columns(self, outputs: Tensor, targets: Tensor, k: int | None, rng: torch.Generator | None, /) -> Columns:
        """What the Hessian of the summed loss of each sample is made of: all, or k and one drawn for the rest."""

    def enough(self, outputs: Tensor, targets: Tensor, share: float, /) -> int:
        """The least k whose columns leave at most about `share` of the trace to the draw."""


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy of `call(model, inputs)` and class indices, in nats, with torch's smoothing and weights.

    The Hessian in the logits of a sample is a (diag(p) - p p^T), where a is the total weight of the sample's targets:
    the covariance of a class drawn from p. It is a sum of squares over the classes in any order, each against the mean
    of those that follow it: with r_c the probability of class c and of all that follow, and m_c the mean of e over
    those that follow alone, a sum_c p_c r_{c+1} / r_c (e_c - m_c)(e_c - m_c)^T. The last class has none after it, so
    there is one column less than classes; the likeliest first, what k columns leave is as small as it can be.
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

    def columns(self, outputs: Tensor, targets: Tensor, k: int | None, rng: torch.Generator | None) -> Columns:
        """One column for each class but one; or for each of a sample's k likeliest and one drawn from the rest.

        The drawn one stands for all the others: e_c less their mean, with the probability that c has among them,
        scaled by the root of the probability they have together; its square is unbiased.
        """
        _check(outputs, targets)
        _check_count(k, rng)
        classes = outputs.shape[-1]
        p, order = outputs.softmax(-1).sort(-1, descending=True)
        r = p.flip(-1).cumsum(-1).flip(-1).clamp_min(torch.finfo(p.dtype).tiny)
        drawn = k is not None and k < classes - 2
        count = k if drawn and k is not None else classes - 1
        one = torch.eye(count, classes, dtype=p.dtype, device=p.device)
        later = p[:, None] / r[:, 1 : count + 1, None] * torch.ones_like(one).triu(1)
        vectors = (p * F.pad(r[:, 1:], (0, 1)) / r)[:, :count, None].sqrt() * (one - later)
        if drawn:
            rest = F.pad(p[:, count:], (count, 0)) / r[:, count, None]
            last = _draw(rest, rng) - rest
            vectors = torch.cat([vectors, r[:, count, None, None].sqrt() * last[:, None]], 1)
        weight = torch.ones_like(p[0]) if self.weight is None else self.weight.to(p)
        a = (1 - self.label_smoothing) * weight[targets] + self.label_smoothing * weight.mean()
        vectors = vectors * a.sqrt()[:, None, None]
        placed = torch.zeros_like(vectors).scatter(-1, order[:, None].expand_as(vectors), vectors)
        return Columns(placed.transpose(0, 1), drawn)

    def enough(self, outputs: Tensor, targets: Tensor, share: float) -> int:
        """The least k for which the columns left out have at most half of `share` of the trace in the outputs.

        Half, for the trace in the weights is not shared out as that in the outputs is.
        """
        p = outputs.detach().softmax(-1).double().sort(-1, descending=True).values
        r, squares = (t.flip(-1).cumsum(-1).flip(-1) for t in (p, p.square()))
        left = (r - squares / r.clamp_min(1e-300)).sum(0)
        return int((left > share / 2 * left[0]).sum())


def _draw(weights: Float[Tensor, "batch outputs"], rng: torch.Generator | None) -> Float[Tensor, "batch outputs"]:
    """One at an output drawn for each sample, as likely as its weight; zero elsewhere."""
    assert rng is not None
    below = weights.double().cumsum(1)
    # drawn where the generator lives, so that a seed means the same on every device; nothing comes back from it
    u = torch.rand(len(weights), 1, generator=rng, device=rng.device, dtype=torch.float64).to(below.device)
    index = (below <= u * below[:, -1:]).sum(1, keepdim=True).clamp_max(weights.shape[1] - 1)
    return torch.zeros_like(weights).scatter(1, index, 1.0)


def _check_count(k: int | None, rng: torch.Generator | None) -> None:
    if k is not None and (k < 0 or rng is None):
        raise HapError(f"columns: a count of at least 0, and a generator to draw with, expected; found {k} and {rng}")


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

    def columns(self, outputs: Tensor, targets: Tensor, k: int | None, rng: torch.Generator | None) -> Columns:
        """Unit vectors times sqrt 2; with k, those of the first k outputs, and of one drawn from the rest."""
        _check_outputs(outputs)
        _check_count(k, rng)
        n, outs = outputs.shape
        vectors = 2**0.5 * torch.eye(outs, dtype=outputs.dtype, device=outputs.device)[:, None].expand(outs, n, outs)
        if k is None or k >= outs - 1:
            return Columns(vectors, False)
        one = (2 * (outs - k)) ** 0.5 * _draw(F.pad(torch.ones_like(outputs)[:, k:], (k, 0)), rng)
        return Columns(torch.cat([vectors[:k], one[None]]), True)

    def enough(self, outputs: Tensor, targets: Tensor, share: float) -> int:
        """All but a share of the outputs, for none matters more than another."""
        return math.ceil((1 - share) * outputs.shape[-1])
