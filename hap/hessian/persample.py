"""Squares of per-sample gradients of one layer, from its inputs and the gradients of its outputs.

With u_p the patch of the input at position p and g_p the gradient of the output there, the gradient of the weight for
one sample is sum_p g_p u_p^T. Its squares have three equivalent forms; the shapes decide which is cheapest:

- one position: (g u^T)^2 = g^2 (u^2)^T, without any tensor per sample;
- materialised: the gradient itself, squared: rows x cols x positions operations for each column;
- Gram: over pairs of positions, sum_pq (sum_c g_cp g_cq) u_p u_q for a weight, and sum_pq g_p g_q (u_p . u_q) for the
  sum over a row, without the gradient itself [Goodfellow15]. Cheap where there are few positions.

A column is one vector of `hap.hessian.losses.Columns`; `cols` are the columns of a weight matrix.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from hap.structure.layers import positions as positions

BYTES = 2**24  # of all tensors per sample in one step, so that they stay in the cache
MIXING = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm)
Per = Literal["weight", "row"]


class Squares(NamedTuple):
    """Squared gradients of one parameter, summed over columns and samples; of a drawn column, some sums of its own."""

    total: Tensor  # of the shape of the parameter, or one number per row
    last: Float[Tensor, "batch rows"] | None = None  # of the last column, summed over each row
    last_squared: Tensor | None = None  # of the last column, squared once more and summed over samples
    across: Tensor | None = None  # of the last column of a weight, [batch, cols]: summed over its rows


def squared_gradients(
    module: nn.Module,
    x: Tensor,
    g: Float[Tensor, "batch columns rows positions"],
    names: Sequence[str] = ("weight",),
    *,
    per: Per = "weight",
    drawn: bool = False,
    scratch: dict[str, Tensor] | None = None,
) -> dict[str, Squares]:
    """The squared gradients of the parameters `names` of a module.

    `x`: its input; `g`: the gradients of its output, for each column, with axes as `positions` gives them. `per`:
    "weight" for one number per weight, "row" for the sum over each row. `drawn`: the last column was drawn, so its own
    sums are returned too. `scratch`: memory that the caller keeps for the next call. Sums have the dtype of `g`.
    """
    scratch = {} if scratch is None else scratch
    size = x[0].numel() * _kernel(module) + g[0].numel()
    if isinstance(module, MIXING) and "weight" in names:
        size += g.shape[1] * module.weight.numel()
    step = even(len(x), max(1, BYTES // (size * g.element_size())))
    parts = [
        _part(module, x[i : i + step].to(g.dtype), g[i : i + step], names, per, drawn, scratch)
        for i in range(0, len(x), step)
    ]
    return {name: _join([part[name] for part in parts]) for name in names}


def even(n: int, most: int) -> int:
    """The size of the parts when `n` things are divided into the fewest equal parts of at most `most`."""
    return -(-n // -(-n // most)) if n else 1


def is_known(module: nn.Module) -> bool:
    """Whether `squared_gradients` holds: the module's forward is that of a class in MIXING or NORMS."""
    forward = "forward" not in vars(module) and type(module).forward
    plain = getattr(module, "padding_mode", "zeros") == "zeros" and {"weight"} <= module._parameters.keys()
    return plain and any(forward is kind.forward for kind in (*MIXING, *NORMS))


def _part(
    module: nn.Module, x: Tensor, g: Float[Tensor, "batch columns rows positions"], names: Sequence[str], per: Per,
    drawn: bool, scratch: dict[str, Tensor],
) -> dict[str, Squares]:  # fmt: skip
    parts = {}
    for name in names:
        if name == "weight" and isinstance(module, MIXING):
            parts[name] = _mixing(module, x, g, per, drawn, scratch)
        else:
            d = g if name == "bias" else g * positions(module, _normalised(module, x))[:, None]
            squares = _rows(d.sum(-1).square()[:, :, None], drawn)
            parts[name] = squares if per == "row" else _shaped(module.get_parameter(name), squares)
    return parts


