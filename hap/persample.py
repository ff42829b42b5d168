"""Squares of per-sample weight gradients, from what a layer was given and the gradient of what it gave."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hap import HapError

BYTES = 2**24  # of per-sample gradients at a time: they should stay in the cache


class Squares(NamedTuple):
    """Squared gradients of one weight; of the last column alone, what its sampling error needs."""

    total: Tensor  # summed over columns and samples, of the weight's shape
    last: Float[Tensor, "batch rows"]  # of the last column, summed over each row
    last_squared: Tensor  # of the last column, squared once more and summed over samples


def squared_gradients(module: nn.Module, x: Tensor, grads: Float[Tensor, "columns batch *out"]) -> Squares:
    """Squares of the weight's per-sample gradients, for each column of output gradients.

    With u the patches that the layer reads (its input itself for a linear layer), the gradient of a sample is
    sum_p g_p u_p^T over positions p. Where there is one position the square is a product of squares, and nothing is
    formed per sample.
    """
    u, g = _patches(module, x), _outputs(module, grads)
    if u.shape[-1] == 1:
        squares = _one_position(u[..., 0], g[..., 0])
    else:
        step = max(1, BYTES // (g[0, ..., 0].numel() * u.shape[2] * u.element_size()))
        parts = [_materialised(u[i : i + step], g[i : i + step]) for i in range(0, len(u), step)]
        total, last, squared = zip(*parts, strict=True)
        squares = Squares(sum(total[1:], total[0]), torch.cat(last), sum(squared[1:], squared[0]))
    shape = module.get_parameter("weight").shape
    return Squares(squares.total.reshape(shape), squares.last, squares.last_squared.reshape(shape))


def _materialised(u: Tensor, g: Tensor) -> Squares:
    n, conv_groups, columns, rows, _ = g.shape
    d = (g.flatten(2, 3) @ u.mT).reshape(n, conv_groups, columns, rows, -1)
    last = d[:, :, -1].square()
    total = torch.linalg.vector_norm(d, dim=(0, 2)).square()
    return Squares(total, last.sum(-1).flatten(1), last.square().sum(0))


def _one_position(u: Tensor, g: Tensor) -> Squares:
    """`u`: [batch, groups, cols], `g`: [batch, groups, columns, rows]."""
    u2, g2 = u.square(), g.square()
    total = torch.einsum("ngo,ngi->goi", g2.sum(2), u2)
    last = g2[:, :, -1]
    return Squares(
        total, (last * u2.sum(-1, keepdim=True)).flatten(1), torch.einsum("ngo,ngi->goi", last.square(), u2.square())
    )


def refuse_unknown(name: str, module: nn.Module) -> None:
    """HapError unless the gradients of the module's weight are those of a layer known here."""
    own = type(module).forward in (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward)
    if not own or "weight" not in dict(module.named_parameters(recurse=False)):
        raise HapError(
            f"curvature: {name} ({type(module).__name__}) is not known; nn.Linear, nn.Conv1d and nn.Conv2d are"
        )
    if getattr(module, "padding_mode", "zeros") != "zeros":
        raise HapError(f"curvature: {name} pads with {module.padding_mode}; only zeros are known")


def _patches(module: nn.Module, x: Tensor) -> Float[Tensor, "batch groups cols positions"]:
    if isinstance(module, nn.Linear):
        return x.reshape(len(x), 1, -1, x.shape[-1]).mT
    assert isinstance(module, _ConvNd)
    x = F.pad(x, module._reversed_padding_repeated_twice)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if len(kernel) == 1:
        x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    u = (
        x[:, :, :: stride[0], :: stride[1]].flatten(2)
        if set(kernel) == {1}
        else F.unfold(x, kernel, dilation, 0, stride)
    )
    return u.reshape(len(x), module.groups, -1, u.shape[-1])


def _outputs(module: nn.Module, grads: Tensor) -> Float[Tensor, "batch groups columns rows positions"]:
    columns, n = grads.shape[:2]
    if isinstance(module, nn.Linear):
        return grads.reshape(columns, n, 1, -1, grads.shape[-1]).permute(1, 2, 0, 4, 3)
    assert isinstance(module, _ConvNd)
    rows = module.out_channels // module.groups
    return grads.reshape(columns, n, module.groups, rows, -1).permute(1, 2, 0, 3, 4)
