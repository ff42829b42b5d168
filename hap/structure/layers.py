"""What the package knows of modules: which are sliced and along which axis, which cannot be, how a model is called."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from traceback import walk_tb
from types import FrameType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_leaves

from hap import HapError

Call = Callable[[nn.Module, Any], Any]
BARRIERS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)  # mix the channels of a position or a group


def forward(model: nn.Module, example: Any) -> Any:
    """The output of the model; a dict is passed as keyword arguments, a tuple as positional ones."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def failure(error: Exception, model: nn.Module) -> str:
    """One line for an error message: the innermost module whose forward raised, the exception and its first line."""
    where, _ = innermost((frame for frame, _ in walk_tb(error.__traceback__)), model)
    reason = (str(error).strip().splitlines() or ["without a message"])[0]
    return f"{where}: {type(error).__name__}: {reason}"


def innermost(frames: Iterable[FrameType], model: nn.Module) -> tuple[str, FrameType | None]:
    """The last module of the model whose method runs in `frames` (outermost first), as "name (class)", and its frame.

    Where none does: the model itself and None.
    """
    names = {module: name for name, module in model.named_modules()}
    where, at = model, None
    for frame in frames:
        first = frame.f_code.co_varnames[:1]  # for a method, this is `self`
        owner = frame.f_locals.get(first[0]) if first else None
        if isinstance(owner, nn.Module) and owner in names:
            where, at = owner, frame
    return f"{names[where] or 'the model'} ({type(where).__name__})", at


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in eval mode; afterwards each module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """A context in which the parts of the model that torch.compile has compiled run as plain Python.

    This package replaces the forward methods of layers for a time, and torch would compile each replacement.
    """
    compiled = [
        m for m in model.modules() if type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None
    ]
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Inside the block attention runs as plain ops: fused kernels can drop a NaN and have no second derivative.

    The fast path of nn.TransformerEncoderLayer, which does not call its submodules, is off too.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def first_tensor(args: Any, kwargs: Any) -> Tensor:
    """The first tensor with a batch axis among the arguments of a call, positional ones first."""
    tensor: Tensor = next(leaf for leaf in tree_leaves((args, kwargs)) if batched(leaf))
    return tensor


def weight_of(name: str) -> str:
    """The parameter name of a module's weight: conv1 -> conv1.weight."""
    return name_of(name, "weight")


def name_of(layer: str, own: str) -> str:
    """The name in the model of a module's own parameter: conv1, bias -> conv1.bias."""
    return f"{layer}.{own}".removeprefix(".")  # the name of the model itself is empty


def is_mixing(module: nn.Module) -> bool:
    """Whether each output channel of the module is a weighted sum of its input channels."""
    return isinstance(module, nn.Linear | _ConvNd) and not isinstance(module, _ConvTransposeNd)


def is_channelwise(module: nn.Module) -> bool:
    """Whether the module maps each channel on its own, with weights or statistics of that channel."""
    return isinstance(module, _BatchNorm | _InstanceNorm)


def axis(module: nn.Module) -> int:
    """The axis along which a module's input has its slots and its output its rows: 1, or -1 for channels last."""
    return -1 if isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm) else 1


