"""Second moments of the inputs of a layer and of its wanted outputs, summed over batches; knows no surgery.

A linear regression of the wanted outputs on the inputs needs only means over positions, so no activations are kept. A
column is one input number of a position: in a convolution one channel at one tap, in the order of the weight.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hap.hessian.persample import BYTES, even, patches
from hap.structure.layers import positions

WIDEST = 4608  # columns whose products are kept at once, those of 512 channels at 3x3: 162 MiB in float64
ENOUGH = 200  # positions per column: then the noise of the weights adds half a percent to the error
THIN = (2, 4)


@dataclass(frozen=True)
class Moments:
    """Means over all positions, weighted if there are weights, of x, the input, and y, the wanted output; in float64.

    The axis `groups` is that of a grouped convolution; else it has length 1.
    """

    count: float  # positions, or the sum of their weights
    x: Float[Tensor, "groups cols"]
    y: Float[Tensor, "groups rows"]
    xx: Float[Tensor, "groups cols cols"]
    xy: Float[Tensor, "groups cols rows"]
    yy: Float[Tensor, "groups rows"]  # of squares, no products of two rows
    eps: float = 2**-23  # the relative rounding of a product

    @property
    def centred(self) -> "Moments":
        """The moments of x and y minus their means: covariances."""
        return replace(
            self,
            xx=self.xx - self.x[:, :, None] * self.x[:, None],
            xy=self.xy - self.x[:, :, None] * self.y[:, None],
            yy=self.yy - self.y.square(),
        )

    def ridged(self, ridge: float) -> Float[Tensor, "groups cols cols"]:
        """The covariance of x plus r on its diagonal, with r = `ridge` times the mean variance of a column.

        r also has the amount by which rounding of large means can lower the smallest eigenvalue.
        """
        c, power = self.centred.xx, self.xx.diagonal(dim1=-2, dim2=-1).sum(-1)
        r = ridge * c.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(0) + self.eps * power
        return c + r.clamp_min(1e-30)[:, None, None] * torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)


class Sums:
    """Sums over batches of the inputs of a layer and its wanted outputs."""

    def __init__(self, module: nn.Module, batches: int | None = None) -> None:
        """`module`: the layer, of a class that `is_known`.

        `batches`: their number, if known; then only every second or fourth pixel of large images is used along each
        axis, while at least ENOUGH positions per column remain. None: all pixels.
        """
        self.module, self.batches, self.scratch = module, batches, dict[str, Tensor]()
        self.total: tuple[Tensor, ...] = ()
        self.count, self.thin, self.turn, self.eps = 0.0, 0, 0, 0.0

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor | None, weights: Float[Tensor, "batch positions"] | None = None) -> None:
        """Add a batch: input `x`, and `y` of the shape of the output, or None for moments of x only."""
        module = self.module
        if isinstance(module, _ConvNd):
            w = None if weights is None or y is None else weights.reshape(len(y), 1, *y.shape[2:])
            module, x, y, w = self._thinned(module, x, y, w)
            weights = None if w is None else w.flatten(1)
        kernel = math.prod(module.get_parameter("weight").shape[2:])
        step = even(len(x), max(1, BYTES // max(1, x[0].numel() * kernel * x.element_size())))
        for first in range(0, len(x), step):
            part = slice(first, first + step)
            self._add(module, x[part], y if y is None else y[part], weights if weights is None else weights[part])

    def _thinned(self, module: _ConvNd, x: Tensor, y: Tensor | None, w: Tensor | None) -> tuple[Any, ...]:
        """The convolution with a larger stride, with its x, y and weights; every call takes other pixels."""
        pads, steps = module._reversed_padding_repeated_twice, module.stride
        sizes = [n + a + b for n, a, b in zip(x.shape[2:], pads[-2::-2], pads[-1::-2], strict=True)]
        outs = [
            (n - d * (k - 1) - 1) // s + 1
            for n, k, s, d in zip(sizes, module.kernel_size, steps, module.dilation, strict=True)
        ]
        if not self.thin:
            spare = math.prod(outs) * len(x) * (self.batches or 0) / (ENOUGH * module.weight[0].numel())
            self.thin = max([1, *(k for k in THIN if k ** len(outs) <= spare and min(outs) >= 2 * k)])
        if self.thin == 1:
            return module, x, y, w
        wide = copy.copy(module)
        wide.stride = tuple(step * self.thin for step in steps)
        wide._reversed_padding_repeated_twice = [0] * len(pads)
        starts = [(self.turn // self.thin**i) % self.thin for i in range(len(outs))]
        self.turn += 1
        x = F.pad(x, pads)[:, :, *(slice(at * step, None) for at, step in zip(starts, steps, strict=True))]
        # only whole steps, so that the number of outputs is that of the convolution
        ends = [at + self.thin * ((n - at - 1) // self.thin) + 1 for at, n in zip(starts, outs, strict=True)]
        lost = [
            slice(0, (end - 1 - at) * step + d * (k - 1) + 1)
            for at, end, step, d, k in zip(starts, ends, steps, module.dilation, module.kernel_size, strict=True)
        ]
        picked = (slice(None), slice(None), *(slice(at, None, self.thin) for at in starts))
        return wide, x[:, :, *lost], y if y is None else y[picked], w if w is None else w[picked]

    def _add(self, module: nn.Module, x: Tensor, y: Tensor | None, weights: Tensor | None) -> None:
        wide = torch.promote_types(x.dtype, torch.float32)
        u, self.eps = patches(module, x.to(wide), self.scratch), torch.finfo(wide).eps
        n, groups, places, cols = u.shape
        z = u.new_zeros(n, groups, 0, places) if y is None else positions(module, y).reshape(n, groups, -1, places)
        u = u.transpose(0, 1).reshape(groups, n * places, cols)
        z = z.permute(1, 0, 3, 2).reshape(groups, n * places, -1).to(u)
        w = None if weights is None else weights.reshape(1, -1, 1).to(u)
        heavy, weighed = (u, z) if w is None else (u * w, z * w)
        self.count += n * places if weights is None else float(weights.sum())
        sums = heavy.sum(1), weighed.sum(1), heavy.mT @ u, heavy.mT @ z, (weighed * z).sum(1)
        if not self.total:
            self.total = tuple(each.double() for each in sums)
        else:
            for whole, each in zip(self.total, sums, strict=True):
                whole += each

    def result(self) -> Moments:
        """The sums divided by the number of positions, or by the sum of their weights."""
        means = [each / max(self.count, 1e-300) for each in self.total]
        order = self._order().to(means[0].device)
        x, y, xx, xy, yy = means
        return Moments(self.count, x[:, order], y, xx[:, order][:, :, order], xy[:, order], yy, self.eps)

    def _order(self) -> Tensor:
        """For each column of the weight, its index among the columns of `patches`, where taps come before channels."""
        weight = self.module.get_parameter("weight")
        each, taps = weight.shape[1], math.prod(weight.shape[2:])
        return torch.arange(each * taps).reshape(taps, each).T.flatten()
