"""Wrappers of two layers that surgery adds for implants of heads: the input of the first goes to the second as well.

In a forward pass, the `Lender` stores the input of its layer in a `Relay`. The `Borrower`, which runs later, takes the
tensor out, gives it to the implant and adds the implant's output to the output of its own layer.
"""

from typing import Any

from torch import Tensor, nn


class Relay:
    """Holds the tensor between a Lender and its Borrower; `name` is the module name of the Borrower's layer."""

    def __init__(self, name: str) -> None:
        """Holds no tensor until the Lender runs."""
        self.name = name
        self.held: Tensor | None = None

    def __getstate__(self) -> dict[str, object]:
        """The state for copies and files: without the tensor that an interrupted pass may leave."""
        return {"name": self.name, "held": None}


def _attribute(module: nn.Module, name: str) -> Any:
    """The attribute `name` of the wrapped layer, for forward passes that read its `in_features` or `weight`."""
    layer = vars(module).get("_modules", {}).get("layer")
    if layer is None or name.startswith("_") or name in vars(module)["_modules"]:
        return nn.Module.__getattr__(module, name)
    return getattr(layer, name)


class Lender(nn.Module):
    """A layer that stores its input for a Borrower; its output is unchanged."""

    def __init__(self, layer: nn.Module, relay: Relay) -> None:
        """`layer`: the wrapped layer; `relay`: the same object as in the Borrower."""
        super().__init__()
        self.layer, self.relay, self.training = layer, relay, layer.training

    def __getattr__(self, name: str) -> Any:
        """The attribute `name` of the wrapped layer; AttributeError where it has none."""
        return _attribute(self, name)

    def forward(self, input: Tensor) -> Tensor:
        """The output of the layer for `input`."""
        self.relay.held = input
        return self.layer(input)  # type: ignore[no-any-return]


class Borrower(nn.Module):
    """A layer to whose output an implant adds its own, computed from the Lender's input in the same pass."""

    def __init__(self, layer: nn.Module, implant: nn.Module, relay: Relay) -> None:
        """`implant`: maps the Lender's input to the shape of the layer's output, each position alone."""
        super().__init__()
        self.layer, self.implant, self.relay, self.training = layer, implant, relay, layer.training

    def __getattr__(self, name: str) -> Any:
        """The attribute `name` of the wrapped layer; AttributeError where it has none."""
        return _attribute(self, name)

    def forward(self, input: Tensor) -> Tensor:
        """The output of the layer plus that of the implant; the Lender must have run in this pass."""
        source, self.relay.held = self.relay.held, None
        assert source is not None, "a Borrower must run after its Lender"
        return self.layer(input) + self.implant(source)  # type: ignore[no-any-return]
