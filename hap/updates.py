"""What happens to the weights that stay: an update makes those of a layer that has lost some of what it read.

An update is a plain function `(reader, kept, moments) -> weight, bias`. `reader` is the layer as surgery left it, with
the old weights of its rows and slots; `kept` are those of its former slots that it still reads; `moments` are those of
what it reads now, in the pruned model, and of what it should write. The weight has the shape of the reader's, the bias
a number a row. One that takes `weighted` is given there the moments in which each position counts by the curvature of
the loss in what the reader writes.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hap import HapError
from hap.surgery.moments import Moments

RIDGE = 1e-3  # by the mean variance of what is read


class Updated(NamedTuple):
    """What an update gives."""

    weight: Tensor
    bias: Float[Tensor, "rows"]


def least_squares(reader: nn.Module, kept: Tensor, moments: Moments, *, ridge: float = RIDGE) -> Updated:
    """The weights of least mean squared error, and the bias; the ridge draws towards the old weights.

    W' = W + (Cov(y, x) - W Cov(x)) (Cov(x) + r I)^-1 with r = `ridge` times the mean variance of a column, and
    b' = E y - W' E x. [Xie21] has the same without a ridge, from the inputs of the dense network.
    """
    c, old = moments.centred, _rows(reader, moments)
    step = torch.cholesky_solve(c.xy - c.xx @ old.mT, torch.linalg.cholesky(moments.ridged(ridge)))
    return _with_mean(reader, old + step.mT, moments)


def mean(reader: nn.Module, kept: Tensor, moments: Moments) -> Updated:
    """The old weights, and the bias that gives each output its mean back [An24]."""
    return _with_mean(reader, _rows(reader, moments), moments)


def rescale(reader: nn.Module, kept: Tensor, moments: Moments, *, ridge: float = RIDGE) -> Updated:
    """That of least squares, each row then scaled so that its output has the variance wanted [Xie21].

    It worsens the mean squared error, which least squares has made least. Where nothing varies nothing is scaled.
    """
    c, new = moments.centred, least_squares(reader, kept, moments, ridge=ridge).weight
    rows = new.to(c.xx).reshape(c.xx.shape[0], -1, c.xx.shape[-1])
    var = ((rows @ c.xx) * rows).sum(-1)
    scale = torch.where(var > 1e-12 * c.yy, c.yy.clamp_min(0) / var.clamp_min(1e-300), 1.0).sqrt()
    return _with_mean(reader, rows * scale[:, :, None], moments)


def curvature_weighted(
    reader: nn.Module,
    kept: Tensor,
    moments: Moments,
    *,
    weighted: Moments | None = None,
    share: float = 0.5,
    ridge: float = RIDGE,
) -> Updated:
    """Least squares in which an error counts by the curvature of the loss where it is made: each sample and position.

    The weight is the trace over the rows of the Gauss-Newton matrix in what the reader writes there, divided by its
    mean; `share` of it and 1 - `share` of 1, for a few samples have most of the curvature. Our choice.
    """
    if weighted is None:
        raise HapError("curvature_weighted: moments weighted by curvature expected, found none; apply() gives them")
    parts = [moments, weighted]
    mixed = {name: torch.lerp(*(getattr(part, name) for part in parts), share) for name in ("x", "y", "xx", "xy", "yy")}
    return least_squares(reader, kept, replace(moments, **mixed), ridge=ridge)


def _rows(reader: nn.Module, moments: Moments) -> Float[Tensor, "groups rows cols"]:
    """The weights of a reader as a matrix for each group."""
    weight = reader.get_parameter("weight").detach()
    return weight.reshape(moments.xx.shape[0], -1, moments.xx.shape[-1]).to(moments.xx)


def _with_mean(reader: nn.Module, rows: Tensor, moments: Moments) -> Updated:
    bias = moments.y - (rows @ moments.x[:, :, None])[..., 0]
    weight = reader.get_parameter("weight")
    return Updated(rows.reshape(weight.shape).to(weight), bias.flatten().to(weight))
