"""Losses that know their Hessian in the model's outputs, which is all that `hap.hessian.exact` must know of them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import FunctionType
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

    A sample whose target is `ignore_index` counts nowhere, as in torch: not in the loss, its mass or its Hessian.

    The Hessian in the logits of a sample is a (diag(p) - p p^T), where a is the total weight of the sample's targets:
    the covariance of a class drawn from p. It is a sum of squares over the classes in any order, each against the mean
    of those that follow it: with r_c the probability of class c and of all that follow, and m_c the mean of e over
    those that follow alone, a sum_c p_c r_{c+1} / r_c (e_c - m_c)(e_c - m_c)^T. The last class has none after it, so
    there is one column less than classes; the likeliest first, what k columns leave is as small as it can be.
    """

    call: Call = forward
    label_smoothing: float = 0.0
    weight: Tensor | None = None
    ignore_index: int = -100

    def __call__(self, model: nn.Module, batch: Any) -> Float[Tensor, ""]:
        """The mean loss of a batch (inputs, targets); 0, where torch gives NaN, if all of its targets are ignored."""
        total, mass = self.total(self.call(model, batch[0]), batch[1]), self.mass(batch[1])
        return total / mass.where((batch[1] != self.ignore_index).any(), 1)

    def total(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, ""]:
        """The summed loss."""
        _check(outputs, targets)
        # on a device a wrong class stops the kernel: to look first would make each step of a training wait
        if targets.device.type == "cpu":
            _check_classes(outputs.shape[1], targets, self.ignore_index)
        how: dict[str, Any] = {"ignore_index": self.ignore_index, "label_smoothing": self.label_smoothing}
        weight = None if self.weight is None else self.weight.to(outputs)
        return F.cross_entropy(outputs, targets, weight, reduction="sum", **how)

    def mass(self, targets: Tensor) -> Tensor:
        """The number of samples whose target is not ignored, or the sum of the class weights of these targets."""
        if self.weight is None:
            return (targets != self.ignore_index).sum()
        return self._own(self.weight.to(targets.device), targets).sum()

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
        vectors = vectors * self._heights(targets, p).sqrt()[:, None, None]
        placed = torch.zeros_like(vectors).scatter(-1, order[:, None].expand_as(vectors), vectors)
        return Columns(placed.transpose(0, 1), drawn)

    def enough(self, outputs: Tensor, targets: Tensor, share: float) -> int:
        """The least k for which the columns left out have at most half of `share` of the trace in the outputs.

        Half, for the trace in the weights is not shared out as that in the outputs is. Samples count as in the loss.
        """
        p = outputs.detach().softmax(-1).double().sort(-1, descending=True).values
        r, squares = (t.flip(-1).cumsum(-1).flip(-1) for t in (p, p.square()))
        left = ((r - squares / r.clamp_min(1e-300)) * self._heights(targets, p)[:, None]).sum(0)
        return int((left > share / 2 * left[0]).sum())

    def _heights(self, targets: Tensor, like: Tensor) -> Float[Tensor, "batch"]:
        """The total weight a of each sample's targets; 0 where the target is ignored."""
        weight = torch.ones_like(like[0]) if self.weight is None else self.weight.to(like)
        kept, smoothed = targets != self.ignore_index, self.label_smoothing * weight.mean()
        return (1 - self.label_smoothing) * self._own(weight, targets) + smoothed * kept

    def _own(self, weight: Tensor, targets: Tensor) -> Float[Tensor, "batch"]:
        """The weight of each target's class; 0 where it is ignored.

        Nothing waits for a device: there a target that is no class has NaN, which is refused when all is measured.
        """
        kept = targets != self.ignore_index
        index = targets.where(kept, 0)
        try:
            own = weight.index_select(0, index if index.device.type == "cpu" else index.clamp(0, len(weight) - 1))
        except (IndexError, RuntimeError):
            _check_classes(len(weight), targets, self.ignore_index)
            raise
        return own.where((index >= 0) & (index < len(weight)), torch.nan) * kept


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
    if outputs.shape[1] == 1:
        do = "for two classes by one logit pass call=lambda model, x: torch.nn.functional.pad(model(x), (1, 0))"
        raise HapError(f"cross-entropy: a logit for each of 2 or more classes expected, found 1; {do}")
    if targets.dtype != torch.long or targets.shape != outputs.shape[:1]:
        found = f"{targets.dtype} of shape {tuple(targets.shape)}"
        raise HapError(f"cross-entropy: a class index for each of {len(outputs)} samples expected, found {found}")


def _check_classes(classes: int, targets: Tensor, ignored: int) -> None:
    if bool((wrong := (targets != ignored) & ((targets < 0) | (targets >= classes))).any()):
        found = int(targets[wrong][0])
        raise HapError(
            f"cross-entropy: for {classes} logits targets from 0 to {classes - 1} expected, found {found}; give the "
            f"model more logits, or pass ignore_index={found} to leave such samples out"
        )


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
        """The summed loss; HapError where outputs and targets differ in shape, which torch would broadcast."""
        _check_alike(outputs, targets)
        return (outputs - targets).square().sum()

    def mass(self, targets: Tensor) -> Tensor:
        """The number of elements."""
        return torch.ones_like(targets).sum()

    def columns(self, outputs: Tensor, targets: Tensor, k: int | None, rng: torch.Generator | None) -> Columns:
        """Unit vectors times sqrt 2; with k, those of the first k outputs, and of one drawn from the rest."""
        _check_outputs(outputs)
        _check_alike(outputs, targets)
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


def _check_alike(outputs: Any, targets: Tensor) -> None:
    """Whether outputs and targets are tensors of one shape."""
    if not isinstance(outputs, Tensor) or outputs.shape != targets.shape:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise HapError(
            f"squared error: outputs and targets of one shape expected, found {found} and {tuple(targets.shape)}; "
            "reshape the targets, or pass call= that returns outputs like them"
        )


def refuse_loss(loss: Any, who: str, *parts: str) -> None:
    """HapError where a loss lacks a part, an attribute of `Loss`, that the function `who` needs."""
    if absent := [part for part in parts if not hasattr(loss, part)]:
        kind = loss.__name__ if isinstance(loss, type | FunctionType) else type(loss).__name__
        rest = "" if "columns" not in absent else "; hutchinson() needs only loss(model, batch) and loss.mass(targets)"
        raise HapError(
            f"{who}: a loss with {', '.join(parts)} expected, as hap.CrossEntropy() or hap.SquaredError(), "
            f"found {kind} without {absent[0]}{rest}"
        )
