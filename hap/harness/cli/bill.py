"""What something takes, what a spec takes, and the table of `hap cost`; measures nothing."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.table import Table

from hap import HapError

STAGES = ("train", "trace", "score", "fine-tune", "evaluate")
GIB = 2**30
ASSUMED = (
    "Assumed: records are shared out over devices evenly, and none waits but for its own trained model, so these are "
    "the fewest hours; a pruned network costs as much as the dense one; validation sets are as large as test sets."
)


class Price(NamedTuple):
    """What something takes once."""

    steps: int = 0  # of an optimiser, or passes over a batch
    flops: float = 0.0
    seconds: float = 0.0

    def times(self, count: float) -> "Price":
        """So often."""
        return Price(round(self.steps * count), self.flops * count, self.seconds * count)

    def plus(self, other: "Price") -> "Price":
        """And that."""
        return Price(self.steps + other.steps, self.flops + other.flops, self.seconds + other.seconds)

    @staticmethod
    def sum(prices: "Iterable[Price]") -> "Price":
        """All of them."""
        steps, flops, seconds = zip(Price(), *prices, strict=True)
        return Price(sum(steps), sum(flops), sum(seconds))


@dataclass
class Estimate:
    """What the records of a spec take, by stage; and the longest chain of work that cannot be shared out."""

    spec: str
    stages: dict[str, Price]
    counts: dict[str, int]  # how often a stage is gone through
    chain: Price  # a dense model and one record after it
    memory: int | None  # bytes of the GPU, at the most; None on a CPU
    disk: int  # bytes: trained models, and what one fine-tuning keeps while it runs
    device: str

    def hours(self, devices: int, tflops: float | None = None) -> float:
        """On so many devices like this one, records shared out; or on devices that sustain so many TFLOP/s."""
        total = self.total
        if tflops is None:
            return max(total.seconds / devices, self.chain.seconds) / 3600
        return max(total.flops / devices, self.chain.flops) / (tflops * 1e12) / 3600

    @property
    def total(self) -> Price:
        """All stages."""
        return Price.sum(self.stages.values())


def table(found: Estimate) -> Table:
    """A row for each stage: how often, steps, PFLOP and hours on this device."""
    made = Table(title=f"{found.spec}, on {found.device}", title_justify="left")
    made.add_column("stage")
    for heading in ("times", "optimiser steps", "PFLOP", "hours"):
        made.add_column(heading, justify="right")
    for stage in STAGES:
        made.add_row(stage, str(found.counts[stage]), *_cells(found.stages[stage]))
    made.add_section()
    made.add_row("all", "", *_cells(found.total))
    return made


def lines(found: Estimate, devices: Sequence[int], tflops: float | None) -> Iterator[str]:
    """Memory and disk; the hours on so many devices, with what is assumed."""
    memory = "not measured, there is no GPU" if found.memory is None else f"{found.memory / GIB:.1f} GiB"
    yield f"GPU memory: {memory}; disk: {found.disk / GIB:.2f} GiB in the cache, the data aside"
    what = "devices like this one" if tflops is None else f"devices that sustain {tflops:g} TFLOP/s"
    hours = ", ".join(f"{count}: {_hours(found.hours(count, tflops))}" for count in devices)
    yield f"hours on {what}: {hours}"
    yield ASSUMED


def counts(text: str) -> list[int]:
    """The numbers of `1,8,64`; HapError for anything else."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise HapError(f"--devices: numbers from 1 on expected, as in 1,8,64; found {text!r}")
    return found


def _cells(price: Price) -> tuple[str, str, str]:
    return f"{price.steps:,}", f"{price.flops / 1e15:,.3g}", _hours(price.seconds / 3600)


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"
