"""The diagonal of the loss Hessian in closed form, parameter by parameter, without probes.

For a loss whose Hessian in the outputs f is sum_c s_c s_c^T, the generalised Gauss-Newton matrix has the diagonal
sum_c (d (s_c . f) / dw)^2 [Schraudolph02]: one backward pass for each column s_c, and the square of the gradient of
each sample. Where the network is piecewise linear in each single weight, this *is* the diagonal of the Hessian. This
file knows layers and losses; of groups it knows only how to sum over them.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hap import HapError
from hap.hessian.accumulate import Curvature, Tally, join
from hap.hessian.hooks import Seen, chunks, counting, measuring, refuse_unfinite_diagonal, refuse_without_layers, see
from hap.hessian.hutchinson import hutchinson
from hap.hessian.linearity import piecewise_linear, refuse_shared, sources
from hap.hessian.losses import Batches, Loss, refuse_loss
from hap.hessian.persample import Per, is_known, positions, squared_gradients
from hap.structure.groups import Groups
from hap.structure.layers import is_mixing, name_of

KNOWN = "nn.Linear, nn.Conv1d, nn.Conv2d, BatchNorm and nn.LayerNorm"
MEMORY = {"cpu": 2**29}  # bytes per pass: more would slow a CPU down, for most of it lies far from the cache
MEMORY_ELSEWHERE = 2**31


@torch.inference_mode(mode=False)
def exact(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    groups: Groups | None = None,
    *,
    columns: int | None = None,
    share: float | None = None,
    rng: torch.Generator | None = None,
    of: Literal["weights", "parameters"] | Sequence[str] = "weights",
    per: Per = "weight",
    unknown: int | None = None,
    autocast: torch.dtype | None = None,
    memory: int | None = None,
) -> Curvature:
    """The diagonal of the Hessian of the mean loss over `batches`, pairs of inputs and targets, without probes.

    Where the model is not piecewise linear in each weight, it is the Gauss-Newton diagonal; `kind` says which it is.
    `columns`: None for the whole sum over classes; k for the k likeliest classes of each sample, and one class drawn
    from the rest with `rng`. `share`, instead of `columns`: as many columns as leave about this share of the trace, 0
    to 1, to the draw; a warning where more is drawn. `of`: "weights" of convolutions and linear layers; "parameters"
    also biases, and scale and shift of BatchNorm and LayerNorm; or parameter names. `per`: "row" for the sum over each
    row, which is cheaper, and enough for groups without columns. `unknown`: the number of probes of `hutchinson` for
    modules that this file does not know, which else are refused. `autocast`: dtype of the passes; sums have at least
    float32. `memory`: bytes of one pass, which gives its number of samples. The model runs in eval mode and is restored
    afterwards. HapError where an option, the loss, a layer or a number (NaN) does not allow the computation.

    >>> model, x = nn.Linear(2, 2, bias=False), torch.tensor([[1.0, 2.0]])
    >>> _ = nn.init.zeros_(model.weight)  # so that both classes have the probability p = 1/2
    >>> curvature = exact(model, CrossEntropy(), [(x, torch.tensor([0]))])
    >>> curvature.diagonal["weight"].round(decimals=3).tolist()  # p (1 - p) x^2
    [[0.25, 1.0], [0.25, 1.0]]
    """
    _check(columns, share, rng, memory)
    refuse_loss(loss, "exact", "call", "mass", "columns")
    if per == "row" and groups is not None and groups.slot_group is not None:
        raise HapError("exact: per='weight' expected for groups that have columns, found 'row'")
    layers, strange = _sort(model, of, unknown)
    if strange and rng is None:
        raise HapError(f"exact: a generator expected for the probes of {strange[0]}, found None")
    if strange and not isinstance(batches, Sequence):
        batches = list(batches)  # iterated twice, here and by hutchinson()
    tally, size = Tally(groups), 0
    with measuring(model, [name_of(layer, own) for layer, names in layers.items() for own in names]) as params:
        device = next(iter(params.values())).device
        # without its cache of casts, which would hide that a weight is used twice
        passes = partial(torch.autocast, device.type, autocast, autocast is not None, cache_enabled=False)
        way = _Way(model, loss, layers, columns, share, rng, per, passes)
        for batch in batches:
            size = size or way.fitting(batch, memory or MEMORY.get(device.type, MEMORY_ELSEWHERE))
            for inputs, targets in chunks([batch], size):
                way.add(tally, params, inputs, targets)
    known = tally.result()
    refuse_unfinite_diagonal("exact", model, known.diagonal)
    if share is not None and known.drawn > share:
        warnings.warn(f"exact: {known.drawn:.3g} of the trace was drawn, not {share:g}; give columns", stacklevel=2)
    if unknown is None or rng is None or not strange:
        return known
    return join(known, hutchinson(model, loss, batches, groups, probes=unknown, rng=rng, names=strange), per)


@dataclass(frozen=True)
class _Way:
    """The options of `exact` that hold for every chunk of samples, and memory that chunks share."""

    model: nn.Module
    loss: Loss
    layers: dict[str, list[str]]  # module name -> which of its own parameters
    columns: int | None
    share: float | None
    rng: torch.Generator | None
    per: Per
    passes: Callable[[], AbstractContextManager[Any]]  # the context of forward passes
    # reused by all chunks, because to allocate memory costs more than the arithmetic in it
    buffers: dict[str, Tensor] = field(default_factory=dict)  # gradients of outputs: [batch, columns, rows, positions]
    scratch: dict[str, Tensor] = field(default_factory=dict)

    def see(self, inputs: Any, sink: Callable[[str, Tensor], None]) -> tuple[Tensor, dict[str, Seen]]:
        """One forward pass; see `hap.hessian.hooks.see`."""
        modules = {name: self.model.get_submodule(name) for name in self.layers}
        with self.passes():
            return see(self.model, self.loss, inputs, modules, sink)

    def fitting(self, batch: Any, memory: int) -> int:
        """How many samples fit into `memory` bytes: what autograd saves, and the gradients of all columns."""
        one, _ = next(chunks([batch], 1))
        with counting(self.model) as saved:
            outputs, seen = self.see(one, lambda *_: None)
        count = outputs.shape[-1] if self.columns is None else min(self.columns + 1, outputs.shape[-1])
        return max(1, memory // (sum(saved.values()) + count * sum(layer.y.nbytes for layer in seen.values())))

    def add(self, tally: Tally, params: Mapping[str, nn.Parameter], inputs: Any, targets: Tensor) -> None:
        """Add the squared gradients of one chunk to `tally`."""
        column, written = 0, set[str]()

        def sink(name: str, grad: Tensor) -> None:
            written.add(name)
            self.buffers[name][: len(grad), column] = positions(self.model.get_submodule(name), grad)

        outputs, seen = self.see(inputs, sink)
        refuse_shared(outputs, params)
        k = self.columns if self.share is None else self.loss.enough(outputs, targets, self.share)
        vectors, drawn = self.loss.columns(outputs.detach(), targets, k, self.rng)
        tally.begin(outputs, self.loss.mass(targets), len(vectors), piecewise_linear(outputs))
        self.make_room(seen, len(targets), len(vectors))
        edges = [layer.edge for layer in seen.values()]
        last = sources(outputs, [edge.node for edge in edges])
        ends = [edge for edge in edges if edge.node in last]
        for column, vector in enumerate(vectors):
            torch.autograd.grad(outputs, ends, vector, retain_graph=column < len(vectors) - 1)
        for name in seen.keys() - written:  # no gradient reached it, so it holds those of another chunk
            self.buffers[name].zero_()
        for name, layer in seen.items():
            module, own, g = self.model.get_submodule(name), self.layers[name], self.buffers[name][: len(targets)]
            squared = squared_gradients(module, layer.x, g, own, per=self.per, drawn=drawn, scratch=self.scratch)
            for key, squares in squared.items():
                tally.add(name, name_of(name, key), squares)
        tally.end()

    def make_room(self, seen: Mapping[str, Seen], samples: int, columns: int) -> None:
        """Allocate buffers for the gradients of the layers' outputs, where those of earlier chunks do not fit."""
        for name, layer in seen.items():
            if len(layer.x) != samples:
                raise HapError(f"curvature: {name} reads {len(layer.x)} samples where the batch has {samples}")
            n, rows, places = positions(self.model.get_submodule(name), layer.y).shape
            old = self.buffers.get(name)
            if old is None or old.shape[1:] != (columns, rows, places) or len(old) < n:
                wide = torch.promote_types(layer.y.dtype, torch.float32)
                self.buffers[name] = torch.zeros(n, columns, rows, places, dtype=wide, device=layer.x.device)


