"""The rows and slots that a plan leaves in each module, and functions that remove the others or replace a module."""

from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from hap.plan import Fate, Plan, by_row, dropped
from hap.structure.groups import Gone, Groups, components
from hap.surgery.patch import Patch

Layer = TypeVar("Layer", bound=nn.Module)


class Cut(NamedTuple):
    """The rows and slots of one module after pruning, as indices and masks over its own rows and slots."""

    kept: Int[Tensor, "kept"]  # rows computed as before
    implanted: Int[Tensor, "implanted"]
    written: Bool[Tensor, "rows"]  # rows in its output, computed or zero
    slots: Int[Tensor, "slots_kept"]
    given: Bool[Tensor, "slots"]  # slots in its input, read or not


def gone(groups: Groups, plan: Plan) -> tuple[Gone, Tensor]:
    """The rows and slots that a plan removes, and a mask of the rows that implants compute."""
    fates = plan.fates(groups)
    away = groups.gone(dropped(groups, fates, plan.rank))
    able = torch.cat([torch.full((s.rows,), s.implantable) for s in groups.shapes.values()])
    return away, (by_row(groups, fates) == Fate.IMPLANT) & able & ~away.rows


def cuts(groups: Groups, plan: Plan) -> dict[str, Cut]:
    """Module name -> Cut, for the modules that a plan changes.

    Rows and slots of the same channel of some tensor stay in it as long as one of them is not removed.
    """
    away, implanted = gone(groups, plan)
    n = len(away.rows)
    wire = components(n + len(away.slots), groups.feeds.edges[0], groups.feeds.edges[1] + n)
    alive = torch.zeros(n + len(away.slots), dtype=torch.bool)
    alive[wire[~torch.cat([away.rows, away.slots])]] = True
    alive[wire[n:][groups.feeds.padded_slots]] = True
    there = alive[wire]
    found = {}
    for name, s in groups.shapes.items():
        rows, slots = s.rows_at, s.slots_at
        kept = (~away.rows[rows] & ~implanted[rows]).nonzero()[:, 0]
        read = (~away.slots[slots]).nonzero()[:, 0]
        cut = Cut(kept, implanted[rows].nonzero()[:, 0], there[:n][rows], read, there[n:][slots])
        if len(kept) < s.rows or len(cut.slots) < s.slots:
            found[name] = cut
    return found


def resize(module: Layer, rows: Tensor, slots: Tensor) -> Layer:
    """Keep only these rows and slots of a convolution, linear or channelwise layer, in place, in its memory format."""
    for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if value.dim() == 0:
            continue  # num_batches_tracked
        cut = value.detach().index_select(0, rows.to(value.device))
        if value.dim() > 1 and getattr(module, "groups", 1) == 1:
            cut = cut.index_select(1, slots.to(value.device))
        if value.dim() == 4 and not value.is_contiguous():
            cut = cut.contiguous(memory_format=torch.channels_last)
        trained = isinstance(value, nn.Parameter)
        setattr(module, name, nn.Parameter(cut, requires_grad=value.requires_grad) if trained else cut)
    if isinstance(module, _ConvNd):  # a grouped convolution loses whole groups
        module.groups = max(1, len(slots) * module.groups // module.in_channels)
    wide = {
        "out_features": rows,
        "out_channels": rows,
        "num_features": rows,
        "in_features": slots,
        "in_channels": slots,
    }
    for name in wide.keys() & vars(module).keys():
        setattr(module, name, len(wide[name]))
    return module


def norm_behind(
    small: nn.Module, groups: Groups, cuts: dict[str, Cut], name: str, rows: Tensor
) -> tuple[_BatchNorm | _InstanceNorm, Int[Tensor, "rows"]] | None:
    """The normalisation with fixed statistics in `small` that alone reads these rows, and its slots; else None."""
    norm_name, slots = groups.norm_behind(name, rows)
    norm = small.get_submodule(norm_name)
    norm = norm.parts[0] if isinstance(norm, Patch) else norm
    if not isinstance(norm, _BatchNorm | _InstanceNorm) or norm.running_mean is None:
        return None
    # it may have been resized already: modules are not listed in the order of the data
    if norm_name in cuts and norm.num_features == len(cuts[norm_name].kept):
        slots = torch.searchsorted(cuts[norm_name].kept, slots)
    return norm, slots


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace the module `old` by `new` under all of its names in the model, in place."""
    for name in [name for name, module in model.named_modules(remove_duplicate=False) if module is old]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
