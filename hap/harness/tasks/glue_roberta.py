"""GLUE and RoBERTa-base, 12 layers of 12 heads, from the hub."""

from functools import partial

from hap.harness.task import Data
from hap.harness.tasks import encoder, glue

PLACE, REVISION = "FacebookAI/roberta-base", "e2da8e2f811d1448a5b465c236feacd80ffbac7b"


def source() -> encoder.Source:
    """The encoder on the hub."""
    return encoder.Source(PLACE, REVISION)


def ready(data: str, **options: object) -> Data:
    """The data of the task; the encoder is downloaded when it is first needed."""
    return glue.glue(data)[2]


task = partial(encoder.finetuned, "roberta", source)