def _check(columns: int | None, share: float | None, rng: torch.Generator | None, memory: int | None) -> None:
    if columns is not None and share is not None:
        raise HapError(f"exact: one of columns and share expected, found {columns} and {share}")
    if share is not None and not 0 < share < 1:
        raise HapError(f"exact: a share of the trace above 0 and below 1 expected, found {share}")
    if memory is not None and memory < 1:
        raise HapError(f"exact: a memory of at least 1 byte expected, found {memory}")


def _sort(model: nn.Module, of: str | Sequence[str], unknown: int | None) -> tuple[dict[str, list[str]], list[str]]:
    """The known layers that hold parameters `of`, each with their own names; and the parameters of unknown modules."""
    if isinstance(of, str) and of not in ("weights", "parameters"):
        raise HapError(f"exact: of 'weights', 'parameters' or a list of names expected, found {of!r}")
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    named = there if isinstance(of, str) else {*of}
    if absent := named - there:
        raise HapError(f"exact: no parameter {min(absent)} in {type(model).__name__}")
    layers, strange = dict[str, list[str]](), list[str]()
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise HapError(f"curvature: {name} takes the statistics of the batch, which couples its samples")
        own = [key for key in dict(module.named_parameters(recurse=False)) if name_of(name, key) in named]
        own = own if of != "weights" else ["weight"] if is_mixing(module) else []
        if own and is_known(module):
            layers[name] = own
        elif own and unknown is None:
            pads = getattr(module, "padding_mode", "zeros")
            why = f"is not known; {KNOWN} are" if pads == "zeros" else f"pads with {pads}; only zeros are known"
            raise HapError(f"curvature: {name} ({type(module).__name__}) {why}; unknown=PROBES leaves it to probes")
        else:
            strange += [name_of(name, key) for key in own]
    if not layers:
        refuse_without_layers(model)
    return layers, strange
