"""Which samples of a test set a network had right, or what it said of them: packed bits for a record, and back.

Accuracy needs one bit a sample: right or not. F1 and Matthews' correlation need what was said, which of two classes is
one bit too, and what is true. A record keeps the stages that claims are about; those of the dense network, and the true
classes, are the same for many records and lie once beside them, in a file that their hash names. Does not know where
numbers come from or what follows from them.
"""

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from hap.harness.processes.files import atomic_write
from hap.harness.spec.functions import wrong

STAGES = ("dense", "one_shot", "selected")
ONCE = ("dense", "labels")  # what many records have in common
FOLDER = "bits"
NEAR = 1e-9

Bits = Bool[np.ndarray, "samples"]
Counts = Float[np.ndarray, "*draws seeds"]


class Said(NamedTuple):
    """What a network said of each sample of a test set, beside what is true."""

    classes: Int[np.ndarray, "samples"]
    labels: Int[np.ndarray, "samples"]


def packed(said: Mapping[str, Said | None], metrics: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The part of a record, from what was said at each stage; empty where a stage of STAGES is not known.

    What was right at each stage; where its metrics have F1 or Matthews' correlation, what was said, and what is true.
    """
    stages = {name: each for name in STAGES if (each := said.get(name)) is not None}
    if len(stages) < len(STAGES):
        return {}
    binary = not METRICS.keys().isdisjoint(metrics["dense"])
    kept = {name: _pack(each.classes == 1 if binary else each.classes == each.labels) for name, each in stages.items()}
    first = stages["dense"]
    labels = {"labels": _pack(first.labels == 1)} if binary else {}
    return {"samples": len(first.labels), **kept, **labels}


def right(outcomes: Mapping[str, Any], stage: str) -> Bits | None:
    """Which samples were right at a stage; None where a record has no bits of it."""
    if stage not in STAGES or stage not in outcomes:
        return None
    bits = _unpack(outcomes, stage)
    return bits == _unpack(outcomes, "labels") if "labels" in outcomes else bits


def said(outcomes: Mapping[str, Any], stage: str) -> tuple[Bits, Bits] | None:
    """What was said at a stage and what is true, as whether it is class 1; None where a record does not have it."""
    if stage not in STAGES or stage not in outcomes or "labels" not in outcomes:
        return None
    return _unpack(outcomes, stage), _unpack(outcomes, "labels")


def differing(outcomes: Mapping[str, Any], metrics: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, object]]:
    """What of the numbers of a record does not follow from its bits: the rule, and what was found."""
    for stage in (each for each in STAGES if each in outcomes):
        bits, pair = right(outcomes, stage), said(outcomes, stage)
        assert bits is not None
        wanted = {"accuracy": 100 * float(bits.mean())}
        if pair is not None:
            wanted |= {name: 100 * float(shares(name, pair[1], pair[0][None])[0]) for name in METRICS}
        for name, value in wanted.items():
            found = metrics[stage].get(name)
            if found is None or abs(found - value) > NEAR * 100:
                yield f"{stage} {name} must be that of its bits, {value:.6g}", found


def detached(outcomes: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The same for a file: what many records have in common is written once into the folder, and named by its hash."""
    kept = dict(outcomes)
    for name in (each for each in ONCE if each in outcomes):
        content = _content(outcomes[name])
        kept[name] = digest = sha256(content).hexdigest()
        if not (file := folder / FOLDER / f"{digest}.txt").exists():
            atomic_write(file, content)
    return kept


def files(outcomes: Mapping[str, Any]) -> set[str]:
    """The names of the files in the folder of bits that a record needs, when they are attached."""
    return {f"{sha256(_content(outcomes[name])).hexdigest()}.txt" for name in ONCE if name in outcomes}


def attached(outcomes: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The other way round; HapError names what is missing or damaged."""
    whole = dict(outcomes)
    for name in (each for each in ONCE if each in outcomes):
        if not re.fullmatch("[0-9a-f]{64}", str(outcomes[name])):
            raise wrong(f"outcomes.{name}", "must be the sha256 of a file of bits", outcomes[name])
        file = folder / FOLDER / f"{outcomes[name]}.txt"
        try:
            content = file.read_bytes()
        except OSError as error:
            raise wrong(f"outcomes.{name}", f"{FOLDER}/{file.name} must be readable", error.strerror) from None
        if (found := sha256(content).hexdigest()) != outcomes[name]:
            raise wrong(f"outcomes.{name}", f"the sha256 of {FOLDER}/{file.name} must be its name", found)
        whole[name] = content.decode("ascii").strip()
    for name in (each for each in (*STAGES, *ONCE) if each in whole):
        _unpack(whole, name)
    return whole


def shares(
    metric: str,
    labels: Bits,
    said: Bool[np.ndarray, "seeds samples"],
    weights: Float[np.ndarray, "draws samples"] | None = None,
) -> Any:
    """F1 of class 1 or Matthews' correlation of each seed, as a share; with weights, in each draw, [draws, seeds].

    As scikit-learn has them: 0 where a denominator is 0.
    """
    kinds = (labels & said, ~labels & said, labels & ~said, ~labels & ~said)
    counts = (kind.sum(1).astype(float) if weights is None else weights @ kind.T.astype(float) for kind in kinds)
    return METRICS[metric](*counts)


def _f1(hits: Counts, alarms: Counts, misses: Counts, rejections: Counts) -> Counts:
    return _over(2 * hits, 2 * hits + alarms + misses)


def _matthews(hits: Counts, alarms: Counts, misses: Counts, rejections: Counts) -> Counts:
    margins = (hits + alarms) * (hits + misses) * (rejections + alarms) * (rejections + misses)
    return _over(hits * rejections - alarms * misses, np.sqrt(margins))


def _over(above: Counts, below: Counts) -> Counts:
    found: Counts = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return found


METRICS: dict[str, Callable[[Counts, Counts, Counts, Counts], Counts]] = {"f1": _f1, "matthews": _matthews}


def _content(text: str) -> bytes:
    return f"{text}\n".encode()


def _pack(bits: Bits) -> str:
    return base64.b64encode(np.packbits(bits).tobytes()).decode("ascii")


def _unpack(outcomes: Mapping[str, Any], name: str) -> Bits:
    samples, text = outcomes.get("samples"), outcomes[name]
    if not (isinstance(samples, int) and samples > 0):
        raise wrong("outcomes.samples", "must be a number of samples", samples)
    try:
        content = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    except (binascii.Error, TypeError, ValueError) as error:
        raise wrong(f"outcomes.{name}", f"must be base64 ({error})", text) from None
    if len(content) != -(-samples // 8):
        raise wrong(f"outcomes.{name}", f"must be {samples} bits", f"{len(content)} bytes")
    return np.unpackbits(content, count=samples).astype(bool)
