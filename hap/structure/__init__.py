"""Which rows of a model feed which slots, and the groups of rows that share one fate."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hap.structure.bypass import Borrower as Borrower
    from hap.structure.bypass import Lender as Lender
    from hap.structure.bypass import Relay as Relay
    from hap.structure.diagnosis import refuse_random as refuse_random
    from hap.structure.groups import Gone as Gone
    from hap.structure.groups import Groups as Groups
    from hap.structure.groups import components as components
    from hap.structure.groups import couple as couple
    from hap.structure.groups import describe_group as describe_group
    from hap.structure.heads import COUNTERS as COUNTERS
    from hap.structure.heads import Around as Around
    from hap.structure.heads import around as around
    from hap.structure.heads import recount as recount
    from hap.structure.heads import slot_groups as slot_groups
    from hap.structure.kernels import sound as sound
    from hap.structure.layers import Call as Call
    from hap.structure.layers import axis as axis
    from hap.structure.layers import batched as batched
    from hap.structure.layers import evaluating as evaluating
    from hap.structure.layers import failure as failure
    from hap.structure.layers import first_tensor as first_tensor
    from hap.structure.layers import forward as forward
    from hap.structure.layers import is_mixing as is_mixing
    from hap.structure.layers import name_of as name_of
    from hap.structure.layers import plain_kernels as plain_kernels
    from hap.structure.layers import positions as positions
    from hap.structure.layers import refuse_hidden as refuse_hidden
    from hap.structure.layers import uncompiled as uncompiled
    from hap.structure.layers import weight_of as weight_of
    from hap.structure.layers import widths as widths
    from hap.structure.tracing import trace as trace
else:
    from hap._lazy import lazily

    __getattr__ = lazily(__file__)
