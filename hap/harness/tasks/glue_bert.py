"""GLUE and BERT-base, uncased, 12 layers of 12 heads, from the hub."""

from functools import partial

from hap.harness.task import Data
from hap.harness.tasks import encoder, glue

PLACE, REVISION = "google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594"


def source() -> encoder.Source:
    """The encoder on the hub."""
    return encoder.Source(PLACE, REVISION)


def ready(data: str, **options: object) -> Data:
    """The data of the task; the encoder is downloaded when it is first needed."""
    return glue.glue(data)[2]


task = partial(encoder.finetuned, "bert", source)
