"""Implants that stand in for heads: a map beside the layers, position by position, from what a head reads on.

As a pointwise convolution drops the neighbourhood of a pixel, so it drops attention, the view of other tokens.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hap import HapError
from hap.hessian.hooks import tracked
from hap.plan import Fate, Plan
from hap.structure.bypass import Borrower, Lender, Relay
from hap.structure.groups import Groups
from hap.structure.heads import Around, around
from hap.structure.layers import Call, batched

Pair = tuple[Float[Tensor, "positions slots"], Float[Tensor, "positions columns"]]


@dataclass(frozen=True)
class Passing:
    """What an implant of heads may look at: the dense model over the calibration batches.

    Only positions that the output depends on: no padding, and of a last layer just what is pooled.
    """

    batches: Callable[[], Iterator[Pair]]  # what the heads read, and what the layer behind them reads
    slots: int  # how many numbers a head reads
    rank: int  # that the plan has counted, of each head
    constant: bool  # whether a bias costs nothing, for the layer behind has one


def bridge(
    small: nn.Module, model: nn.Module, groups: Groups, plan: Plan, implant: Any, batches: Iterable[Any], call: Call
) -> None:
    """Puts an implant for the heads of each layer that the plan implants into `small`, in place."""
    layers = defaultdict[Around, list[int]](list)
    for head in (plan.fates(groups) == Fate.IMPLANT).nonzero()[:, 0].tolist():
        layers[around(groups, head)].append(head)
    seen = _seen(model, list(layers), batches, call) if layers else {}
    for between, members in layers.items():
        assert groups.slot_group is not None
        reader, shape = model.get_submodule(between.reader), groups.shapes[between.reader]
        columns = torch.isin(groups.slot_group[shape.slots_at], torch.tensor(members)).nonzero()[:, 0]
        rank, slots = (plan.rank or 0) * len(members), groups.shapes[between.source].slots
        passing = Passing(partial(iter, seen[between]), slots, rank, reader.bias is not None)
        made = _absorbed(small.get_submodule(between.reader), implant(reader, columns, passing))
        if any(p.numel() for p in made.parameters()):
            _insert(small, between, made.train(reader.training))


def _insert(small: nn.Module, between: Around, made: nn.Module) -> None:
    relay = Relay(between.reader)
    source, reader = small.get_submodule(between.source), small.get_submodule(between.reader)
    small.set_submodule(between.source, Lender(source, relay))
    small.set_submodule(between.reader, Borrower(reader, made, relay))


def _absorbed(reader: nn.Module, implant: nn.Module) -> nn.Module:
    """The implant without the bias of its last layer, which goes into that of the layer behind it."""
    last = list(implant.modules())[-1]
    if isinstance(last, nn.Linear) and isinstance(last.bias, Tensor) and isinstance(reader.bias, Tensor):
        with torch.no_grad():
            reader.bias.add_(last.bias.to(reader.bias))
        last.register_parameter("bias", None)
    return implant


def _seen(model: nn.Module, layers: list[Around], batches: Iterable[Any], call: Call) -> dict[Around, list[Pair]]:
    """What is read before and behind the heads, at the positions that a gradient of the output reaches."""
    found: dict[Around, list[Pair]] = {between: [] for between in layers}
    names = list(dict.fromkeys(name for between in layers for name in between))
    for batch in batches:
        outputs, reads = tracked(model, call, batch, names)
        leaves = [leaf for leaf in tree_leaves(outputs) if batched(leaf) and leaf.requires_grad]
        with torch.enable_grad():  # the caller may have turned it off
            # no plain sum: that of probabilities depends on nothing
            sums = [(leaf * torch.arange(1, leaf.shape[-1] + 1).to(leaf)).sum() for leaf in leaves]
            total = torch.stack(sums).sum()
        behind = [reads[between.reader] for between in layers]
        slopes = torch.autograd.grad(total, behind, materialize_grads=True)
        for between, c, slope in zip(layers, behind, slopes, strict=True):
            x = reads[between.source].detach()
            if x.shape[:-1] != c.shape[:-1]:
                raise HapError(f"{between.reader}: as many positions as at {between.source} expected, for an implant")
            reached = (slope != 0).any(-1)
            found[between].append((x[reached], c.detach()[reached]))
    return found
