"""Updates: new weights for the layers that stay but have lost some of their inputs.

An update is a plain function `(reader, kept, moments) -> weight, bias`. `reader`: the layer after surgery, with the old
weights of the rows and slots that remain; `kept`: indices of these slots in the dense layer; `moments`: of its inputs
in the pruned model and of its wanted outputs. `weight` has the shape of the reader's, `bias` one number for each row.
An update with the argument `weighted` also gets the moments in which positions are weighted by the curvature of the
loss with respect to the reader's output.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hap import HapError
from hap.surgery.moments import Moments

RIDGE = 1e-3  # in units of the mean variance of the inputs


class Updated(NamedTuple):
    """New weight and bias of a layer."""

    weight: Tensor
    bias: Float[Tensor, "rows"]


def least_squares(reader: nn.Module, kept: Tensor, moments: Moments, *, ridge: float = RIDGE) -> Updated:
    """The weights and the bias of least mean squared error; the ridge pulls towards the old weights.

    W' = W + (Cov(y, x) - W Cov(x)) (Cov(x) + r I)^-1 with r = `ridge` times the mean variance of a column, and
    b' = E y - W' E x. [Xie21] does so without a ridge, with the inputs of the dense network.
    """
    c, old = moments.centred, _rows(reader, moments)
    step = torch.cholesky_solve(c.xy - c.xx @ old.mT, torch.linalg.cholesky(moments.ridged(ridge)))
    return _with_mean(reader, old + step.mT, moments)


def mean(reader: nn.Module, kept: Tensor, moments: Moments) -> Updated:
    """The old weights, and the bias that restores the mean of each output [An24]."""
    return _with_mean(reader, _rows(reader, moments), moments)


def rescale(reader: nn.Module, kept: Tensor, moments: Moments, *, ridge: float = RIDGE) -> Updated:
    """Weights by `least_squares`, each row then scaled so that its output has the wanted variance [Xie21].

    This increases the mean squared error, which is the smallest before the scaling. Constant outputs are not scaled.
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
    """Least squares with errors weighted, for each sample and position, by the curvature of the loss there.

    The weight of a position is the trace of the Gauss-Newton matrix with respect to the reader's output at it, over
    rows, divided by its mean over positions; `share` of it is mixed with 1 - `share` of a weight of 1, because a few
    samples have most of the curvature. HapError without `weighted`. Our choice.
    """
    if weighted is None:
        raise HapError("curvature_weighted: moments weighted by curvature expected, found none; apply() gives them")
    names = ("x", "y", "xx", "xy", "yy")
    mixed: dict[str, Any] = {name: torch.lerp(getattr(moments, name), getattr(weighted, name), share) for name in names}
    return least_squares(reader, kept, replace(moments, **mixed), ridge=ridge)


def _rows(reader: nn.Module, moments: Moments) -> Float[Tensor, "groups rows cols"]:
    """The weight of a reader as one matrix for each convolution group."""
    weight = reader.get_parameter("weight").detach()
    return weight.reshape(moments.xx.shape[0], -1, moments.xx.shape[-1]).to(moments.xx)


def _with_mean(reader: nn.Module, rows: Tensor, moments: Moments) -> Updated:
    bias = moments.y - (rows @ moments.x[:, :, None])[..., 0]
    weight = reader.get_parameter("weight")
    return Updated(rows.reshape(weight.shape).to(weight), bias.flatten().to(weight))
