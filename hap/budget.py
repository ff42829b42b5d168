"""How much of a model is to go, as a spec gives it; knows no model."""

from dataclasses import dataclass

from hap import HapError

UNITS = ("params", "macs", "groups", "prunable")


@dataclass(frozen=True)
class Budget:
    """How much to remove: a fraction of the groups, the parameters or the MACs, exactly one of them.

    `prunable`: of those parameters that go when all groups do, so that 0.6 of attention heads is 0.6 of their weights.
    `implant`: the share of the pruned groups, those of highest score, that become implants ([HAP-code]: ni_ratio).
    `rank`: of the map that stands in for an implanted head, whose parameters count; 0 is its mean alone, which is free.
    `layer_limit`: the largest fraction of a layer's rows that may be pruned; one row always stays, but of linear layers
    where it is 1. `multiple`: channels kept per layer are rounded up to a multiple of this, so that kernels are full;
    groups of highest score come back.
    """

    params: float | None = None
    macs: float | None = None
    groups: float | None = None
    prunable: float | None = None
    implant: float = 0.0
    layer_limit: float = 0.95
    multiple: int | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        """Refuse a budget that no plan can meet."""
        if len(given := [unit for unit in UNITS if getattr(self, unit) is not None]) != 1:
            raise HapError(f"budget: exactly one of {', '.join(UNITS)} expected, found {sorted(given) or 'none'}")
        if not 0 < self.target < 1:
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
        ):
            if not holds:
                raise HapError(f"budget.{name}: {rule} expected, found {getattr(self, name)}")

    @property
    def unit(self) -> str:
        """What is counted: params, macs, groups or prunable."""
        return next(unit for unit in UNITS if getattr(self, unit) is not None)

    @property
    def target(self) -> float:
        """The fraction of it to remove."""
        return float(getattr(self, self.unit))
