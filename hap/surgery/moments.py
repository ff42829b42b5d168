"""Second moments of what a layer reads and of what it should write, summed over batches; knows no surgery.

Means over positions are all that a linear regression of the wanted outputs on the inputs needs, so no activations are
kept. A column is one number that a position reads: of a convolution a channel at a tap, in the order of the weight.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hap.hessian.persample import BYTES, even, patches
from hap.structure.layers import positions

WIDEST = 4096  # columns whose products are kept at once: 128 MiB in float64


@dataclass(frozen=True)
class Moments:
    """Means over all positions, weighted where they have weights, of x, what is read, and y, what is to be written.

    `groups`: those of a grouped convolution, else one. In float64.
    """

    count: float  # positions, or the sum of their weights
    x: Float[Tensor, "groups cols"]
    y: Float[Tensor, "groups rows"]
    xx: Float[Tensor, "groups cols cols"]
    xy: Float[Tensor, "groups cols rows"]
    yy: Float[Tensor, "groups rows"]  # squares alone

    @property
    def centred(self) -> "Moments":
        """Of x and y less their means: covariances."""
        return replace(
            self,
            xx=self.xx - self.x[:, :, None] * self.x[:, None],
            xy=self.xy - self.x[:, :, None] * self.y[:, None],
            yy=self.yy - self.y.square(),
        )


class Sums:
    """Takes in what a layer reads and should write, batch after batch."""

    def __init__(self, module: nn.Module) -> None:
        """`module`: a layer whose inputs these are, of a class that `is_known`."""
        self.module, self.scratch = module, dict[str, Tensor]()
        self.total: tuple[Tensor, ...] = ()
        self.count = 0.0

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor | None, weights: Float[Tensor, "batch positions"] | None = None) -> None:
        """Takes in a batch: `y` as the layer would write it, or None where nothing is wanted."""
        kernel = self.module.get_parameter("weight")[0, 0].numel()
        step = even(len(x), max(1, BYTES // (x[0].numel() * kernel * x.element_size())))
        for first in range(0, len(x), step):
            part = slice(first, first + step)
            self._add(x[part], None if y is None else y[part], None if weights is None else weights[part])

    def _add(self, x: Tensor, y: Tensor | None, weights: Tensor | None) -> None:
        u = patches(self.module, x, self.scratch)
        n, groups, places, cols = u.shape
        z = u.new_zeros(n, groups, 0, places) if y is None else positions(self.module, y).reshape(n, groups, -1, places)
        u, z = (
            u.transpose(0, 1).reshape(groups, n * places, cols),
            z.permute(1, 0, 3, 2).reshape(groups, n * places, -1),
        )
        w = None if weights is None else weights.reshape(1, -1, 1).to(u)
        heavy = u if w is None else u * w
        self.count += n * places if weights is None else float(weights.sum())
        weighed = z if w is None else z * w
        sums = heavy.sum(1), weighed.sum(1), heavy.mT @ u, heavy.mT @ z, (weighed * z).sum(1)
        if not self.total:
            self.total = tuple(each.double() for each in sums)
        else:
            for whole, each in zip(self.total, sums, strict=True):
                whole += each

    def result(self) -> Moments:
        """The means."""
        means = [each / max(self.count, 1e-300) for each in self.total]
        order = self._order().to(means[0].device)
        x, y, xx, xy, yy = means
        return Moments(self.count, x[:, order], y, xx[:, order][:, :, order], xy[:, order], yy)

    def _order(self) -> Tensor:
        """Where each column of the weight is among those of patches, which have their taps first."""
        weight = self.module.get_parameter("weight")
        each, taps = weight.shape[1], math.prod(weight.shape[2:])
        return torch.arange(each * taps).reshape(taps, each).T.flatten()
