"""Squares of per-sample gradients of one layer, from what it was given and the gradients of what it gave.

With u_p the patch that a layer reads at position p and g_p the gradient of what it writes there, a sample's weight
gradient is sum_p g_p u_p^T. Its squares have three equivalent forms; the cheapest follows from the shapes:

- one position: (g u^T)^2 = g^2 (u^2)^T, and nothing is formed per sample;
- materialised: the gradient itself, squared: rows x cols x positions for each column;
- Gram: over pairs of positions, sum_pq (sum_c g_cp g_cq) u_p u_q for a weight, and sum_pq g_p g_q (u_p . u_q) for a
  row, the square of whose gradient needs no gradient [Goodfellow15]. Cheap where there are few positions.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

BYTES = 2**23  # of what is formed per sample at a time: it should stay in the cache
MIXING = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm)
Per = Literal["weight", "row"]


class Squares(NamedTuple):
    """Squared gradients of one parameter, summed over columns and samples; of a column that was drawn, its own too."""

    total: Tensor  # of the parameter's shape, or one a row
    last: Float[Tensor, "batch rows"] | None = None  # of the last column, summed over each row
    last_squared: Tensor | None = None  # of the last column, squared once more and summed over samples


def squared_gradients(
    module: nn.Module,
    x: Tensor,
    g: Float[Tensor, "batch positions columns rows"],
    names: Sequence[str] = ("weight",),
    *,
    per: Per = "weight",
    drawn: bool = False,
) -> dict[str, Squares]:
    """Squares of the gradients of the named parameters; `g` has the output gradients of each column, by `positions`.

    `per`: "weight" for the diagonal, "row" for its sum over each row. `drawn`: give what the error of the last column
    needs. Sums are in the dtype of `g`.
    """
    size = x[0].numel() * _kernel(module) + g[0].numel()
    if isinstance(module, MIXING) and "weight" in names and per == "weight":
        size += g.shape[2] * module.weight.numel()
    step = max(1, BYTES // (size * g.element_size()))
    parts = [
        _part(module, x[i : i + step].to(g.dtype), g[i : i + step], names, per, drawn) for i in range(0, len(x), step)
    ]
    return {name: _join([part[name] for part in parts]) for name in names}


def is_known(module: nn.Module) -> bool:
    """Whether the gradients of the module's own parameters are those of a layer known here."""
    forward = "forward" not in vars(module) and type(module).forward
    plain = getattr(module, "padding_mode", "zeros") == "zeros" and {"weight"} <= module._parameters.keys()
    return plain and any(forward is kind.forward for kind in (*MIXING, *NORMS))


def _part(
    module: nn.Module, x: Tensor, g: Float[Tensor, "batch positions columns rows"], names: Sequence[str], per: Per,
    drawn: bool,
) -> dict[str, Squares]:  # fmt: skip
    found = {}
    for name in names:
        if name == "weight" and isinstance(module, MIXING):
            found[name] = _mixing(module, _patches(module, x), g, per, drawn)
        else:
            d = g if name == "bias" else g * positions(module, _normalised(module, x))[:, :, None]
            squares = _rows(d.sum(1).square()[:, :, None], drawn)
            found[name] = squares if per == "row" else _shaped(module.get_parameter(name), squares)
    return found


def _mixing(module: nn.Module, u: Tensor, g: Tensor, per: Per, drawn: bool) -> Squares:
    """`u`: [batch, groups, positions, cols]; `g`: [batch, positions, columns, rows]."""
    _, conv_groups, places, cols = u.shape
    columns, rows = g.shape[2], g.shape[3] // conv_groups
    g = g.reshape(*g.shape[:3], conv_groups, rows).permute(0, 3, 2, 4, 1)  # [batch, groups, columns, rows, positions]
    if places == 1:
        squares = _one_position(u[:, :, 0].square(), g[..., 0].square(), per, drawn)
    elif per == "row" and places * (cols + columns * rows) < cols * columns * rows:
        flat = g.flatten(2, 3)
        d2 = ((flat @ (u @ u.mT)) * flat).sum(-1).reshape(g.shape[:-1])
        squares = _rows(d2.transpose(1, 2), drawn)
    elif per == "row":
        squares = _rows(_products(g, u).square_().sum(-1).transpose(1, 2), drawn)
    elif places < columns:
        gram = torch.einsum("ngcop,ngcoq->gnopq", g, g)
        squares = Squares(torch.einsum("gnopi,ngpi->goi", gram @ u.transpose(0, 1)[:, :, None], u))
        if drawn:
            last = _weights(_products(g[:, :, -1:], u).square_().transpose(1, 2), drawn)
            squares = last._replace(total=squares.total)
    else:
        squares = _weights(_products(g, u).square_().transpose(1, 2), drawn)
    return squares if per == "row" else _shaped(module.get_parameter("weight"), squares)


