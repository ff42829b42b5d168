"""The diagonal of the Hessian of a loss, in closed form or by random probes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hap.hessian.accumulate import Curvature as Curvature
    from hap.hessian.accumulate import merge as merge
    from hap.hessian.hooks import measuring as measuring
    from hap.hessian.hooks import ordinary as ordinary
    from hap.hessian.hooks import refuse_unfinite as refuse_unfinite
    from hap.hessian.hooks import tracked as tracked
    from hap.hessian.losses import Batches as Batches
    from hap.hessian.losses import CrossEntropy as CrossEntropy
    from hap.hessian.losses import Loss as Loss
    from hap.hessian.losses import refuse_loss as refuse_loss
else:
    from hap._lazy import lazily

    __getattr__ = lazily(__file__)
