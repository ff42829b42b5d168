"""How much to remove: a share of the network, or of each layer; needs no torch, so that specs are read without it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor

from hap import HapError

UNITS = ("params", "macs", "groups", "prunable", "ratios")
ROUNDING = {
    "ceil": lambda rows: math.ceil(rows - 1e-9),
    "floor": lambda rows: floor(rows + 1e-9),
    "nearest": lambda rows: floor(rows + 0.5 + 1e-9),  # halves go up
}


@dataclass(frozen=True)
class Budget:
    """How much to remove: exactly one of `params`, `macs`, `groups`, `prunable` and `ratios`. HapError for any other.

    `params`, `macs`, `groups`: the fraction, 0 to 1, of the parameters, MACs or groups to remove. `prunable`: the
    fraction of those parameters that all groups together hold: 0.6 of attention heads is 0.6 of their weights.
    `ratios`: glob over names of modules (`*` matches any text, dots too) -> the share of rows that these layers lose; a
    layer that no glob matches loses none. Its number of rows is rounded by `rounding`: "ceil" (default, as GReg does),
    "floor" or "nearest"; one row always stays, and `layer_limit` does not apply.
    `only`, `except_` (in a spec `except`): globs for the layers that may, or may not, be pruned.
    `implant`: the share of the pruned groups, those of highest score, that become implants ([HAP-code]: ni_ratio).
    `rank`: rank of the map that replaces an implanted head; its parameters count. 0 is the mean alone, which is free.
    `layer_limit`: the largest fraction of a layer's rows that may be pruned. One row always stays, except in linear
    layers where the limit is 1. `multiple`: the number of channels kept in a layer is rounded up to a multiple of this,
    for speed; the groups of highest score are kept in addition.

    >>> Budget(params=0.5, implant=0.1).target
    0.5
    """

    params: float | None = None
    macs: float | None = None
    groups: float | None = None
    prunable: float | None = None
    implant: float = 0.0
    layer_limit: float = 0.95
    multiple: int | None = None
    rank: int | None = None
    ratios: Mapping[str, float] | None = None
    rounding: str | None = None
    only: Sequence[str] | None = None
    except_: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """HapError for a budget that no plan can meet."""
        if len(given := [unit for unit in UNITS if getattr(self, unit) is not None]) != 1:
            raise HapError(f"budget: exactly one of {', '.join(UNITS)} expected, found {sorted(given) or 'none'}")
        if self.ratios is None and not 0 < self.target < 1:
            raise HapError(f"budget.{self.unit}: a fraction between 0 and 1 to remove expected, found {self.target}")
        for name, rule, holds in (
            ("implant", "a share of at least 0 and below 1", 0 <= self.implant < 1),
            ("layer_limit", "a fraction above 0 and at most 1", 0 < self.layer_limit <= 1),
            ("multiple", "a number of at least 1", self.multiple is None or self.multiple >= 1),
            (
                "rank",
                "a number of at least 0, with implants",
                self.rank is None or (self.rank >= 0 and self.implant > 0),
            ),
            (
                "ratios",
                "globs with shares of rows from 0 to 1, one of them above 0,",
                self.ratios is None or (all(0 <= r <= 1 for r in self.ratios.values()) and self.target > 0),
            ),
            (
                "rounding",
                f"one of {', '.join(ROUNDING)}, with ratios,",
                self.rounding is None or (self.ratios is not None and self.rounding in ROUNDING),
            ),
            ("only", "a list of globs", _is_list(self.only)),
            ("except_", "a list of globs", _is_list(self.except_)),
        ):
            if not holds:
                raise HapError(f"budget.{name}: {rule} expected, found {getattr(self, name)}")

    @property
    def unit(self) -> str:
        """The field that is set: params, macs, groups, prunable or ratios."""
        return next(unit for unit in UNITS if getattr(self, unit) is not None)

    @property
    def target(self) -> float:
        """The fraction to remove; for ratios the largest of them."""
        return float(getattr(self, self.unit)) if self.ratios is None else max(self.ratios.values(), default=0.0)


def _is_list(globs: Sequence[str] | None) -> bool:
    return globs is None or (not isinstance(globs, str) and len(globs) > 0)
