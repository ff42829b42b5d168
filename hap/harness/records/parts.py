"""What the parts of a record must hold for others to read them: a damaged record is told, and breaks nothing."""

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt


class Part(BaseModel):
    """A part of a record that others read; it may have more than is asked for."""

    model_config = ConfigDict(strict=True, extra="allow")


class Cost(Part):
    """What a network costs."""

    params: PositiveInt
    macs: PositiveInt
    latency_seconds: dict[str, PositiveFloat]


class Epoch(Part):
    """An epoch of a training, validated and, after all was decided, tested."""

    validation: dict[str, float]
    test: dict[str, float]


class Data(Part):
    """The data set."""

    name: str
    sha256: str
    official: bool
    note: str


class Code(Part):
    """The code."""

    sha256: str
    commit: str | None
    dirty: bool


class Use(Part):
    """A function by name."""

    use: str


class Config(Part):
    """The functions of a case."""

    task: Use
    score: Use | None = None
    method: Use | None = None
    reference: Use | None = None
    implant: Use | None = None
    update: Use | None = None


class Parts(Part):
    """All of them."""

    config: Config
    cost: dict[str, Cost]
    epochs: list[Epoch]
    data: Data
    code: Code