def _mixing(module: nn.Module, x: Tensor, g: Tensor, per: Per, drawn: bool, scratch: dict[str, Tensor]) -> Squares:
    """`g`: [batch, columns, rows, positions]."""
    conv_groups, weight = getattr(module, "groups", 1), module.get_parameter("weight")
    columns, rows, places, cols = g.shape[1], g.shape[2] // conv_groups, g.shape[3], weight[0].numel()
    natural = False  # whether the taps of the kernel are the last axis, as in the weight, or before cols, as in patches
    g = g.reshape(len(g), columns, conv_groups, rows, places).transpose(1, 2)
    if places == 1:
        u = patches(module, x, scratch)
        squares = _one_position(u[:, :, 0].square(), g[..., 0].square(), per, drawn)
    elif per == "row" and places * (cols + columns * rows) < cols * columns * rows:
        flat, u = g.flatten(2, 3), patches(module, x, scratch)
        d2 = ((flat @ (u @ u.mT)) * flat).sum(-1).reshape(g.shape[:-1])
        squares = _rows(d2.transpose(1, 2), drawn)
    elif per == "row":
        natural = _has_fast_groups(module, x)
        d = _by_kernel(module, x, g) if natural else _products(patches(module, x, scratch), g, scratch)
        squares = _rows(d.square_().sum(-1).transpose(1, 2), drawn)
    elif places < columns:
        gram, u = torch.einsum("ngcop,ngcoq->gnopq", g, g), patches(module, x, scratch)
        squares = Squares(torch.einsum("gnopi,ngpi->goi", gram @ u.transpose(0, 1)[:, :, None], u))
        if drawn:
            last = _weights(_products(u, g[:, :, -1:], scratch).square_().transpose(1, 2), drawn)
            squares = last._replace(total=squares.total)
    else:
        natural = _has_fast_groups(module, x)
        d = _by_kernel(module, x, g) if natural else _products(patches(module, x, scratch), g, scratch)
        squares = _weights(d.square_().transpose(1, 2), drawn)
    return squares if per == "row" else _shaped(weight, squares, natural)


def _products(u: Tensor, g: Tensor, scratch: dict[str, Tensor]) -> Float[Tensor, "batch groups columns rows cols"]:
    """The gradients per sample, in scratch memory; `u`: patches, `g`: [batch, groups, columns, rows, positions]."""
    n, conv_groups, columns, rows, _ = g.shape
    out = _room(scratch, "products", (n * conv_groups, columns * rows, u.shape[-1]), u)
    torch.bmm(g.reshape(len(out), columns * rows, -1), u.flatten(0, 1), out=out)
    return out.view(n, conv_groups, columns, rows, -1)


def _has_fast_groups(module: nn.Module, x: Tensor) -> bool:
    """Whether a grouped convolution is faster than a product of patches: with oneDNN it takes half the time."""
    spatial = isinstance(module, _ConvNd) and math.prod(module.kernel_size) > 1
    return spatial and x.device.type == "cpu" and x.dtype == torch.float32 and bool(torch._C._has_mkldnn)


