"""Records of runs on disk: what they hold, where they lie, which code made them, what must be true of them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hap.harness.records.checks import BROKEN as BROKEN
    from hap.harness.records.checks import NEAR as NEAR
    from hap.harness.records.freshness import FRESH as FRESH
    from hap.harness.records.freshness import Age as Age
    from hap.harness.records.freshness import aged as aged
    from hap.harness.records.freshness import decides as decides
    from hap.harness.records.freshness import entrances as entrances
    from hap.harness.records.record import Run as Run
    from hap.harness.records.store import path as path
else:
    from hap._lazy import lazily

    __getattr__ = lazily(__file__)
