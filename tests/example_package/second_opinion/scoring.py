"""How much of the activations a channel carries: a score that needs calibration data and no gradient."""

import torch


def energy(model, loss, batches, groups, *, rng, power: float = 2.0):
    """Mean |w|^power over the weights of a group, times the mean |activation| that the layer they are in writes."""
    found, handles = {}, []

    def listen(name):
        def hook(module, inputs, output):
            found.setdefault(name, []).append(output.detach().abs().mean().item())

        return hook

    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    for name, module in layers.items():
        handles.append(module.register_forward_hook(listen(name)))
    try:
        with torch.no_grad():
            for inputs, _ in batches:
                loss.call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    scale = {f"{name}.weight": sum(seen) / len(seen) for name, seen in found.items()}
    weights = {name: p.detach().abs() ** power * scale.get(name, 1.0) for name, p in model.named_parameters()}
    ones = {name: torch.ones_like(w) for name, w in weights.items()}
    return groups.reduce(weights) / groups.reduce(ones)
