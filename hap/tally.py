"""What curvature adds up over samples, batches and probes, with the error of each sum."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hap import HapError
from hap.groups import Groups
from hap.layers import weight_of
from hap.persample import Squares


@dataclass(frozen=True)
class Curvature:
    """A diagonal by parameter name, with what it is, how sure it is and what it cost."""

    diagonal: Mapping[str, Tensor]
    stderr: Mapping[str, Tensor]  # of it; 0 where nothing was drawn, an upper bound where one column was
    kind: str  # "exact Hessian diagonal", "Gauss-Newton diagonal" or "Hutchinson estimate"
    trace: Float[Tensor, "groups"] | None = None  # summed over each group, when groups were given
    trace_stderr: Float[Tensor, "groups"] | None = None
    drawn: float = 0.0  # share of the whole trace that was drawn at random
    samples: int = 0
    forwards: int = 0  # passes over each sample; one backward costs about two forwards
    backwards: int = 0


class Tally:
    """Sums over samples of what `exact` needs for the diagonal and its error."""

    def __init__(self, groups: Groups | None) -> None:
        """Nothing yet."""
        self.groups, self.linear = groups, True
        self.sums, self.fourths = dict[str, Tensor](), dict[str, Tensor]()
        self.mass, self.drawn, self.samples, self.columns = 0.0, 0.0, 0, 0
        self.variance = torch.zeros(0 if groups is None else len(groups), dtype=torch.float64)

    def begin(self, targets: Tensor, mass: float, columns: int, linear: bool) -> None:
        """Open a chunk of samples."""
        self.samples, self.mass, self.columns = self.samples + len(targets), self.mass + mass, columns
        self.linear &= linear
        self.by_group = torch.zeros(len(targets), len(self.variance), dtype=torch.float64)

    def add(self, layer: str, squares: Squares, sampled: bool) -> None:
        """Take in the squares of one layer; `sampled`: the last column was drawn."""
        name = weight_of(layer)
        wide = torch.promote_types(squares.total.dtype, torch.float32)
        total = squares.total.to(wide)
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        fourth = squares.last_squared.to(wide) * sampled
        self.fourths[name] = self.fourths[name] + fourth if name in self.fourths else fourth
        if sampled:
            self.drawn += float(squares.last.sum())
        if sampled and self.groups is not None:
            if (shape := self.groups.shapes.get(layer)) is None:  # inside an opaque module
                return
            of = self.groups.row_group[shape.rows_at]
            self.by_group.index_add_(1, of[of >= 0], squares.last[:, of >= 0].double().cpu())

    def end(self) -> None:
        """Close the chunk."""
        # the variance of a sample's draw is at most its second moment, of which its square is an unbiased estimate
        self.variance += self.by_group.square().sum(0)

    def result(self) -> Curvature:
        """The means over all samples."""
        if not self.sums:
            raise HapError("curvature: calibration batches expected, found none")
        diagonal = {name: value / self.mass for name, value in self.sums.items()}
        return Curvature(
            diagonal,
            {name: value.sqrt() / self.mass for name, value in self.fourths.items()},
            "exact Hessian diagonal" if self.linear else "Gauss-Newton diagonal",
            None if self.groups is None else self.groups.reduce(diagonal),
            None if self.groups is None else self.variance.sqrt() / self.mass,
            self.drawn / max(sum(float(v.sum()) for v in self.sums.values()), 1e-300),
            self.samples,
            1,
            self.columns,
        )


class Probes:
    """Means over probes, batch by batch, and their standard errors; of each name one number per element."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.mass, self.sums, self.variances = 0.0, dict[str, Tensor](), dict[str, Tensor]()

    def add(self, estimates: Iterable[Mapping[str, Tensor]], mass: float) -> None:
        """Take in the probes of one batch, one at a time (Welford)."""
        mean, squares = dict[str, Tensor](), dict[str, Tensor]()
        for n, values in enumerate(estimates, start=1):
            for name, value in values.items():
                value = value.to(torch.promote_types(value.dtype, torch.float32))
                delta = value - mean.setdefault(name, torch.zeros_like(value))
                mean[name] += delta / n
                squares.setdefault(name, torch.zeros_like(value)).add_(delta * (value - mean[name]))
        self.mass += mass
        for name in mean:
            variance = squares[name] / (n * (n - 1))
            self.sums[name] = self.sums.get(name, 0.0) + mass * mean[name]
            self.variances[name] = self.variances.get(name, 0.0) + mass**2 * variance

    def result(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The mean by mass, and its standard error."""
        if not self.sums:
            raise HapError("curvature: calibration batches expected, found none")
        mean = {name: value / self.mass for name, value in self.sums.items()}
        return mean, {name: value.sqrt() / self.mass for name, value in self.variances.items()}
