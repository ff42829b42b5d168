"""From runs to verdicts: measured values, bounds over seeds, claims judged."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hap.harness.verdicts.judge import Outcome as Outcome
    from hap.harness.verdicts.judge import Verdict as Verdict
    from hap.harness.verdicts.judge import describe as describe
    from hap.harness.verdicts.measures import measured as measured
    from hap.harness.verdicts.measures import value as value
    from hap.harness.verdicts.statistics import FEWEST as FEWEST
    from hap.harness.verdicts.statistics import Interval as Interval
    from hap.harness.verdicts.statistics import deviation as deviation
    from hap.harness.verdicts.statistics import holm as holm
    from hap.harness.verdicts.statistics import p_value as p_value
else:
    from hap._lazy import lazily

    __getattr__ = lazily(__file__)