def _by_kernel(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """The gradients per sample, from one convolution that has a group for each sample and column."""
    assert isinstance(module, _ConvNd)
    n, conv_groups, columns, rows, _ = g.shape
    pads = module._reversed_padding_repeated_twice
    inside = list(pads[::2])[::-1]
    if list(pads[::2]) != list(pads[1::2]):  # convolution_backward pads both sides by the same
        x, inside = F.pad(x, pads), [0] * len(inside)
    weight = x.new_empty(n * g[0, ..., 0].numel(), module.in_channels // conv_groups, *module.kernel_size)
    out = [
        (a + 2 * p - d * (k - 1) - 1) // s + 1
        for a, p, k, s, d in zip(x.shape[2:], inside, module.kernel_size, module.stride, module.dilation, strict=True)
    ]
    _, gradients, _ = torch.ops.aten.convolution_backward(
        g.reshape(1, len(weight), *out), x.reshape(1, -1, *x.shape[2:]), weight, None, module.stride, inside,
        module.dilation, False, [0] * len(out), n * conv_groups, [False, True, False],
    )  # fmt: skip
    return gradients.reshape(n, conv_groups, columns, rows, -1)  # type: ignore[no-any-return]


def _room(scratch: dict[str, Tensor], name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A tensor of this shape in scratch memory; its numbers are left from earlier use."""
    held = scratch.get(name)
    if held is None or held.numel() < math.prod(shape) or (held.dtype, held.device) != (like.dtype, like.device):
        held = scratch[name] = like.new_empty(math.prod(shape))
    return held[: math.prod(shape)].view(shape)


def _one_position(u2: Tensor, g2: Tensor, per: Per, drawn: bool) -> Squares:
    """`u2`: [batch, groups, cols], `g2`: [batch, groups, columns, rows]."""
    last = (g2[:, :, -1] * u2.sum(-1, keepdim=True)).flatten(1)
    if per == "row":
        return _rows((g2 * u2.sum(-1)[:, :, None, None]).transpose(1, 2), drawn)
    total = torch.einsum("ngo,ngi->goi", g2.sum(2), u2)
    if not drawn:
        return Squares(total)
    across = (g2[:, :, -1].sum(-1, keepdim=True) * u2).flatten(1)
    return Squares(total, last, torch.einsum("ngo,ngi->goi", g2[:, :, -1].square(), u2.square()), across)


def _weights(d2: Float[Tensor, "batch columns groups rows cols"], drawn: bool) -> Squares:
    last = d2[:, -1]
    sums = (last.sum(-1).flatten(1), last.square().sum(0), last.sum(-2).flatten(1)) if drawn else ()
    return Squares(d2.sum((0, 1)), *sums)


def _rows(d2: Float[Tensor, "batch columns groups rows"], drawn: bool) -> Squares:
    d2 = d2.flatten(2)
    return Squares(d2.sum((0, 1)), *((d2[:, -1], d2[:, -1].square().sum(0)) if drawn else ()))


def _shaped(parameter: Tensor, squares: Squares, natural: bool = False) -> Squares:
    """Squares with the shape of the parameter, from [groups, rows, taps * cols], or cols * taps where `natural`."""

    def shaped(t: Tensor) -> Tensor:
        if natural or t.dim() < 3 or parameter.dim() < 3:
            return t.reshape(parameter.shape)
        return t.reshape(len(parameter), *parameter.shape[2:], parameter.shape[1]).movedim(-1, 1)

    squared = None if squares.last_squared is None else shaped(squares.last_squared)
    return squares._replace(total=shaped(squares.total), last_squared=squared)


def _join(parts: list[Squares]) -> Squares:
    total, last, squared, across = zip(*parts, strict=True)
    if last[0] is None:
        return Squares(sum(total[1:], total[0]))
    whole = None if across[0] is None else torch.cat(across)
    return Squares(sum(total[1:], total[0]), torch.cat(last), sum(squared[1:], squared[0]), whole)


def _kernel(module: nn.Module) -> int:
    return module.weight[0, 0].numel() if isinstance(module, _ConvNd) else 1


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    """The normalised input of a normalisation layer, which its scale multiplies."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    assert isinstance(module, _BatchNorm)
    assert module.running_mean is not None
    assert module.running_var is not None
    return F.batch_norm(x, module.running_mean.to(x), module.running_var.to(x), eps=module.eps)


def patches(module: nn.Module, x: Tensor, scratch: dict[str, Tensor]) -> Float[Tensor, "batch groups positions cols"]:
    """The input patch of each position; cols are taps, then channels, so that copies read memory in runs."""
    if isinstance(module, nn.Linear):
        return x.reshape(len(x), 1, -1, x.shape[-1])
    assert isinstance(module, _ConvNd)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    x, pads = x.movedim(1, -1), module._reversed_padding_repeated_twice
    if set(kernel) == {1} and not any(pads):
        for axis, step in enumerate(stride, start=1):
            x = x[(slice(None),) * axis + (slice(None, None, step),)]
        return x.reshape(len(x), -1, module.groups, x.shape[-1] // module.groups).transpose(1, 2)
    if len(kernel) == 1:
        x, kernel, stride, dilation = x[:, None], (1, *kernel), (1, *stride), (1, *dilation)
        pads = [*pads, 0, 0]
    n, height, width, channels = x.shape
    padded = _room(scratch, "padded", (n, height + sum(pads[2:]), width + sum(pads[:2]), channels), x)
    if any(pads):
        padded.zero_()
    padded[:, pads[2] : pads[2] + height, pads[0] : pads[0] + width] = x
    shape, steps = padded.shape[1:3], padded.stride()
    out = [(a - d * (k - 1) - 1) // s + 1 for a, k, s, d in zip(shape, kernel, stride, dilation, strict=True)]
    apart = [a * s for a, s in zip(steps[1:3], stride, strict=True)]
    taps = [a * d for a, d in zip(steps[1:3], dilation, strict=True)]
    depth = channels // module.groups
    windows = padded.as_strided((n, module.groups, *out, *kernel, depth), (steps[0], depth, *apart, *taps, 1))
    return _room(scratch, "patches", tuple(windows.shape), x).copy_(windows).view(n, module.groups, out[0] * out[1], -1)
