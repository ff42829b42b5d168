"""The diagonal of the loss Hessian, estimated by random probes [Hutchinson90] as in [HAP-code]."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from torch import Tensor, nn

from hap import HapError
from hap.hessian.accumulate import ESTIMATE, Curvature
from hap.hessian.hooks import counting, measuring, ordinary, refuse_unfinite_diagonal
from hap.hessian.losses import Batches, Loss, refuse_loss
from hap.structure.groups import Groups
from hap.structure.layers import plain_kernels

TRACE = "trace per group"  # a key among the names of parameters
SMALL = 12 * 2**20  # bytes that autograd saves of a batch; below, one step of several probes is faster than several
TOGETHER = 8  # probes in such a step


@torch.inference_mode(mode=False)
def hutchinson(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    groups: Groups | None = None,
    *,
    probes: int,
    rng: torch.Generator,
    names: Sequence[str] | None = None,
    block: bool = False,
    until: Callable[[Curvature], bool] | None = None,
    every: int = 10,
    together: int | None = None,
) -> Curvature:
    """The mean of v * Hv over random probes v of +1 and -1, with its standard error over the probes [Hutchinson90].

    H: the Hessian of the mean loss of a batch; batches are averaged by their mass, and memory does not grow with their
    number or that of probes. `probes`: for each batch. A probe covers all weights at once, so the estimate of one
    weight has the noise of all others; with `block`, it covers one parameter, which takes a pass for each parameter.
    `rng` draws the probes. `names`: parameters, by default the weights of all convolutions and linear layers.
    `until(estimate)` is called after every `every` probes, of which `probes` is then the maximum, and ends the estimate
    by True. `together`: probes in one vectorised step; the default depends on the size of the layers. The standard
    error of one probe is inf. HapError for numbers below 1, and where no target counts or the diagonal is not finite.

    >>> model, x = nn.Linear(1, 1, bias=False), torch.tensor([[3.0]])
    >>> rng = torch.Generator().manual_seed(0)
    >>> estimate = hutchinson(model, SquaredError(), [(x, torch.zeros(1, 1))], probes=2, rng=rng)
    >>> estimate.diagonal["weight"].item(), estimate.stderr["weight"].item()  # 2 x^2, and no noise from other weights
    (18.0, 0.0)
    """
    _check(probes, every, together)
    refuse_loss(loss, "hutchinson", "mass")
    if until is not None and not isinstance(batches, Sequence):
        batches = list(batches)
    sums, rounds = Probes(), [probes]
    if until is not None:
        rounds = [min(every, probes - done) for done in range(0, probes, every)]
    with plain_kernels(), measuring(model, names) as params:
        for count in rounds:
            for batch in batches:
                if not (mass := float(loss.mass(batch[1]))):  # the only wait for the device in a batch
                    continue  # all of its targets are ignored
                estimates = _estimates(model, loss, batch, params, count, rng, block, together)
                sums.add(estimates, mass, groups, len(batch[1]))
            sums.close(count)
            result = sums.result(1 + 2 * sums.probes * (len(params) if block else 1))
            refuse_unfinite_diagonal("hutchinson", model, result.diagonal)
            if until is not None and until(result):
                break
    return result


class Probes:
    """Running means over probes with their standard errors, by parameter name, for each element."""

    def __init__(self) -> None:
        """All sums are 0."""
        self.probes, self.freedom, self.samples, self.mass = 0, 0, 0, 0.0
        self.sums, self.squares = dict[str, Tensor](), dict[str, Tensor]()
        self.round_mass, self.round_samples = 0.0, 0

    def add(self, estimates: Iterator[dict[str, Tensor]], mass: float, groups: Groups | None, samples: int) -> None:
        """Add the estimates of one batch, one per probe, with Welford's running mean and variance."""
        mean, squares = dict[str, Tensor](), dict[str, Tensor]()
        for n, values in enumerate(estimates, start=1):
            if groups is not None:
                values[TRACE] = groups.reduce(values)
                half = f"{TRACE} {(self.probes + n) % 2}"
                self.sums[half] = self.sums.get(half, 0.0) + mass * values[TRACE]
            for name, value in values.items():
                value = value.to(torch.promote_types(value.dtype, torch.float32))
                delta = value - mean.setdefault(name, torch.zeros_like(value))
                mean[name] += delta / n
                squares.setdefault(name, torch.zeros_like(value)).add_(delta * (value - mean[name]))
        for name in mean:
            self.sums[name] = self.sums.get(name, 0.0) + mass * n * mean[name]
            self.squares[name] = self.squares.get(name, 0.0) + mass**2 * squares[name]
        self.round_mass, self.round_samples = self.round_mass + mass, self.round_samples + samples

    def close(self, probes: int) -> None:
        """Finish a round of `probes` probes over all batches."""
        self.mass, self.samples = self.round_mass, self.round_samples
        self.round_mass, self.round_samples = 0.0, 0
        self.probes, self.freedom = self.probes + probes, self.freedom + probes - 1

    def result(self, backwards: int) -> Curvature:
        """The mean, weighted by mass, and its standard error, from the variance within each round and batch.

        `backwards`: the number for the Curvature. HapError where no batch had a target that counts.
        """
        if not self.squares:
            raise HapError("curvature: calibration batches expected, found none with a target that counts")
        halves = [self.sums.get(f"{TRACE} {i}") for i in (1, 0)]
        counts = (self.probes + 1) // 2, self.probes // 2
        mean = {name: self.sums[name] / (self.mass * self.probes) for name in self.squares}
        error = {name: (value / (self.freedom * self.probes)).sqrt() / self.mass if self.freedom else value + torch.inf
                 for name, value in self.squares.items()}  # fmt: skip
        trace, trace_error = (part.pop(TRACE).cpu() if TRACE in part else None for part in (mean, error))
        parts = [h.cpu() / (self.mass * n) for h, n in zip(halves, counts, strict=True) if h is not None]
        return Curvature(
            mean, error, ESTIMATE, trace, trace_error, 1.0, 0.0, self.mass, self.samples, 1, backwards, self.probes,
            torch.stack(parts) if len(parts) == 2 else None,
        )  # fmt: skip


