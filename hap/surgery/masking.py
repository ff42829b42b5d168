"""Rows and slots set to zero: a model of full size that computes what the pruned model computes."""

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hap.structure.groups import Gone, Groups
from hap.structure.layers import axis, first_tensor


def silence(model: nn.Module, groups: Groups, gone: Gone) -> list[RemovableHandle]:
    """Add hooks to the model that set the rows and slots in `gone` to zero; returns their handles, to remove them."""
    handles = []
    for name, s in groups.shapes.items():
        module, idle, unread = model.get_submodule(name), gone.rows[s.rows_at], gone.slots[s.slots_at]
        if idle.any():
            handles.append(module.register_forward_hook(lambda m, _, y, idle=idle: _blank(y, idle, axis(m))))
        if s.mixing and unread.any():
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, kwargs, unread=unread: ((_blank(first_tensor(args, kwargs), unread, axis(m)),), {}),
                    with_kwargs=True,
                )
            )
    return handles


def _blank(x: Tensor, where: Tensor, feature: int) -> Tensor:
    shape = [1] * x.dim()
    shape[feature] = -1
    return x.masked_fill(where.to(x.device).reshape(shape), 0.0)
