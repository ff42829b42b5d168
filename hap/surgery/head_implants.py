"""Implants that replace attention heads: a map of each position alone, from the input of a head to its effect.

As a pointwise convolution ignores the neighbours of a pixel, such an implant ignores the other tokens: no attention.
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
    """The data from which an implant of heads is computed: activations of the dense model on the calibration batches.

    Only positions that the output depends on: no padding, and in a last layer only those that are pooled.
    """

    batches: Callable[[], Iterator[Pair]]  # inputs of the heads, and of the layer behind them
    slots: int  # width of the input of the heads
    rank: int  # rank of the map for all heads of the layer together, as the plan counts it
    constant: bool  # whether a bias costs nothing, because the layer behind has one


def bridge(
    small: nn.Module, model: nn.Module, groups: Groups, plan: Plan, implant: Any, batches: Iterable[Any], call: Call
) -> None:
    """Insert into `small`, in place, one implant for all heads of a layer that the plan implants.

    `small`: the model without these heads; `model`: the dense one, in which `batches`, as `call` takes them, are run.
    """
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
        module = _absorbed(small.get_submodule(between.reader), implant(reader, columns, passing))
        if any(p.numel() for p in module.parameters()):
            _insert(small, between, module.train(reader.training))


def _insert(small: nn.Module, between: Around, implant: nn.Module) -> None:
    relay = Relay(between.reader)
    source, reader = small.get_submodule(between.source), small.get_submodule(between.reader)
    small.set_submodule(between.source, Lender(source, relay))
    small.set_submodule(between.reader, Borrower(reader, implant, relay))


def _absorbed(reader: nn.Module, implant: nn.Module) -> nn.Module:
    """The implant without the bias of its last layer, which is added to the bias of `reader` instead."""
    last = list(implant.modules())[-1]
    if isinstance(last, nn.Linear) and isinstance(last.bias, Tensor) and isinstance(reader.bias, Tensor):
        with torch.no_grad():
            reader.bias.add_(last.bias.to(reader.bias))
        last.register_parameter("bias", None)
    return implant


def _seen(model: nn.Module, layers: list[Around], batches: Iterable[Any], call: Call) -> dict[Around, list[Pair]]:
    """The inputs of the heads and of the layers behind them, at the positions that a gradient of the output reaches."""
    pairs: dict[Around, list[Pair]] = {between: [] for between in layers}
    names = list(dict.fromkeys(name for between in layers for name in between))
    for batch in batches:
        outputs, reads = tracked(model, call, batch, names)
        leaves = [leaf for leaf in tree_leaves(outputs) if batched(leaf) and leaf.requires_grad]
        with torch.enable_grad():  # the caller may have turned it off
            # not the plain sum, which is constant for probabilities
            sums = [(leaf * torch.arange(1, leaf.shape[-1] + 1).to(leaf)).sum() for leaf in leaves]
            total = torch.stack(sums).sum()
        behind = [reads[between.reader] for between in layers]
        slopes = torch.autograd.grad(total, behind, materialize_grads=True)
        for between, c, slope in zip(layers, behind, slopes, strict=True):
            x = reads[between.source].detach()
            if x.shape[:-1] != c.shape[:-1]:
                raise HapError(f"{between.reader}: as many positions as at {between.source} expected, for an implant")
            reached = (slope != 0).any(-1)
            pairs[between].append((x[reached], c.detach()[reached]))
    return pairs
