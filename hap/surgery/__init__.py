"""From a plan to the physically smaller model, and to the masked model of full size that must compute the same."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hap.surgery.apply import Implant as Implant
    from hap.surgery.apply import Inputs as Inputs
    from hap.surgery.apply import mask as mask
    from hap.surgery.apply import replace as replace
    from hap.surgery.apply import resize as resize
    from hap.surgery.head_implants import Passing as Passing
    from hap.surgery.masking import silence as silence
    from hap.surgery.patch import Patch as Patch
else:
    from hap._lazy import lazily

    __getattr__ = lazily(__file__)
