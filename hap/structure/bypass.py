"""What surgery adds where implants stand in for heads: what one layer reads reaches another, around what lies between.

Within a forward pass the `Lender` keeps what it reads, and the `Borrower` behind it takes that, once.
"""

from typing import Any

from torch import Tensor, nn


class Relay:
    """The place between a Lender and its Borrower, named after the layer of the latter."""

    def __init__(self, name: str) -> None:
        """Nothing held yet."""
        self.name = name
        self.held: Tensor | None = None

    def __getstate__(self) -> dict[str, object]:
        """Without what a pass that was broken off has left: copies and files are of models, not of passes."""
        return {"name": self.name, "held": None}


def _answer(module: nn.Module, name: str) -> Any:
    """What the layer of a module has under this name, for forward passes that read `in_features` or `weight`."""
    layer = vars(module).get("_modules", {}).get("layer")
    if layer is None or name.startswith("_") or name in vars(module)["_modules"]:
        return nn.Module.__getattr__(module, name)
    return getattr(layer, name)


class Lender(nn.Module):
    """A layer that leaves what it reads for a Borrower."""

    def __init__(self, layer: nn.Module, relay: Relay) -> None:
        """`relay`: that of the Borrower."""
        super().__init__()
        self.layer, self.relay, self.training = layer, relay, layer.training

    def __getattr__(self, name: str) -> Any:
        """What the layer has under this name."""
        return _answer(self, name)

    def forward(self, input: Tensor) -> Tensor:
        """What the layer writes."""
        self.relay.held = input
        return self.layer(input)  # type: ignore[no-any-return]


class Borrower(nn.Module):
    """A layer to which an implant adds its part, made of what the Lender read in the same pass."""

    def __init__(self, layer: nn.Module, implant: nn.Module, relay: Relay) -> None:
        """`implant`: from what the Lender reads to what the layer writes, position by position."""
        super().__init__()
        self.layer, self.implant, self.relay, self.training = layer, implant, relay, layer.training

    def __getattr__(self, name: str) -> Any:
        """What the layer has under this name."""
        return _answer(self, name)

    def forward(self, input: Tensor) -> Tensor:
        """What the layer writes, and the implant's part."""
        lent, self.relay.held = self.relay.held, None
        assert lent is not None, "the Lender of a Borrower is called first"
        return self.layer(input) + self.implant(lent)  # type: ignore[no-any-return]
