"""The curvature of the loss with respect to outputs of layers, for each sample and position; knows no weights."""

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hap.hessian.hooks import measuring, see
from hap.hessian.linearity import sources
from hap.hessian.losses import Loss
from hap.structure.layers import positions, weight_of

COLUMNS = 16  # up to this number all columns; beyond, the likeliest outputs and one drawn for the rest


def output_curvature(
    model: nn.Module, loss: Loss, inputs: Any, layers: Collection[str], rng: torch.Generator
) -> dict[str, Float[Tensor, "batch positions"]]:
    """Layer -> trace of the Gauss-Newton matrix with respect to its output at a position, divided by its rows.

    Without targets, on which the Hessian of softmax cross-entropy in the logits does not depend; class weights are
    those of each sample's likeliest class. `rng` draws one column where the model has more than COLUMNS outputs.
    """
    found = dict[str, Tensor]()
    modules = {name: model.get_submodule(name) for name in layers}

    def sink(name: str, grad: Tensor) -> None:
        found[name] = found.get(name, 0.0) + positions(modules[name], grad).square().mean(1)

    with measuring(model, [weight_of(name) for name in layers]):
        outputs, seen = see(model, loss, inputs, modules, sink)
        likeliest = outputs.detach().argmax(-1)
        k = None if outputs.shape[-1] <= COLUMNS else COLUMNS - 1
        vectors, _ = loss.columns(outputs.detach(), likeliest, k, rng)
        edges = [each.edge for each in seen.values()]
        last = sources(outputs, [edge.node for edge in edges])
        ends = [edge for edge in edges if edge.node in last]
        for i, vector in enumerate(vectors):
            torch.autograd.grad(outputs, ends, vector, retain_graph=i < len(vectors) - 1)
    for name, each in seen.items():
        if name not in found:  # the loss does not depend on it
            found[name] = torch.zeros(positions(modules[name], each.y).shape[::2], device=outputs.device)
    return found
