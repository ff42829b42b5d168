"""The order in which groups can be removed if other weights of their readers compensate, from second moments.

The squared error that remains when a reader W keeps only the columns s, with the best weights for them, is
tr(W S W') - tr(B' A^-1 B), with S the covariance of all columns, A = S_ss and B = S_s: W'. So no regression is
necessary, only linear algebra on one matrix for each layer.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hap import HapError
from hap.hessian.persample import is_known
from hap.structure.groups import Groups, ambiguous, components
from hap.structure.layers import Call, evaluating, first_tensor
from hap.surgery.cut import resize
from hap.surgery.moments import WIDEST, Sums

MEMORY = 2**30  # bytes of moments that are kept at once
EXACT = 128  # groups that are ordered one by one; of more, 1 in 64 of those left go at a time
SPARE = 1 / 8  # the share of forgotten columns that is carried along
How = Literal["removal", "selection"]


@dataclass
class Sweep:
    """Two matrices over the columns of a reader, from which one block of columns after another is eliminated.

    For removal, `m` is the inverse covariance and `r` the weights: r_b (m_bb)^-1 r_b' is the increase of the squared
    error without block b, when the other weights compensate [Hassibi93]. For selection, `m` is the covariance and `r`
    the weights times it: the same expression is the decrease of the squared error when block b is selected.
    """

    m: Float[Tensor, "cols cols"]
    r: Float[Tensor, "rows cols"]
    members: Int[Tensor, "blocks"]  # groups
    blocks: Int[Tensor, "blocks width"]  # their columns
    scale: float = 1.0  # the variance of the output of the reader
    reader: str = ""
    forgotten: Int[Tensor, "columns"] = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def __post_init__(self) -> None:
        """Move `forgotten` to the device of `m`."""
        self.forgotten = self.forgotten.to(self.m.device)

    def rises(self) -> Float[Tensor, "blocks"]:
        """The increase (or decrease) of the squared error by each block, as a share of the variance of the output."""
        corners = self.m[self.blocks[:, :, None], self.blocks[:, None]]
        sides = self.r[:, self.blocks].movedim(0, -1)
        return (sides * _solved(corners, sides)).sum((1, 2)) / self.scale

    def forget(self, groups: Tensor) -> None:
        """Eliminate the blocks of these groups from both matrices."""
        gone = torch.isin(self.members, groups.to(self.members.device))
        if not bool(gone.any()):
            return
        block = self.blocks[gone].flatten()
        side = self.m[:, block]
        step = _solved(self.m[block][:, block], side.T)
        self.r = self.r.addmm(self.r[:, block], step, alpha=-1)
        self.m.addmm_(side, step, alpha=-1)  # in place, for it is what is large
        self.members, self.blocks = self.members[~gone], self.blocks[~gone]
        self.forgotten = torch.cat([self.forgotten, block])
        if len(self.forgotten) > SPARE * len(self.m):
            self._compact()

    def _compact(self) -> None:
        """Drop the eliminated columns from both matrices, which makes them smaller."""
        alive = torch.ones(len(self.m), dtype=torch.bool, device=self.m.device).index_fill(0, self.forgotten, False)
        place = alive.cumsum(0) - 1
        self.m, self.r, self.blocks = self.m[alive][:, alive], self.r[:, alive], place[self.blocks]
        self.forgotten = self.forgotten[:0]


def _solved(corner: Tensor, side: Tensor) -> Tensor:
    """corner^-1 side; a small ridge keeps it solvable where columns are copies of others."""
    tiny = 1e-12 * corner.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-300)
    found: Tensor = torch.linalg.solve(corner + tiny[..., None, None] * torch.eye(corner.shape[-1]).to(corner), side)
    return found


def order(sweeps: list[Sweep], groups: list[int], how: How) -> list[int]:
    """`groups`, sorted from the first to remove to the last; the increases of all readers are added.

    With more than EXACT groups, several are removed in one step, which approximates the order of single steps.
    """
    sign, found = -1.0 if how == "selection" else 1.0, list[int]()
    place = torch.full((max(groups) + 1,), -1)
    place[torch.tensor(groups)] = torch.arange(len(groups))
    gone = torch.zeros(len(groups), dtype=torch.bool)
    while len(found) < len(groups):
        rise = torch.zeros(len(groups), dtype=torch.float64)
        for sweep in sweeps:
            rise.index_add_(0, place[sweep.members.cpu()], sweep.rises().double().cpu())
        left = len(groups) - len(found)
        next_ = (
            (sign * rise).masked_fill(gone, torch.inf).argsort(stable=True)[: max(1, left // 64) if left > EXACT else 1]
        )
        gone[next_] = True
        found += [groups[at] for at in next_.tolist()]
        for sweep in sweeps:
            sweep.forget(torch.tensor(groups)[next_])
    return found[::-1] if how == "selection" else found


def ranks(
    model: nn.Module,
    groups: Groups,
    batches: Iterable[Any],
    call: Call,
    *,
    how: How,
    ridge: float,
    memory: int = MEMORY,
    only: Bool[Tensor, "groups"] | None = None,
) -> Float[Tensor, "groups"]:
    """The place of each group in the order of its layers, 0 to be removed first; -1 where no reader can compensate.

    `batches`: inputs of the model; `only`: mask of the groups to order. Readers that share groups are treated together.
    A reader with more than WIDEST columns is treated as several, without the covariances between them.
    """
    found = torch.full((len(groups),), -1.0)
    members = {name: of for name, of in _members(groups).items() if is_known(model.get_submodule(name))}
    if only is not None:
        members = {name: torch.where((of >= 0) & only[of], of, -1) for name, of in members.items()}
        members = {name: of for name, of in members.items() if bool((of >= 0).any())}
    batches = list(batches)
    for names in _portions(model, members, memory):
        moments = _moments(model, names, batches, call)
        sweeps = [
            s
            for name in names
            for s in _sweeps(name, members[name], moments.pop(name), how, ridge, _behind(model, groups, name))
        ]
        for each in _together(sweeps, len(groups)):
            own = sorted({group for sweep in each for group in sweep.members.tolist()})
            for place, group in enumerate(order(each, own, how)):
                found[group] = place
    return found


def in_streams(groups: Groups) -> Bool[Tensor, "groups"]:
    """Mask of the groups that several layers read, or write as terms of a sum, as a residual stream; heads excluded."""
    readers, writers = (torch.zeros(len(groups), dtype=torch.long) for _ in "12")
    heads = torch.zeros(len(groups), dtype=torch.bool)
    joint = ambiguous(groups.feeds)
    for name, of in _members(groups).items():
        readers[torch.unique(of[of >= 0])] += 1
        heads[of[(of >= 0) & joint[groups.shapes[name].slots_at]]] = True
    for s in groups.shapes.values():
        if s.mixing and not s.conv_groups == s.slots > 1:  # the depthwise have no say
            of = groups.row_group[s.rows_at]
            writers[torch.unique(of[of >= 0])] += 1
    return (readers > 1) | ((writers > 1) & ~heads)


def _members(groups: Groups) -> dict[str, Int[Tensor, "slots"]]:
    """Reader -> group of each slot; -1 where several groups or none feed it, or the reader has rows of the group."""
    of, found = _slot_groups(groups), dict[str, Tensor]()
    for name, s in groups.shapes.items():
        reads, own = of[s.slots_at], groups.row_group[s.rows_at]
        reads = torch.where(torch.isin(reads, own[own >= 0]), -1, reads)
        if s.mixing and bool((reads >= 0).any()):
            found[name] = reads
    return found


def _slot_groups(groups: Groups) -> Int[Tensor, "slots"]:
    """The group that alone feeds each slot, directly or through normalisations; else -1."""
    row, slot = groups.feeds.edges
    of, alike = groups.row_group.clone(), [s for s in groups.shapes.values() if not s.mixing]
    while True:
        low, high = (torch.full((len(groups.feeds.frozen_slots),), start) for start in (len(groups), -1))
        low, high = low.scatter_reduce(0, slot, of[row], "amin"), high.scatter_reduce(0, slot, of[row], "amax")
        found = torch.where((low == high) & ~groups.feeds.frozen_slots, low, -1)
        before = of.clone()
        for s in alike:
            of[s.rows_at] = found[s.slots_at]
        if torch.equal(of, before):
            return found


def _portions(model: nn.Module, members: dict[str, Tensor], memory: int) -> Iterator[list[str]]:
    """Sets of readers that share no group with another set, as large as `memory` bytes of moments allow."""
    number = {name: i for i, name in enumerate(members)}
    shared = [(number[a], number[b]) for a in members for b in members if bool(_common(members[a], members[b]))]
    label = components(len(number), *torch.tensor(shared, dtype=torch.long).T) if shared else torch.empty(0)
    portion, size = list[str](), 0
    for root in sorted(set(label.tolist())):
        names = [name for name, i in number.items() if label[i] == root]
        need = sum(24 * min(_columns(model, name), WIDEST) * _columns(model, name) for name in names)
        if portion and size + need > memory:
            yield portion
            portion, size = [], 0
        portion, size = portion + names, size + need
    if portion:
        yield portion


def _common(a: Tensor, b: Tensor) -> Tensor:
    return torch.isin(a[a >= 0], b[b >= 0]).any()


def _columns(model: nn.Module, name: str) -> int:
    return int(model.get_submodule(name).get_parameter("weight")[0].numel())


@torch.no_grad()
def _moments(model: nn.Module, names: list[str], batches: list[Any], call: Call) -> dict[str, list[Sums]]:
    """The sums of each reader's inputs in the dense model; several parts for a reader that is too wide."""
    found, handles = dict[str, list[Sums]](), []
    for name in names:
        module = model.get_submodule(name)
        found[name] = [Sums(part, len(batches)) for part in _parts(module)]

        def read(module: nn.Module, args: Any, kwargs: Any, sums: list[Sums]) -> None:
            x, at = first_tensor(args, kwargs), 0
            for each in sums:
                width = each.module.get_parameter("weight").shape[1] * getattr(module, "groups", 1)
                axis = -1 if isinstance(module, nn.Linear) else 1
                each.add(x.narrow(axis, at, width), None)
                at += width

        handles.append(
            module.register_forward_pre_hook(
                lambda m, args, kwargs, sums=found[name], read=read: read(m, args, kwargs, sums), with_kwargs=True
            )
        )
    try:
        with evaluating(model):
            for batch in batches:
                call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not batches:
        raise HapError("calibration batches expected, found none")
    return found


