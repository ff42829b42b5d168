"""What stands in for the rows of moderate sensitivity: a pointwise convolution in place of a spatial one ([Yu22])."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hap import HapError
from hap.patch import Patch
from hap.surgery import Inputs, resize


def zero(module: nn.Module, rows: Tensor, inputs: Inputs) -> nn.Module:
    """A pointwise convolution of zeros, to be learnt in fine-tuning.

    # upstream: the published code slices the centre tap and then zeroes it, so this is what its results start from.
    """
    pointwise = centre_tap(module, rows, inputs)
    for p in pointwise.parameters():
        nn.init.zeros_(p)
    return pointwise


def centre_tap(module: nn.Module, rows: Tensor, inputs: Inputs) -> _ConvNd:
    """A pointwise convolution with the trained centre of each kernel, as in the figure of [Yu22]."""
    assert isinstance(module, _ConvNd)
    pointwise = resize(copy.deepcopy(module), rows, inputs.slots)
    centre = pointwise.weight.detach()[:, :, *(slice(k // 2, k // 2 + 1) for k in module.kernel_size)]
    pointwise.weight = nn.Parameter(centre.clone(), requires_grad=pointwise.weight.requires_grad)
    pointwise.kernel_size = pointwise.dilation = (1,) * len(module.kernel_size)
    pointwise.padding, pointwise.padding_mode = (0,) * len(module.kernel_size), "zeros"
    pointwise._reversed_padding_repeated_twice = [0, 0] * len(module.kernel_size)
    return pointwise


def least_squares(module: nn.Module, rows: Tensor, inputs: Inputs) -> nn.Module:
    """The pointwise convolution nearest to the dense rows in mean squared error over the calibration inputs.

    With z the centre taps of the inputs that are kept (and a constant, where a bias is free), the weights are
    E[y z^T] E[z z^T]^+ in closed form; so what is dropped is stood in for by what correlates with it, and its mean
    goes into the bias, or into the BatchNorm that follows. Our choice: [Yu22] learns its implants from zero.
    """
    pointwise = centre_tap(module, rows, inputs)
    assert isinstance(module, _ConvNd)
    dense = resize(copy.deepcopy(module), rows, torch.arange(module.in_channels))
    zz = zy = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for x in inputs.batches():
            # what a pointwise convolution reads: one position for each of its outputs
            taps = x[(slice(None), slice(None), *(slice(None, None, step) for step in module.stride))]
            z = _columns(taps.index_select(1, inputs.slots.to(x.device)))
            if inputs.constant:
                z = torch.cat([z, torch.ones_like(z[:1])])
            zz, zy = zz + z @ z.T, zy + z @ _columns(dense(x)).T
        if not zz.dim():
            raise HapError("implant least_squares: calibration batches expected, found none; pass batches= to apply()")
        solution = (torch.linalg.pinv(zz, hermitian=True) @ zy).T.to(pointwise.weight)
        pointwise.weight.copy_(solution[:, : len(inputs.slots)].reshape(pointwise.weight.shape))
        if inputs.constant:
            pointwise.bias = nn.Parameter(solution[:, -1].clone(), requires_grad=pointwise.weight.requires_grad)
    return pointwise


def merge(module: nn.Module) -> nn.Module:
    """One ordinary convolution equal to a Patch with implants: the 1x1 kernels sit at the centre of zeros.

    Raises HapError for a Patch that is not of convolutions. Merging gives up the implants' saving.
    """
    if not isinstance(module, Patch) or not all(isinstance(part, _ConvNd) for part in module.parts):
        raise HapError(f"merge: a Patch of convolutions expected, found {type(module).__name__}")
    convs = [part for part in module.parts if isinstance(part, _ConvNd)]
    merged = copy.deepcopy(max(convs, key=lambda conv: conv.weight[0].numel()))
    size = merged.weight.shape[2:]
    pads = [[(w - k) // 2 for k, w in zip(c.weight.shape[:1:-1], size[::-1], strict=True) for _ in "01"] for c in convs]
    rows = torch.cat([nn.functional.pad(c.weight.detach(), pad) for c, pad in zip(convs, pads, strict=True)])
    tall = rows.new_zeros(module.width, *rows.shape[1:]).index_copy(0, module.places, rows)
    merged.weight = nn.Parameter(tall.new_zeros(len(tall), module.given, *size).index_copy(1, module.take, tall))
    if any(conv.bias is not None for conv in convs):
        bias = torch.cat([c.weight.new_zeros(len(c.weight)) if c.bias is None else c.bias.detach() for c in convs])
        merged.bias = nn.Parameter(bias.new_zeros(module.width).index_copy(0, module.places, bias))
    merged.out_channels, merged.in_channels = module.width, module.given
    return merged


def _columns(x: Tensor) -> Float[Tensor, "channels positions"]:
    return x.movedim(1, 0).flatten(1).double()
