"""The one training loop, its steps, schedule, averages and checkpoints."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hap.harness.train.loop import Curve as Curve
    from hap.harness.train.loop import Fit as Fit
    from hap.harness.train.loop import State as State
    from hap.harness.train.loop import exactly as exactly
    from hap.harness.train.loop import fit as fit
    from hap.harness.train.loop import generator as generator
    from hap.harness.train.loop import snapshot as snapshot
    from hap.harness.train.loop import threads as threads
    from hap.harness.train.recipe import Recipe as Recipe
    from hap.harness.train.step import LEAST as LEAST
    from hap.harness.train.step import Stepper as Stepper
    from hap.harness.train.step import memory_ran_out as memory_ran_out
    from hap.harness.train.step import optimiser as optimiser
else:
    from hap._lazy import lazily

    __getattr__ = lazily(__file__)
