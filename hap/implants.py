"""Implants: small modules that replace rows of moderate sensitivity, pointwise convolutions for spatial ones [Yu22].

For attention heads, an implant is a low-rank map of each position, which adds to the output of the layer behind them.
An implant is a function (module, rows, inputs) -> module, or for heads (module, slots, inputs) -> module.
"""

import copy
import dataclasses
import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hap import HapError
from hap.surgery.apply import Inputs, resize
from hap.surgery.head_implants import Passing
from hap.surgery.patch import Patch

RIDGES = (1e-3, 1e-5, 1e-4, 1e-2, 1e-1, 1.0, 10.0)  # in units of the mean variance of x; the first for a single batch


def zero(module: nn.Module, rows: Tensor, inputs: Inputs | Passing) -> nn.Module:
    """A pointwise convolution of zeros, or for heads a low-rank map that gives zero; fine-tuning can train both.

    # upstream: the published code takes the centre tap and then sets it to zero, so its results start from this one.

    >>> inputs = Inputs(lambda: iter([]), slots=torch.tensor([0, 2]), constant=True)
    >>> implant = zero(nn.Conv2d(3, 8, 3, padding=1), torch.tensor([1, 4]), inputs)  # two rows from two channels
    >>> tuple(implant.weight.shape), implant.weight.count_nonzero().item()
    ((2, 2, 1, 1), 0)
    """
    if isinstance(inputs, Passing):
        assert isinstance(module, nn.Linear)
        down, up = implant = _two(module, inputs)
        with torch.no_grad():  # one factor is not zero, for else both gradients would be
            noise = torch.randn(inputs.rank, inputs.slots, generator=torch.Generator().manual_seed(0))
            down.get_parameter("weight").copy_(noise / inputs.slots**0.5)
            for p in up.parameters():
                p.zero_()
        return implant
    pointwise = centre_tap(module, rows, inputs)
    for p in pointwise.parameters():
        nn.init.zeros_(p)
    return pointwise


