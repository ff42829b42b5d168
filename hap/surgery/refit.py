"""New weights, by an update, for each layer of the pruned model whose input differs from that in the dense model.

Layers are treated in the order of the forward pass. The wanted output of a layer is that of the dense model; where a
tensor is added to the output, as in a residual branch, the wanted sum is that of the dense model, since the other term
may already differ. Only sums of the output, or of that of a BatchNorm directly behind it, are recognised.

All batches run through both models and pause at a layer until it has its new weights. As many paused passes are kept as
`memory` bytes allow; the others start again for each layer. So a model whose modules keep tensors between calls needs
memory=0; else one batch would read tensors of another.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hap import HapError
from hap.hessian.losses import Loss
from hap.hessian.outputs import output_curvature
from hap.hessian.persample import is_known
from hap.structure.bypass import Borrower, Lender
from hap.structure.groups import Groups
from hap.structure.layers import Call, axis, widths
from hap.surgery.cut import Cut, norm_behind, resize
from hap.surgery.lockstep import Lockstep, Seen, Stop, Watched, stops
from hap.surgery.moments import WIDEST, Moments, Sums
from hap.surgery.patch import Patch

Update = Callable[..., tuple[Tensor, Tensor]]  # (reader, kept, moments), with or without `weighted`; see hap.updates
MEMORY = 2**30  # bytes of paused passes
TINY = 1e-3  # rows that a BatchNorm scales by less than this share of its largest scale correct no sum


class Part(NamedTuple):
    """A convolution or linear layer, alone or in a Patch, and the rows of the dense layer that it computes."""

    layer: nn.Module
    rows: Int[Tensor, "rows"]


def refit(
    small: nn.Module,
    model: nn.Module,
    groups: Groups,
    cuts: Mapping[str, Cut],
    update: Update,
    batches: Sequence[Any],
    call: Call,
    *,
    loss: Loss | None = None,
    memory: int = MEMORY,
) -> None:
    """Give new weights, in place, to the layers of `small` whose input differs from that in the dense `model`.

    `cuts`: of the plan; `batches`: calibration inputs; `loss`: for updates with `weighted`; `memory`: bytes of paused
    passes. HapError without batches, without a loss where it is needed, and where new weights are not finite.
    """
    if not batches:
        raise HapError("update: calibration batches expected, found none; pass batches= to apply()")
    norms = {name: _norm(model, groups, name) for name in _readers(small, model, groups)}
    dense, pruned = (Watched(each, norms, call) for each in (model, small))
    with dense(), pruned():
        where, live = stops(dense, pruned, batches[0])
    if not where:
        return
    joins = frozenset(name for kind, name in where if kind == "added")
    norms = {name: norms[name] for _, name in where}
    dense, pruned = (Watched(each, norms, call, joins) for each in (model, small))
    weights = _weights(model, loss, batches, list(norms)) if _asks(update, "weighted") else None
    step = Lockstep(dense, pruned, batches, memory // max(1, live))
    with dense(), pruned():
        try:
            for stop in where:
                _Reader(small, model, groups, cuts, norms, stop).renew(update, step, weights)
        finally:
            step.end()


def _readers(small: nn.Module, model: nn.Module, groups: Groups) -> Iterator[str]:
    """Names of the layers that an update can treat: of known classes, with at least one row and one slot."""
    for name, s in groups.shapes.items():
        if s.mixing and is_known(model.get_submodule(name)) and 0 not in widths(_inner(small.get_submodule(name))):
            yield name


def _norm(model: nn.Module, groups: Groups, name: str) -> str:
    """The BatchNorm with fixed statistics that alone reads the unchanged output of the layer; "" for none."""
    norm, _ = groups.norm_behind(name, torch.arange(groups.shapes[name].rows))
    fixed = norm and isinstance(each := model.get_submodule(norm), _BatchNorm) and each.running_var is not None
    return norm if fixed else ""


def _inner(module: nn.Module) -> nn.Module:
    """The layer inside Lender, Borrower and Patch; in a Patch the first part."""
    while isinstance(module, Lender | Borrower | Patch):
        module = module.parts[0] if isinstance(module, Patch) else module.layer
    return module


def _asks(update: Update, name: str) -> bool:
    return name in inspect.signature(update).parameters


def _weights(
    model: nn.Module, loss: Loss | None, batches: Sequence[Any], names: Sequence[str]
) -> list[dict[str, Tensor]]:
    """For each batch: layer -> curvature of the loss at each position of its output in the dense model."""
    if loss is None:
        raise HapError("update: a loss expected, for it weighs positions by curvature; pass loss= to apply()")
    rng = torch.Generator().manual_seed(0)
    return [output_curvature(model, loss, batch, names, rng) for batch in batches]


@dataclass(frozen=True)
class _Reader:
    """One layer, and the stop at which it gets its new weights."""

    small: nn.Module
    model: nn.Module
    groups: Groups
    cuts: Mapping[str, Cut]
    norms: Mapping[str, str]
    stop: Stop

    @property
    def name(self) -> str:
        """Name of the layer."""
        return self.stop[1]

    def renew(self, update: Update, step: Lockstep, weights: Sequence[Mapping[str, Tensor]] | None) -> None:
        """Give all parts of the layer new weights, in blocks of inputs where it has more than WIDEST columns."""
        parts = [part for part in self.parts() if is_known(part.layer)]
        blocks = self.blocks(parts[0].layer)
        if len(blocks) > 1:
            wide = parts[0].layer.get_parameter("weight")[0].numel()
            warnings.warn(f"update: {self.name}: its {wide} columns are solved in {len(blocks)} blocks", stacklevel=4)
        for block in blocks:
            pieces = [_Piece(part, block, len(step.batches)) for part in parts]
            for number, dense, small in step.visit(self.stop):
                x = self.read(small.x)
                wanted = self.wanted(dense, small)
                for piece in pieces:
                    piece.add(x, wanted, None if weights is None else weights[number][self.name])
            for piece in pieces:
                self.give(piece, update)

    def parts(self) -> list[Part]:
        """The modules that compute rows of the layer, with these rows."""
        module, cut = self.small.get_submodule(self.name), self.cuts.get(self.name)
        while isinstance(module, Lender | Borrower):
            module = module.layer
        if cut is None:
            return [Part(module, torch.arange(self.groups.shapes[self.name].rows))]
        layers = list(module.parts) if isinstance(module, Patch) else [module]
        return [Part(*pair) for pair in zip(layers, [r for r in cut[:2] if len(r)], strict=True)]

    def blocks(self, layer: nn.Module) -> list[Tensor]:
        """The sets of inputs whose weights are solved for together."""
        weight = layer.get_parameter("weight")
        slots = torch.arange(weight.shape[1] * getattr(layer, "groups", 1), device=weight.device)
        if weight[0].numel() <= WIDEST or getattr(layer, "groups", 1) > 1:
            return [slots]
        return list(slots.tensor_split(-(-weight[0].numel() // WIDEST)))

    def read(self, x: Tensor) -> Tensor:
        """The input of the parts, from that of the layer."""
        module = self.small.get_submodule(self.name)
        while isinstance(module, Lender | Borrower):
            module = module.layer
        if isinstance(module, Patch) and len(module.take) < module.given:
            return x.index_select(module.axis, module.take)
        return x

    def wanted(self, dense: Seen, small: Seen) -> Tensor:
        """The wanted output, with all rows of the dense layer; rows in the output are corrected for a sum."""
        module, y = self.small.get_submodule(self.name), dense.y
        at = axis(self.model.get_submodule(self.name))
        rows = torch.arange(y.shape[at], device=y.device)
        cut = self.cuts.get(self.norms[self.name] or self.name)
        if dense.other is not None and small.other is not None:
            rows = rows if cut is None else cut.written.nonzero()[:, 0].to(y.device)
            gap = torch.zeros_like(y).index_copy(at, rows, dense.other.index_select(at, rows) - small.other)
            y = y + gap * self.unscale(y, at)
        if isinstance(module, Borrower) and small.lent is not None:
            y = y - module.implant(small.lent)
        return y

    def unscale(self, like: Tensor, at: int) -> Tensor:
        """The factor from a term of a sum to the output of the layer: 1 / scale of the BatchNorm between; 0 if tiny."""
        shape = [1] * like.dim()
        shape[at] = like.shape[at]
        if not self.norms[self.name]:
            return like.new_ones(shape)
        norm = self.model.get_submodule(self.norms[self.name])
        assert isinstance(norm, _BatchNorm)
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight.detach())
        small = scale.abs() <= TINY * scale.abs().max()
        return torch.where(small, 0.0, 1 / scale.masked_fill(small, 1.0)).reshape(shape).to(like)

    @torch.no_grad()
    def give(self, piece: "_Piece", update: Update) -> None:
        """Write the update of a piece into the layer; the bias into the BatchNorm where the layer has none."""
        layer, rows = piece.part
        weight, bias = piece.updated(update, None if self.name not in self.cuts else self.cuts[self.name].slots)
        if not bool(weight.isfinite().all() and bias.isfinite().all()):
            raise HapError(f"update: {self.name}: finite weights expected, found some that are not")
        if weight.shape == layer.get_parameter("weight").shape:
            layer.get_parameter("weight").copy_(weight)
        else:
            layer.get_parameter("weight")[:, piece.slots] = weight
        found = norm_behind(self.small, self.groups, dict(self.cuts), self.name, rows)
        if isinstance(layer.bias, Tensor):
            layer.bias.copy_(bias)
        elif found is not None and self.norms[self.name]:
            norm, slots = found
            dense = self.model.get_submodule(self.norms[self.name]).get_buffer("running_mean")
            norm.get_buffer("running_mean")[slots] = dense[rows] - bias
        else:
            needed = layer.get_parameter("weight").requires_grad
            layer.bias = nn.Parameter(bias.clone(), requires_grad=needed)


class _Piece:
    """A block of inputs of a part, as a smaller layer, and their moments."""

    def __init__(self, part: Part, slots: Tensor, batches: int) -> None:
        self.part, self.slots = part, slots
        self.whole = len(slots) == part.layer.get_parameter("weight").shape[1] * getattr(part.layer, "groups", 1)
        every = torch.arange(len(part.layer.get_parameter("weight")))
        self.layer = part.layer if self.whole else resize(copy.deepcopy(part.layer), every, slots)
        self.plain, self.weighted = (Sums(self.layer, batches) for _ in "12")

    def add(self, x: Tensor, wanted: Tensor, weights: Tensor | None) -> None:
        """Add a batch; the contribution of the other inputs is subtracted from the wanted output."""
        at = axis(self.layer)
        y = wanted.index_select(at, self.part.rows.to(wanted.device))
        if not self.whole:
            mine = x.index_select(at, self.slots)
            y, x = y - self.part.layer.forward(x) + self.layer.forward(mine), mine
        self.plain.add(x, y)
        if weights is not None:
            self.weighted.add(x, y, weights)

    def updated(self, update: Update, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """The new weight and bias from the update."""
        slots = self.slots if kept is None else kept[self.slots.to(kept.device)]
        if not self.layer.get_parameter("weight").numel():
            return self.layer.get_parameter("weight"), self.plain.result().y.flatten()
        given: dict[str, Moments] = {"weighted": self.weighted.result()} if _asks(update, "weighted") else {}
        return update(self.layer, slots, self.plain.result(), **given)
