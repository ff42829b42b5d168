"""What a file reproductions/*.toml says: cases, claims, seeds, and the functions that it names."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hap.harness.spec.cases import few as few
    from hap.harness.spec.cases import smoke as smoke
    from hap.harness.spec.functions import Function as Function
    from hap.harness.spec.functions import Ref as Ref
    from hap.harness.spec.functions import Strict as Strict
    from hap.harness.spec.functions import mistake as mistake
    from hap.harness.spec.functions import ready as ready
    from hap.harness.spec.functions import resolve as resolve
    from hap.harness.spec.functions import wrong as wrong
    from hap.harness.spec.spec import STAGELESS as STAGELESS
    from hap.harness.spec.spec import Base as Base
    from hap.harness.spec.spec import Case as Case
    from hap.harness.spec.spec import Claim as Claim
    from hap.harness.spec.spec import Metric as Metric
    from hap.harness.spec.spec import Reported as Reported
    from hap.harness.spec.spec import Spec as Spec
    from hap.harness.spec.spec import find_specs as find_specs
    from hap.harness.spec.spec import load_spec as load_spec
    from hap.harness.spec.spec import require as require
else:
    from hap._lazy import lazily

    __getattr__ = lazily(__file__)