def _products(g: Tensor, u: Tensor) -> Float[Tensor, "batch groups columns rows cols"]:
    """The gradients themselves."""
    return (g.flatten(2, 3) @ u).reshape(*g.shape[:-1], u.shape[-1])


def _one_position(u2: Tensor, g2: Tensor, per: Per, drawn: bool) -> Squares:
    """`u2`: [batch, groups, cols], `g2`: [batch, groups, columns, rows]."""
    last = (g2[:, :, -1] * u2.sum(-1, keepdim=True)).flatten(1)
    if per == "row":
        return _rows((g2 * u2.sum(-1)[:, :, None, None]).transpose(1, 2), drawn)
    total = torch.einsum("ngo,ngi->goi", g2.sum(2), u2)
    if not drawn:
        return Squares(total)
    return Squares(total, last, torch.einsum("ngo,ngi->goi", g2[:, :, -1].square(), u2.square()))


def _weights(d2: Float[Tensor, "batch columns groups rows cols"], drawn: bool) -> Squares:
    total = d2.sum((0, 1))
    if not drawn:
        return Squares(total)
    return Squares(total, d2[:, -1].sum(-1).flatten(1), d2[:, -1].square().sum(0))


def _rows(d2: Float[Tensor, "batch columns groups rows"], drawn: bool) -> Squares:
    d2 = d2.flatten(2)
    return Squares(d2.sum((0, 1)), d2[:, -1], d2[:, -1].square().sum(0)) if drawn else Squares(d2.sum((0, 1)))


def _shaped(parameter: Tensor, squares: Squares) -> Squares:
    """From [groups, rows, taps * cols] to the shape of the parameter."""

    def shaped(t: Tensor) -> Tensor:
        if t.dim() < 3 or parameter.dim() < 3:
            return t.reshape(parameter.shape)
        return t.reshape(len(parameter), *parameter.shape[2:], parameter.shape[1]).movedim(-1, 1)

    squared = squares.last_squared
    return Squares(shaped(squares.total), squares.last, squared if squared is None else shaped(squared))


def _join(parts: list[Squares]) -> Squares:
    total, last, squared = zip(*parts, strict=True)
    if last[0] is None:
        return Squares(sum(total[1:], total[0]))
    return Squares(sum(total[1:], total[0]), torch.cat(last), sum(squared[1:], squared[0]))


def positions(module: nn.Module, t: Tensor) -> Float[Tensor, "batch positions rows"]:
    """What a module wrote, channels last, or the gradient of it."""
    if isinstance(module, nn.LayerNorm):
        return t.reshape(len(t), -1, module.weight.numel())
    t = t if isinstance(module, nn.Linear) else t.movedim(1, -1)
    return t.reshape(len(t), -1, t.shape[-1])


def _kernel(module: nn.Module) -> int:
    return module.weight[0, 0].numel() if isinstance(module, _ConvNd) else 1


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    """What the scale of a module multiplies."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    assert isinstance(module, _BatchNorm)
    assert module.running_mean is not None
    assert module.running_var is not None
    return F.batch_norm(x, module.running_mean.to(x), module.running_var.to(x), eps=module.eps)


def _patches(module: nn.Module, x: Tensor) -> Float[Tensor, "batch groups positions cols"]:
    """What each position reads, channels last, so that a row of taps is one run of memory."""
    if isinstance(module, nn.Linear):
        return x.reshape(len(x), 1, -1, x.shape[-1])
    assert isinstance(module, _ConvNd)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    x = F.pad(x, module._reversed_padding_repeated_twice).movedim(1, -1)
    if len(kernel) == 1:
        x, kernel, stride, dilation = x[:, None], (1, *kernel), (1, *stride), (1, *dilation)
    x = x.contiguous()
    n, _, _, channels = x.shape
    out = [
        (size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(x.shape[1:3], kernel, stride, dilation, strict=True)
    ]
    steps = x.stride()
    shape = (n, *out, *kernel, module.groups, channels // module.groups)
    strides = [steps[0], *(a * s for a, s in zip(steps[1:3], stride, strict=True)),
               *(a * d for a, d in zip(steps[1:3], dilation, strict=True)), channels // module.groups, 1]  # fmt: skip
    taps = x.as_strided(shape, strides).permute(0, 5, 1, 2, 3, 4, 6)
    return taps.reshape(n, module.groups, out[0] * out[1], -1)
