"""Losses with their Hessian in the outputs of the model, which is all that `hap.hessian.exact` needs of a loss."""

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

Batches = Iterable[Any]  # pairs (inputs, targets)


class Columns(NamedTuple):
    """Vectors s_c whose sum of s_c s_c^T is the Hessian in the outputs; its expectation where one was drawn."""

    vectors: Float[Tensor, "columns batch outputs"]
    drawn: bool  # whether the last was drawn at random, for all that are left out


@runtime_checkable
class Loss(Protocol):
    """A mean loss of (inputs, targets) whose Hessian in the outputs is a sum of squares of known vectors."""

    @property
    def call(self) -> Call:
        """(model, inputs) -> outputs [batch, classes or numbers]."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch (inputs, targets)."""

    def total(self, outputs: Tensor, targets: Tensor, /) -> Tensor:
        """The loss summed over the batch."""

    def mass(self, targets: Tensor, /) -> Tensor:
        """The divisor that turns `total` into the mean: the number of samples or elements, or a sum of weights."""

    def columns(self, outputs: Tensor, targets: Tensor, k: int | None, rng: torch.Generator | None, /) -> Columns:
        """Vectors that give the Hessian of each sample's loss: all, or k and one drawn with `rng` for the rest."""

    def enough(self, outputs: Tensor, targets: Tensor, share: float, /) -> int:
        """The smallest k whose columns leave at most about `share` of the trace to the draw."""


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy of logits `call(model, inputs)` [batch, classes] and class indices [batch], in nats.

    `label_smoothing`, `weight` [classes] and `ignore_index` as in torch; a sample whose target is `ignore_index` counts
    neither in the loss, nor in its mass, nor in its Hessian.

    The Hessian in the logits of a sample is a (diag(p) - p p^T), a the total weight of its targets, p its
    probabilities: a times the covariance of a class drawn from p. With the classes in any order, r_c the probability of
    class c and all later ones, and m_c the mean of the unit vectors e of the later ones alone, it is the sum
    a sum_c p_c r_{c+1} / r_c (e_c - m_c)(e_c - m_c)^T. The last class has no later one, so there is one column fewer
    than classes. With the likeliest class first, k columns leave the smallest rest.

    >>> loss, model = CrossEntropy(), nn.Identity()  # its inputs are the logits
    >>> logits, classes = torch.zeros(3, 2), torch.tensor([0, 1, 1])
    >>> round(loss(model, (logits, classes)).item(), 4)  # log 2
    0.6931
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
        """The loss summed over the samples; HapError for shapes or, on a CPU, classes that do not fit."""
        _check(outputs, targets)
        how: dict[str, Any] = {"ignore_index": self.ignore_index, "label_smoothing": self.label_smoothing}
        weight = None if self.weight is None else self.weight.to(outputs)
        try:  # no check before: every training step would wait for the device; on a GPU a wrong class stops the kernel
            return F.cross_entropy(outputs, targets, weight, reduction="sum", **how)
        except (IndexError, RuntimeError):
            _check_classes(outputs.shape[1], targets, self.ignore_index)
            raise

    def mass(self, targets: Tensor) -> Tensor:
        """The number of targets that are not ignored, or the sum of their class weights."""
        if self.weight is None:
            return (targets != self.ignore_index).sum()
        return self._own(self.weight.to(targets.device), targets).sum()

    def columns(self, outputs: Tensor, targets: Tensor, k: int | None, rng: torch.Generator | None) -> Columns:
        """One column for each class but the last; or for the k likeliest classes of each sample, and one drawn.

        The drawn class stands for all that are left out: e_c less the mean of their unit vectors, drawn with the
        probability of c among them, times the root of their total probability. Its square is unbiased.
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
        """The smallest k that leaves at most half of `share` of the trace in the outputs to the draw.

        Half, because the trace in the weights may be distributed otherwise. Samples are weighted as in the loss.
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

        Without a wait for the device: on a GPU, a target that is not a class gets NaN, and the diagonal is refused.
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
    """For each sample, 1 at one output drawn with a probability in proportion to its weight; 0 elsewhere."""
    assert rng is not None
    below = weights.double().cumsum(1)
    # on the device of the generator, so that a seed gives the same numbers whatever the device of the outputs
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
    """Mean over all elements of (outputs - targets)^2, outputs = `call(model, inputs)`; both [batch, numbers].

    The Hessian of its sum in the outputs is 2 times the identity.

    >>> loss, model = SquaredError(), nn.Identity()  # its inputs are the outputs
    >>> loss(model, (torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2))).item()  # (1 + 9) / 2
    5.0
    """

    call: Call = forward

    def __call__(self, model: nn.Module, batch: Any) -> Float[Tensor, ""]:
        """The mean loss of a batch (inputs, targets)."""
        return self.total(self.call(model, batch[0]), batch[1]) / self.mass(batch[1])

    def total(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, ""]:
        """The sum over all elements; HapError where outputs and targets differ in shape: torch would broadcast."""
        _check_alike(outputs, targets)
        return (outputs - targets).square().sum()

    def mass(self, targets: Tensor) -> Tensor:
        """The number of elements."""
        return torch.ones_like(targets).sum()

    def columns(self, outputs: Tensor, targets: Tensor, k: int | None, rng: torch.Generator | None) -> Columns:
        """Unit vectors times sqrt(2); with k, those of the first k outputs, and one drawn from the rest."""
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
        """The number of outputs, less `share` of it: all outputs have the same trace."""
        return math.ceil((1 - share) * outputs.shape[-1])


def _check_alike(outputs: Any, targets: Tensor) -> None:
    """HapError where outputs and targets are not tensors of one shape."""
    if not isinstance(outputs, Tensor) or outputs.shape != targets.shape:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise HapError(
            f"squared error: outputs and targets of one shape expected, found {found} and {tuple(targets.shape)}; "
            "reshape the targets, or pass call= that returns outputs like them"
        )


def refuse_loss(loss: Any, who: str, *parts: str) -> None:
    """HapError where a loss lacks one of `parts`, attributes of `Loss` that the function named `who` needs."""
    if absent := [part for part in parts if not hasattr(loss, part)]:
        kind = loss.__name__ if isinstance(loss, type | FunctionType) else type(loss).__name__
        rest = "" if "columns" not in absent else "; hutchinson() needs only loss(model, batch) and loss.mass(targets)"
        raise HapError(
            f"{who}: a loss with {', '.join(parts)} expected, as hap.CrossEntropy() or hap.SquaredError(), "
            f"found {kind} without {absent[0]}{rest}"
        )