def _parts(module: nn.Module) -> list[nn.Module]:
    """The layer; or, if it is too wide, several layers that share its inputs between them."""
    weight = module.get_parameter("weight")
    if weight[0].numel() <= WIDEST or getattr(module, "groups", 1) > 1:
        return [module]
    pieces = torch.arange(weight.shape[1]).tensor_split(-(-weight[0].numel() // WIDEST))
    return [resize(copy.deepcopy(module), torch.arange(len(weight)), piece) for piece in pieces]


def _behind(model: nn.Module, groups: Groups, name: str) -> Float[Tensor, "rows"]:
    """The factor of a BatchNorm directly behind a layer for each row, and so for its errors; 1 without one."""
    rows = groups.shapes[name].rows
    norm = model.get_submodule(groups.norm_behind(name, torch.arange(rows))[0])
    if not isinstance(norm, _BatchNorm) or norm.running_var is None:
        return torch.ones(rows)
    return (norm.running_var + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight.detach())


def _sweeps(name: str, of: Tensor, sums: list[Sums], how: How, ridge: float, behind: Tensor) -> list[Sweep]:
    """The sweeps of a reader: one for each group of a grouped convolution and each part of one that is too wide."""
    at, found, whole = 0, list[Sweep](), 0.0
    for each in sums:
        moments, weight = each.result(), each.module.get_parameter("weight").detach()
        ridged = moments.ridged(ridge)
        rows = weight.reshape(len(ridged), -1, ridged.shape[-1]).to(ridged)
        rows = rows * behind.to(rows).reshape(len(ridged), -1, 1)
        for s, w in zip(ridged, rows, strict=True):
            slots = of[at : (at := at + weight.shape[1])]
            whole += float(((w @ s) * w).sum())
            m, side = (torch.cholesky_inverse(torch.linalg.cholesky(s)), w) if how == "removal" else (s, w @ s)
            columns = torch.arange(len(s), device=s.device).reshape(weight.shape[1], -1)
            found += _bundled(name, m, side, slots, columns)
    return [replace(sweep, scale=max(whole, 1e-300)) for sweep in found]


def _bundled(name: str, m: Tensor, side: Tensor, slots: Tensor, columns: Tensor) -> Iterator[Sweep]:
    """One sweep, if any slot is in a group; HapError where groups have unequal numbers of columns."""
    own = {
        int(group): columns[(slots == group).to(columns.device)].flatten() for group in torch.unique(slots[slots >= 0])
    }
    widths = {len(each) for each in own.values()}
    if len(widths) > 1:
        raise HapError(f"groups with as many columns each expected in a reader, found {sorted(widths)}")
    if own:
        yield Sweep(m, side, torch.tensor(list(own), device=m.device), torch.stack(list(own.values())), reader=name)


def _together(sweeps: list[Sweep], groups: int) -> Iterator[list[Sweep]]:
    """Sets of sweeps that share groups or a reader."""
    names = list(dict.fromkeys(sweep.reader for sweep in sweeps))
    nodes = [torch.full((len(s.members),), groups + names.index(s.reader)) for s in sweeps]
    label = components(groups + len(names), torch.cat([s.members.cpu() for s in sweeps]), torch.cat(nodes))
    roots = [int(label[s.members[0].cpu()]) for s in sweeps]
    for root in sorted(set(roots)):
        yield [sweep for sweep, each in zip(sweeps, roots, strict=True) if each == root]
