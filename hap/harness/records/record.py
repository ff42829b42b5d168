"""The record of one case and one seed; does not know how it is made, nor where it lies."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came of one case and one seed, JSON-able; the order of the fields is the record's."""

    schema: int = 1
    spec: str
    case: str
    key: str
    seed: int
    config: dict[str, Any]  # the whole case, as in the spec
    metrics: dict[str, dict[str, float]]  # dense, one_shot, selected, last, best_test_epoch on the test set; ranking
    epochs: list[dict[str, Any]]
    plan: dict[str, Any]
    cost: dict[str, dict[str, Any]]  # dense, pruned
    seconds: dict[str, float]
    environment: dict[str, Any]
    code: dict[str, Any]
    data: dict[str, Any]
    created: str  # UTC
    warnings: list[str] = field(default_factory=list)
    outcomes: dict[str, Any] = field(default_factory=dict)  # which test samples were right, as `records.outcomes` packs