def widths(module: nn.Module) -> tuple[int, int]:
    """The numbers of rows and of slots of a sliced module."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, _ConvNd):
        return module.out_channels, module.in_channels
    assert isinstance(module, _BatchNorm | _InstanceNorm)
    return module.num_features, module.num_features


def positions(module: nn.Module, t: Tensor) -> Float[Tensor, "batch rows positions"]:
    """`t`, the output of a module or a tensor of its shape, with one axis of rows and one of positions."""
    if isinstance(module, nn.LayerNorm):
        return t.reshape(len(t), -1, module.weight.numel()).mT
    return t.reshape(len(t), -1, t.shape[-1]).mT if isinstance(module, nn.Linear) else t.reshape(*t.shape[:2], -1)


def starts(counts: tuple[int, ...]) -> list[int]:
    """From the rows (or slots) of each module: the number of its first in the whole model; last, the number of all."""
    return [0, *accumulate(counts)]


def sort(model: nn.Module, opaque: Sequence[str]) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Modules by name: those that are sliced, and barriers, whose channels are not told apart.

    Modules inside an opaque one are in neither. HapError for an unknown name in `opaque`, for a module that cannot be
    sliced, and for a model without a mixing module.
    """
    sliced, barriers, named = dict[str, nn.Module](), dict[str, nn.Module](), dict(model.named_modules())
    if isinstance(opaque, str):
        raise HapError(f"opaque: a list of module names expected, found the string {opaque!r}")
    if missing := set(opaque) - set(named):
        raise HapError(f"opaque: no module {min(missing)} in {type(model).__name__}")
    for name, module in named.items():
        if name in opaque and isinstance(module, torch.jit.ScriptModule):
            refuse_hidden(name, module)  # it takes no hook
        by_channel = isinstance(module, nn.PReLU) and module.num_parameters > 1
        if name in opaque or isinstance(module, BARRIERS) or by_channel:
            barriers[name] = module
        elif not any(name.startswith(f"{outer}.") for outer in opaque):
            refuse_hidden(name, module)
            refuse_unsliceable(name, module)
            if is_mixing(module) or is_channelwise(module):
                sliced[name] = module
    if not opaque and not any(map(is_mixing, sliced.values())) and any(p.dim() > 1 for p in model.parameters()):
        kind = type(model).__name__
        raise HapError(
            f"{kind}: a model of nn.Linear and convolutions expected, found weights that no such layer holds"
        )
    return sliced, barriers


def refuse_hidden(name: str, module: nn.Module) -> None:
    """HapError, with advice, for a module whose layers are not ordinary submodules: scripted, quantised or copied."""
    where, kind = name or "the model", type(module).__name__
    whole = f"; or pass opaque=[{name!r}] to leave it whole" if name else ""
    if isinstance(module, torch.jit.ScriptModule):
        do = "use the nn.Module that it was made from, and script what apply() returns"
        whole = f"; or put nn.Sequential around it and pass opaque=[{name!r}] to leave it whole" if name else ""
        raise HapError(f"{where} ({kind}): TorchScript hides its layers; {do}{whole}")
    if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
        do = "use the floating-point model, and quantise what apply() returns"
        raise HapError(f"{where} (quantised {kind}): its weights are packed and cannot be cut; {do}{whole}")
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
        raise HapError(f"{where} (DataParallel): on several devices its layers run as copies; pass its .module instead")
    if kind == "OptimizedModule" and name and not list(getattr(module, "_orig_mod", module).children()):
        do = "compile the whole model, or what apply() returns"
        raise HapError(f"{where} (OptimizedModule): a layer that is compiled by itself cannot be replaced; {do}")


def refuse_unsliceable(name: str, module: nn.Module) -> None:
    """HapError, with advice, for a module from which single rows and slots cannot be removed."""
    if isinstance(module, nn.MultiheadAttention):
        raise HapError(
            f"{name}: nn.MultiheadAttention reads its weights without calling their modules, which cannot be traced; "
            f"pass opaque=[{name!r}] to leave it whole, or build it from four nn.Linear"
        )
    if why := getattr(module, "unsliceable", None):
        raise HapError(f"{name}: {why}")
    if not is_mixing(module) and not is_channelwise(module):
        return
    if 0 in widths(module):
        raise HapError(f"{name}: {type(module).__name__} without rows or inputs; prune the dense model instead")
    if hasattr(module, "parametrizations"):
        raise HapError(f"{name}: a parametrized weight cannot be sliced; call remove_parametrizations on it first")
    if strange := {p for p, _ in module.named_parameters(recurse=False)} - {"weight", "bias"}:
        kind = f"{type(module).__name__} with a parameter {min(strange)}"
        raise HapError(f"{name}: {kind} cannot be sliced; pass opaque=[{name!r}]")


def batched(leaf: Any) -> bool:
    """Whether `leaf` is a tensor with at least one axis, the first of which is the batch."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0
