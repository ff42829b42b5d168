"""Pruned models on disk and back, without a pickle."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hap.harness.models.saved import load_model as load_model
    from hap.harness.models.saved import save_model as save_model
else:
    from hap._lazy import lazily

    __getattr__ = lazily(__file__)
