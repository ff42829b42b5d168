"""A pruned model of transformers as one that `save_pretrained` and `from_pretrained` take; nothing is pickled.

`Pruned.of(model, original)` wraps what surgery made; its config has that of the original and the record of the modules
that differ. transformers is imported here, so this module is for those who have it.
"""

import copy
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hap import HapError
from hap.harness.models.architecture import describe, fill, rebuild, tensors


class PrunedConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The config of the original, the name of its class in transformers, and what surgery made of it."""

    model_type = "hap-pruned"

    def __init__(
        self,
        original: dict[str, Any] | None = None,
        original_class: str = "",
        architecture: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        """All are given by `Pruned.of`; transformers also makes empty ones."""
        self.original, self.original_class, self.architecture = original or {}, original_class, architecture or {}
        super().__init__(**rest)


class Pruned(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A model of transformers after surgery."""

    config_class = PrunedConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: PrunedConfig) -> None:
        """The original, freshly built and brought to the shape that the config records."""
        super().__init__(config)
        self.model = rebuild(_original(config), config.architecture)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def of(cls, model: nn.Module, original: PreTrainedModel) -> "Pruned":
        """The pruned `model` wrapped; `original` is a fresh or the dense instance of its class, for the shapes."""
        own = original.config
        labels = {"num_labels": own.num_labels, "id2label": own.id2label, "label2id": own.label2id}
        attention = own._attn_implementation
        config = PrunedConfig(
            {**own.to_dict(), "_attn_implementation": attention},
            type(original).__name__,
            describe(model, original),
            **labels,
        )
        made = cls(config)
        fill(made.model, {name: t.detach() for name, t in tensors(model).items()})
        return made.train(model.training)  # type: ignore[no-any-return]

    def forward(self, **inputs: Any) -> Any:
        """As the original."""
        return self.model(**inputs)

    def _init_weights(self, module: nn.Module) -> None:
        self.model._init_weights(module)


def _original(config: PrunedConfig) -> PreTrainedModel:
    cls = getattr(transformers, config.original_class, None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise HapError(f"config: original_class must be a model of transformers, found {config.original_class!r}")
    given = copy.deepcopy(config.original)
    attention = given.pop("_attn_implementation", None)
    assert cls.config_class is not None
    own = cls.config_class.from_dict(given)
    own._attn_implementation = attention
    return cls(own)


transformers.AutoConfig.register(PrunedConfig.model_type, PrunedConfig)
transformers.AutoModelForSequenceClassification.register(PrunedConfig, Pruned)
