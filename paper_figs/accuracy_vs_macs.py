"""Test accuracy against the MACs left, a line a method: one-shot above, after fine-tuning below."""

from pathlib import Path

from paper_figs import accuracy


def draw(spec, runs, out_dir: Path) -> list[Path]:
    """The figure of a spec from its records, runs: case -> list of Run; nothing without records."""
    return accuracy.against(spec, runs, out_dir / f"{spec.name}-accuracy_vs_macs", "macs")
