"""What stands in for the rows of moderate sensitivity: a pointwise convolution in place of a spatial one ([Yu22]).

For an attention head it is a low-rank map of each position, beside the layers.
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

RIDGES = (1e-3, 1e-5, 1e-4, 1e-2, 1e-1, 1.0, 10.0)  # by the mean square of x; the first where nothing can choose


def zero(module: nn.Module, rows: Tensor, inputs: Inputs | Passing) -> nn.Module:
    """A pointwise convolution of zeros, or of heads a low-rank map of zeros, to be learnt in fine-tuning.

    # upstream: the published code slices the centre tap and then zeroes it, so this is what its results start from.
    """
    if isinstance(inputs, Passing):
        assert isinstance(module, nn.Linear)
        down, up = made = _two(module, inputs)
        with torch.no_grad():  # of one factor alone, or neither would ever move
            noise = torch.randn(inputs.rank, inputs.slots, generator=torch.Generator().manual_seed(0))
            down.get_parameter("weight").copy_(noise / inputs.slots**0.5)
            for p in up.parameters():
                p.zero_()
        return made
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


def low_rank(module: nn.Module, slots: Tensor, inputs: Passing) -> nn.Module:
    """The map of the given rank from what heads read to what they add behind `module`, nearest in mean squared error.

    Reduced-rank regression [Izenman75]: of the ridge regression of y on x the part in the leading eigenvectors of its
    fitted values; the mean of y goes into the bias. The ridge is that of RIDGES which, fitted to the even batches,
    predicts the odd ones best. Rank 0 is `mean`. Our choice: [Yu22] names a low-rank implant and does not say which.
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
        ridge = min(RIDGES, key=lambda each: halves[1].error(*halves[0].solved(each, *how)))
    made = _two(module, inputs)
    with torch.no_grad():
        for t, value in zip(made.parameters(), whole.solved(ridge, inputs.rank, inputs.constant), strict=False):
            t.copy_(value)  # the last only where there is a bias
    return made


def mean(module: nn.Module, slots: Tensor, inputs: Passing) -> nn.Module:
    """What heads add behind `module` on average, as a bias alone: free where the module has one."""
    return low_rank(module, slots, dataclasses.replace(inputs, rank=0))


def _two(module: nn.Linear, inputs: Passing) -> nn.Sequential:
    """Two linear layers of the rank between them, unfilled; for rank 0 only the bias of the second says anything."""
    dtype = module.weight.dtype
    with torch.device("meta"), warnings.catch_warnings():  # unfilled, so that no global seed is drawn from
        warnings.filterwarnings("ignore", "Initializing zero-element tensors is a no-op")
        down = nn.Linear(inputs.slots, inputs.rank, bias=False, dtype=dtype)
        up = nn.Linear(inputs.rank, module.out_features, bias=inputs.constant, dtype=dtype)
    return nn.Sequential(down, up).to_empty(device=module.weight.device)


class _Moments:
    """Sums of products of x, 1 and y over positions: all that regressions of y on x need."""

    def __init__(self, slots: int, rows: int, gram: Tensor | None = None) -> None:
        size = slots + 1 + rows
        self.slots, self.gram = slots, torch.zeros(size, size, dtype=torch.float64) if gram is None else gram

    @property
    def count(self) -> int:
        """How many positions there were."""
        return int(self.gram[self.slots, self.slots])

    def add(self, x: Float[Tensor, "positions slots"], y: Float[Tensor, "positions rows"]) -> None:
        """Takes in some positions."""
        z = torch.cat([x, torch.ones_like(x[:, :1]), y], 1)
        self.gram += (z.T @ z).to(self.gram)

    def solved(self, ridge: float, rank: int, constant: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The two factors, [rank, slots] and [rows, rank], and the constant [rows], of the best map of this rank."""
        d = self.slots
        moments = self.gram / self.gram[d, d]
        centre = moments[d] * constant
        c = moments - torch.outer(centre, centre)
        # where x does not vary, as in a single position, there is nothing to solve
        scale = (ridge * c[:d, :d].trace() + 1e-12 * moments[:d, :d].trace()) / d
        xx = c[:d, :d] + scale.clamp_min(1e-300) * torch.eye(d, dtype=c.dtype)
        full = torch.linalg.solve(xx, c[:d, d + 1 :])
        up = torch.linalg.eigh(full.T @ xx @ full).eigenvectors[:, max(0, full.shape[1] - rank) :]
        up = nn.functional.pad(up, (0, rank - up.shape[1]))  # a rank beyond the width adds nothing
        down = (full @ up).T
        return down, up, centre[d + 1 :] - up @ (down @ centre[:d])

    def error(self, down: Tensor, up: Tensor, shift: Tensor) -> float:
        """The mean squared error of a map over these positions."""
        left = torch.cat([-up @ down, -shift[:, None], torch.eye(len(up), dtype=up.dtype)], 1)
        return float((left @ self.gram * left).sum() / self.count)


def merge(module: nn.Module) -> nn.Module:
    """One ordinary convolution equal to a Patch with implants: the 1x1 kernels sit at the centre of zeros.

    Raises HapError for a Patch that is not of convolutions. Merging gives up the implants' saving.
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
