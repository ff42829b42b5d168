"""A model prepared for derivatives: in eval mode, with gradients for the named parameters only, and hooks on layers."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from hap import HapError
from hap.hessian.losses import Batches, Loss
from hap.hessian.persample import even
from hap.structure.kernels import sound
from hap.structure.layers import Call, evaluating, first_tensor, is_mixing, refuse_hidden, uncompiled, weight_of


class Seen(NamedTuple):
    """Input and output of a layer in one forward pass."""

    x: Tensor
    y: Tensor  # on the device "meta": shape and dtype, no numbers
    edge: GradientEdge  # of the output, in the graph of autograd


@contextmanager
def measuring(model: nn.Module, names: Sequence[str] | None = None) -> Iterator[dict[str, nn.Parameter]]:
    """Inside the block, only the named parameters, which it yields, require gradients, and the model is in eval mode.

    Default: the weights of all convolutions and linear layers. HapError where there are none, and for parameters that
    are computed from others, were made under torch.inference_mode, or are not finite.
    """
    if names is None:
        names = [weight_of(name) for name, module in model.named_modules() if is_mixing(module)]
        if not names:
            refuse_without_layers(model)
    for name in names:
        layer, _, own = name.rpartition(".")
        if not isinstance(model.get_submodule(layer)._parameters.get(own), nn.Parameter):
            raise HapError(f"curvature: the {own} of {layer} is computed from others; make it a parameter first")
    if inference := [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_inference()]:
        raise HapError(f"curvature: {inference[0]} was made under torch.inference_mode, so pass copy.deepcopy(model)")
    refuse_unfinite("curvature", dict(model.named_parameters()))
    wanted = {name: model.get_parameter(name) for name in names}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(any(p is parameter for parameter in wanted.values()))
        with torch.enable_grad(), uncompiled(model), evaluating(model), _affine(model), sound(model):
            yield wanted
    finally:
        for p, needed in flags:
            p.requires_grad_(needed)


def refuse_without_layers(model: nn.Module) -> NoReturn:
    """HapError for a model without a mixing layer; with advice where a module hides its layers."""
    for name, module in model.named_modules():
        refuse_hidden(name, module)
    raise HapError(f"curvature: {type(model).__name__} has no convolution and no linear layer")


def refuse_unfinite(who: str, values: Mapping[str, Tensor]) -> None:
    """HapError with the name of the first of these tensors that holds NaN or infinity; it waits for the device once."""
    known = {name: t.detach() for name, t in values.items() if t.is_floating_point()}
    flags = [t.isfinite().all() for t in known.values()]
    if not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all()):
        return
    name = next(name for name, flag in zip(known, flags, strict=True) if not flag)
    wrong = int((~known[name].isfinite()).sum())
    raise HapError(f"{who}: finite numbers expected, found {wrong} of {known[name].numel()} in {name} that are not")


def refuse_unfinite_diagonal(who: str, model: nn.Module, diagonal: Mapping[str, Tensor]) -> None:
    """HapError where a diagonal is not finite, with the name of a buffer that holds NaN, if one does."""
    try:
        refuse_unfinite(f"{who}, diagonal", diagonal)
    except HapError as error:
        spoilt = [name for name, t in model.named_buffers() if t.is_floating_point() and bool(t.isnan().any())]
        look = "see whether inputs and outputs are finite and all targets classes"
        cause = f"the buffer {spoilt[0]} holds NaN" if spoilt else look
        raise HapError(f"{error}; {cause}") from None


def see(
    model: nn.Module, loss: Loss, inputs: Any, layers: Mapping[str, nn.Module], sink: Callable[[str, Tensor], None]
) -> tuple[Tensor, dict[str, Seen]]:
    """The outputs of the model, and input and output of each layer by name; HapError where a layer is called twice.

    In a backward pass, sink(name, gradient) gets the gradient of each layer's output.
    """
    seen: dict[str, Seen] = {}

    def keep(name: str, _: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
        if name in seen:
            raise HapError(f"curvature: {name} is called twice in one pass; per-sample gradients of shared weights mix")
        seen[name] = Seen(first_tensor(args, kwargs).detach(), y.detach().to("meta"), get_gradient_edge(y))
        y.register_hook(partial(sink, name))  # type: ignore[no-untyped-call]  # here, before an op in place puts its own gradient there

    handles = [m.register_forward_hook(partial(keep, name), with_kwargs=True) for name, m in layers.items()]
    try:
        return loss.call(model, inputs), seen
    finally:
        for handle in handles:
            handle.remove()


def tracked(model: nn.Module, call: Call, inputs: Any, layers: Collection[str]) -> tuple[Any, dict[str, Tensor]]:
    """The outputs of the model, and by name the inputs of `layers`, which are in the graph of autograd.

    No parameter requires a gradient in this pass. HapError where a layer is called twice.
    """
    reads: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if name in reads:
            raise HapError(f"{name} is called twice in one pass, so what it reads is not one tensor")
        x = first_tensor(args, kwargs)
        # an input that depends on an earlier layer stays in the graph, so that gradients reach that layer
        reads[name] = x if x.requires_grad else x.detach().requires_grad_()
        return (reads[name],), {}

    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(keep, name), with_kwargs=True) for name in layers
    ]
    try:
        with measuring(model, ()):
            return call(model, inputs), reads
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def counting(model: nn.Module) -> Iterator[dict[int, int]]:
    """Yields {address: bytes} of the memory that autograd saves inside the block, without the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if (place := t.untyped_storage().data_ptr()) not in own:
            held[place] = t.untyped_storage().nbytes()
        return t.detach()  # an op that saves its own output would be a cycle that Python cannot free

    with saved_tensors_hooks(pack, lambda t: t):
        yield held