def _estimates(
    model: nn.Module, loss: Loss, batch: Any, params: Mapping[str, nn.Parameter], probes: int, rng: torch.Generator,
    block: bool, together: int | None,
) -> Iterator[dict[str, Tensor]]:  # fmt: skip
    """v * Hv of one batch for each probe, by parameter name."""
    weights = list(params.values())
    with counting(model) as saved:
        value = loss(model, ordinary(batch))
    # create_graph in grad and not in backward(), which would make cycles of parameters and their gradients
    slopes = torch.autograd.grad(value, weights, create_graph=True, materialize_grads=True)
    if together is None:
        together = TOGETHER if sum(saved.values()) < SMALL else 1
    for first in range(0, probes, together):
        drawn = [[_rademacher(p, rng) for p in weights] for _ in range(min(together, probes - first))]
        vectors = [torch.stack(v) for v in zip(*drawn, strict=True)]
        if block:
            products = [_products([s], [p], [v])[0] for s, p, v in zip(slopes, weights, vectors, strict=True)]
        else:
            products = _products(slopes, weights, vectors)
        for i in range(len(drawn)):
            yield {name: v[i] * hv[i] for name, v, hv in zip(params, vectors, products, strict=True)}


def _products(slopes: Sequence[Tensor], weights: Sequence[Tensor], probes: Sequence[Tensor]) -> list[Tensor]:
    """Hv for each parameter, stacked over probes, from its gradient in `slopes` and its v in `probes`."""
    alive = [i for i, s in enumerate(slopes) if s.requires_grad]  # the others are 0, of layers that are not used
    if not alive:
        return [torch.zeros_like(v) for v in probes]
    product = partial(
        torch.autograd.grad, [slopes[i] for i in alive], weights, retain_graph=True, materialize_grads=True
    )
    if len(probes[0]) > 1:
        with suppress(RuntimeError), catch_warnings():  # raised by an op that vmap does not know
            filterwarnings("ignore", "There is a performance drop")
            return list(product([probes[i] for i in alive], is_grads_batched=True))
    rows = [product([probes[i][j] for i in alive]) for j in range(len(probes[0]))]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def _rademacher(like: Tensor, rng: torch.Generator) -> Tensor:
    # on the device of the generator, so that a seed gives the same numbers whatever the device of the model
    return torch.randint(0, 2, like.shape, generator=rng, device=rng.device).to(like).mul_(2).sub_(1)


def _check(probes: int, every: int, together: int | None) -> None:
    for name, value in (("probes", probes), ("every", every), ("together", 1 if together is None else together)):
        if value < 1:
            raise HapError(f"hutchinson: {name} of at least 1 expected, found {value}")