def centre_tap(module: nn.Module, rows: Tensor, inputs: Inputs) -> _ConvNd:
    """A pointwise convolution with the trained weights at the centre of each kernel, as in the figure of [Yu22].

    >>> module, inputs = nn.Conv2d(3, 8, 3, padding=1), Inputs(lambda: iter([]), torch.tensor([0, 2]), constant=True)
    >>> implant = centre_tap(module, torch.tensor([1]), inputs)
    >>> torch.equal(implant.weight[0, :, 0, 0], module.weight[1, [0, 2], 1, 1])
    True
    """
    assert isinstance(module, _ConvNd)
    pointwise = resize(copy.deepcopy(module), rows, inputs.slots)
    centre = pointwise.weight.detach()[:, :, *(slice(k // 2, k // 2 + 1) for k in module.kernel_size)]
    pointwise.weight = nn.Parameter(centre.clone(), requires_grad=pointwise.weight.requires_grad)
    pointwise.kernel_size = pointwise.dilation = (1,) * len(module.kernel_size)
    pointwise.padding, pointwise.padding_mode = (0,) * len(module.kernel_size), "zeros"
    pointwise._reversed_padding_repeated_twice = [0, 0] * len(module.kernel_size)
    return pointwise


def least_squares(module: nn.Module, rows: Tensor, inputs: Inputs) -> nn.Module:
    """The pointwise convolution nearest to the dense rows y in mean squared error over the calibration inputs.

    With z the kept inputs at the centre of the kernel (and a constant, where a bias is free), the weights are
    E[y z^T] E[z z^T]^+, in closed form. So kept inputs replace those that are dropped as far as they correlate, and the
    mean of the rest goes into the bias, or into the BatchNorm behind. HapError without calibration batches. Our choice:
    [Yu22] trains its implants from zero.

    >>> module, x = nn.Conv2d(1, 2, 3, padding=1, bias=False), torch.ones(1, 1, 1, 1)
    >>> implant = least_squares(module, torch.tensor([1]), Inputs(lambda: iter([x]), torch.tensor([0]), False))
    >>> torch.allclose(implant(x), module(x)[:, 1:])  # one pixel, of which only the centre of the kernel counts
    True
    """
    pointwise = centre_tap(module, rows, inputs)
    assert isinstance(module, _ConvNd)
    dense = resize(copy.deepcopy(module), rows, torch.arange(module.in_channels))
    zz = zy = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for x in inputs.batches():
            # the input position of each output of a pointwise convolution
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


def low_rank(module: nn.Module, slots: Tensor, inputs: Passing) -> nn.Module:
    """The map of rank `inputs.rank` from x, the input of heads, to y, what they add to the output of `module`.

    `module`: the layer behind the heads; `slots`: those of its inputs that the heads write, so that y is the product of
    these inputs and their columns. Nearest to y in mean squared error by reduced-rank regression [Izenman75]: the ridge
    regression of y on x, projected on the leading eigenvectors of its fitted values; the mean of y goes into the bias.
    The ridge is the value of RIDGES that, fitted to the batches 0, 2, ..., predicts the batches 1, 3, ... best. Rank 0
    is `mean`. HapError without calibration batches. Our choice: [Yu22] names a low-rank implant and does not say which.

    >>> rng = torch.Generator().manual_seed(0)
    >>> x, module = torch.randn(50, 4, generator=rng), nn.Linear(3, 2)
    >>> c = x[:, :1] * torch.tensor([1.0, 2.0, 3.0])  # of rank 1
    >>> implant = low_rank(module, torch.arange(3), Passing(lambda: iter([(x, c)]), slots=4, rank=1, constant=True))
    >>> torch.allclose(implant(x), c @ module.weight.T, atol=0.02)
    True
    """
    assert isinstance(module, nn.Linear)
    weight = module.weight.detach().double()[:, slots.to(module.weight.device)]
    halves = [_Moments(inputs.slots, module.out_features) for _ in "01"]
    for i, (x, c) in enumerate(inputs.batches()):
        halves[i % 2].add(x.double(), c.double()[:, slots.to(c.device)] @ weight.T)
    whole = _Moments(inputs.slots, module.out_features, halves[0].gram + halves[1].gram)
    if not whole.count:
        raise HapError("implant low_rank: calibration batches expected, found none; pass batches= to apply()")
    ridge = RIDGES[0]
    if halves[1].count and inputs.rank:
        how = inputs.rank, inputs.constant
        ridge = min(RIDGES, key=lambda value: halves[1].error(*halves[0].solve(value, *how)))
    implant = _two(module, inputs)
    with torch.no_grad():
        for t, value in zip(implant.parameters(), whole.solve(ridge, inputs.rank, inputs.constant), strict=False):
            t.copy_(value)  # the bias, the last value, only where there is one
    return implant


def mean(module: nn.Module, slots: Tensor, inputs: Passing) -> nn.Module:
    """The mean of what heads add to the output of `module`, as a bias only, which is free where the module has one.

    Where it has none (`inputs.constant` is False), the implant gives zero. HapError without calibration batches.

    >>> x, c, module = torch.zeros(2, 4), torch.tensor([[1.0], [3.0]]), nn.Linear(1, 2)
    >>> implant = mean(module, torch.tensor([0]), Passing(lambda: iter([(x, c)]), slots=4, rank=1, constant=True))
    >>> torch.allclose(implant(x)[0], 2 * module.weight[:, 0])
    True
    """
    return low_rank(module, slots, dataclasses.replace(inputs, rank=0))


def _two(module: nn.Linear, inputs: Passing) -> nn.Sequential:
    """Two linear layers, slots -> rank -> rows, not initialised; for rank 0, only the bias has numbers."""
    dtype = module.weight.dtype
    with torch.device("meta"), warnings.catch_warnings():  # so that no weights are drawn from the global seed
        warnings.filterwarnings("ignore", "Initializing zero-element tensors is a no-op")
        down = nn.Linear(inputs.slots, inputs.rank, bias=False, dtype=dtype)
        up = nn.Linear(inputs.rank, module.out_features, bias=inputs.constant, dtype=dtype)
    return nn.Sequential(down, up).to_empty(device=module.weight.device)


class _Moments:
    """Sums over positions of the products of x, 1 and y, from which every regression of y on x follows."""

    def __init__(self, slots: int, rows: int, gram: Tensor | None = None) -> None:
        size = slots + 1 + rows
        self.slots, self.gram = slots, torch.zeros(size, size, dtype=torch.float64) if gram is None else gram

    @property
    def count(self) -> int:
        """The number of positions."""
        return int(self.gram[self.slots, self.slots])

    def add(self, x: Float[Tensor, "positions slots"], y: Float[Tensor, "positions rows"]) -> None:
        """Add the products of these positions."""
        z = torch.cat([x, torch.ones_like(x[:, :1]), y], 1)
        self.gram += (z.T @ z).to(self.gram)

    def solve(self, ridge: float, rank: int, constant: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The best map of this rank: two factors, [rank, slots] and [rows, rank], and the constant [rows].

        `ridge`: in units of the mean variance of x; `constant`: whether the map may have a constant.
        """
        d = self.slots
        moments = self.gram / self.gram[d, d]
        centre = moments[d] * constant
        c = moments - torch.outer(centre, centre)
        # the second term keeps the system solvable where x does not vary, as in a single position
        scale = (ridge * c[:d, :d].trace() + 1e-12 * moments[:d, :d].trace()) / d
        xx = c[:d, :d] + scale.clamp_min(1e-300) * torch.eye(d, dtype=c.dtype)
        full = torch.linalg.solve(xx, c[:d, d + 1 :])
        up = torch.linalg.eigh(full.T @ xx @ full).eigenvectors[:, max(0, full.shape[1] - rank) :]
        up = nn.functional.pad(up, (0, rank - up.shape[1]))  # a rank above the number of rows adds zeros
        down = (full @ up).T
        return down, up, centre[d + 1 :] - up @ (down @ centre[:d])

    def error(self, down: Tensor, up: Tensor, shift: Tensor) -> float:
        """The mean over positions of the squared error of the map down, up, shift, summed over rows."""
        left = torch.cat([-up @ down, -shift[:, None], torch.eye(len(up), dtype=up.dtype)], 1)
        return float((left @ self.gram * left).sum() / self.count)


def merge(module: nn.Module) -> nn.Module:
    """One ordinary convolution that computes what a Patch with implants does: 1x1 kernels are padded with zeros.

    It has the cost of the dense rows again. HapError for a module that is not a Patch of convolutions.

    >>> dense, point = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(3, 1, 1)
    >>> patch = Patch([dense, point], places=torch.tensor([0, 2, 1]), take=torch.arange(3), axis=1, given=3, width=3)
    >>> conv, x = merge(patch), torch.ones(1, 3, 4, 4)
    >>> type(conv).__name__, torch.allclose(conv(x), patch(x), atol=1e-6)
    ('Conv2d', True)
    """
    if not isinstance(module, Patch) or not all(isinstance(part, _ConvNd) for part in module.parts):
        raise HapError(f"merge: a Patch of convolutions expected, found {type(module).__name__}")
    merged = copy.deepcopy(max(module.parts, key=lambda conv: conv.get_parameter("weight")[0].numel()))
    for name in ("weight", "bias"):
        value = getattr(module, name)
        merged.register_parameter(name, None if value is None else nn.Parameter(value.detach()))
    for name in ("out_channels", "in_channels", "groups"):
        setattr(merged, name, getattr(module, name))
    return merged


def _columns(x: Tensor) -> Float[Tensor, "channels positions"]:
    return x.movedim(1, 0).flatten(1).double()