def chunks(batches: Batches, size: int) -> Iterator[tuple[Any, Tensor]]:
    """The batches in nearly equal parts of at most `size` samples; 4-dimensional inputs become channels_last."""
    for inputs, targets in batches:
        step = even(len(targets), size)
        for first in range(0, len(targets), step):
            part = slice(first, first + step)
            yield tree_map(partial(_cut, part), inputs), targets[part]


def ordinary(inputs: Any) -> Any:
    """The inputs, with copies of tensors made under torch.inference_mode, which autograd does not accept."""
    return tree_map(lambda t: t.clone() if isinstance(t, Tensor) and t.is_inference() else t, inputs)


def _cut(part: slice, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    cut = ordinary(value)[part]
    return cut.contiguous(memory_format=torch.channels_last) if cut.dim() == 4 else cut


@contextmanager
def _affine(model: nn.Module) -> Iterator[None]:
    """Inside the block, BatchNorm with fixed statistics is one multiplication, whose derivatives cost much less."""
    swapped = [module for module in model.modules() if _is_affine(module)]
    try:
        for module in swapped:
            module.forward = _scaled(module)
        yield
    finally:
        for module in swapped:
            del module.forward


def _is_affine(module: nn.Module) -> bool:
    own = (nn.BatchNorm1d.forward, nn.BatchNorm2d.forward, nn.BatchNorm3d.forward)
    known = isinstance(module, _BatchNorm) and type(module).forward in own and "forward" not in vars(module)
    return known and module.running_mean is not None and not any(p.requires_grad for p in module.parameters())


def _scaled(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """The forward of a BatchNorm in eval mode, (x - mean) / sqrt(var + eps) * weight + bias."""
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (norm.running_mean, norm.running_var))
    scale = torch.rsqrt(var + norm.eps) * (1.0 if norm.weight is None else norm.weight.detach().to(mean))
    shift = -mean * scale if norm.bias is None else norm.bias.detach().to(mean) - mean * scale
    dtype = norm.running_mean.dtype

    def forward(x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2))
        return torch.addcmul(shift.to(dtype).view(shape), x, scale.to(dtype).view(shape))

    return forward
