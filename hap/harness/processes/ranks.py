"""The processes of one job, as torchrun starts them: which one this is, and what they tell each other; trains nothing.

Without torchrun there is one process, of rank 0, and everything here is free. All ranks go through the same steps in
the same order. Files are written by rank 0 alone; what it read, or could not, is told to the others.
"""

import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from hashlib import sha256
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map

from hap import HapError

# rank 0 may wait this long for a record that another job makes; a rank that dies ends the job at once all the same
PATIENCE = timedelta(days=7)
STUCK = timedelta(hours=1)  # after which a rank that does not come to a sum of tensors is taken for lost
_SIDE: list[Any] = []  # the group, on CPUs, by which ranks tell each other objects
Told = TypeVar("Told")


def rank() -> int:
    """The number of this process in its job, from 0."""
    return distributed.get_rank() if _together() else 0


def world() -> int:
    """The number of processes in the job."""
    return distributed.get_world_size() if _together() else 1


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process is one of those that torchrun started, with a GPU of its own where there are GPUs."""
    if not launched() or _together():
        yield
        return
    given = torch.device(placed(os.environ.get("HAP_DEVICE") or "cuda"))
    backend, own = "gloo", int(os.environ["LOCAL_RANK"]) if given.index is None else given.index
    if torch.cuda.is_available() and given.type == "cuda":
        if own >= torch.cuda.device_count():
            error = HapError(f"a GPU for each rank of a machine expected, found {torch.cuda.device_count()}")
            error.__dict__["rank"] = int(os.environ["RANK"])
            raise error
        torch.cuda.set_device(own)
        backend = "nccl"
    distributed.init_process_group(backend, timeout=STUCK)
    _SIDE[:] = [distributed.new_group(backend="gloo", timeout=PATIENCE)]
    try:
        with warnings.catch_warnings():
            # pruned 1x1 kernels have two layouts that are the same; it is about speed
            warnings.filterwarnings("ignore", message="Grad strides do not match")
            yield
        distributed.barrier(_SIDE[0])  # no rank leaves while another still talks to it
    except HapError as error:
        error.__dict__.setdefault("rank", rank())
        raise  # the group stays, for the others may be waiting in it: see `leave`
    gc.collect()  # what DDP left holds on to the group, whose threads must end before the interpreter does
    distributed.destroy_process_group()
    _SIDE.clear()


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def placed(device: str) -> str:
    """The device that is meant on this rank: of several ranks on a machine each has the GPU of its place there.

    A number that is set once for all of them, as in HAP_DEVICE=cuda:0, would put them all on one GPU, so it counts for
    a rank that is alone on its machine only.
    """
    several = launched() and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1
    return f"cuda:{os.environ['LOCAL_RANK']}" if several and device.partition(":")[0] == "cuda" else device


def leave(code: int) -> None:
    """Ends a rank that failed at once, for to take leave of ranks that wait in a collective can wait for ever."""
    if _together():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def shared(make: Callable[[], Told]) -> Told:
    """What `make` gives on rank 0, on every rank; its HapError too, so that no rank waits for one that gave up."""
    if world() == 1:
        return make()
    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told[0] = make()
        except HapError as error:
            told[1] = error
    distributed.broadcast_object_list(told, src=0, group=_SIDE[0])
    if told[1] is not None:
        told[1].__dict__["rank"] = 0
        raise told[1]
    return cast(Told, told[0])


@contextmanager
def held(make: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Rank 0 is in the context, a lock for example, while all are in this one."""
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(make())

        shared(enter)
        yield


def gathered(value: Told) -> list[Told]:
    """The values of all ranks, in their order."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    distributed.all_gather_object(found, value, group=_SIDE[0])
    return found


def summed(value: Tensor) -> Tensor:
    """The sum over ranks; the tensor itself where there is one."""
    if world() > 1:
        value = value.clone()
        distributed.all_reduce(value, group=None if value.is_cuda else _SIDE[0])
    return value


class _Sum(torch.autograd.Function):
    """The sum over ranks, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return summed(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return summed(grads[0].contiguous())


def summed_with_gradient(value: Tensor) -> Tensor:
    """The sum over ranks, through which gradients flow."""
    return cast(Tensor, _Sum.apply(value))


def agreed(what: str, value: str) -> None:
    """Raises HapError unless all ranks have the same, by its sha256."""
    found = gathered(sha256(value.encode()).hexdigest()[:16])
    if len(set(found)) > 1:
        raise HapError(f"{what}: must be the same on every rank, found {', '.join(found)}")


def slices(count: int) -> slice:
    """Which of `count` samples are this rank's: every world-th."""
    return slice(rank(), count, world())


def part(inputs: Any, targets: Tensor) -> tuple[Any, Tensor]:
    """This rank's samples of a batch."""
    whole = len(targets)
    if world() == 1:
        return inputs, targets
    return tree_map(lambda leaf: rows(leaf, slices(whole), whole), inputs), targets[slices(whole)]


def rows(leaf: Any, wanted: slice, whole: int) -> Any:
    """Some samples of a leaf of a batch of `whole`; the leaf itself where it has no axis of samples."""
    return leaf[wanted] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == whole else leaf


def share(batches: Sequence[tuple[Any, Tensor]]) -> Sequence[tuple[Any, Tensor]]:
    """This rank's share of batches: whole ones where each rank can have one, else its samples of each."""
    if world() == 1:
        return batches
    if len(batches) >= world():
        return batches[rank() :: world()]
    # copies: parts of a batch would keep all of it
    parts = [tree_map(_copied, part(inputs, targets)) for inputs, targets in batches]
    counts = gathered(sum(len(targets) for _, targets in parts))
    if not all(counts):
        raise HapError(f"a calibration sample for each of {world()} ranks expected, found {sum(counts)}")
    return [each for each in parts if len(each[1])]


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def averaging(model: nn.Module) -> nn.Module:
    """The model wrapped so that backward leaves the mean of all ranks' gradients on each; itself on one rank."""
    if world() == 1:
        return model
    where = next(model.parameters()).device
    # heads that are gone leave parameters of no elements, which get no gradient; buffers are equal on all ranks already
    gone = any(parameter.numel() == 0 for parameter in model.parameters())
    how: dict[str, Any] = {"broadcast_buffers": False, "find_unused_parameters": gone}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # another name for broadcast_buffers from torch 2.15 on
        return nn.parallel.DistributedDataParallel(model, device_ids=[where] if where.type == "cuda" else None, **how)


def line(error: HapError) -> str | None:
    """What this process says of an error: nothing where rank 0 met the same and says it."""
    if not launched():
        return str(error)
    own = int(os.environ["RANK"])
    # what is found before ranks join, all of a machine find
    says = own == error.__dict__["rank"] if "rank" in error.__dict__ else os.environ["LOCAL_RANK"] == "0"
    return None if not says else f"rank {own}: {error}" if own else str(error)


def lost(error: BaseException) -> bool:
    """Whether another rank ended while this one waited for it."""
    signs = ("closed by peer", "reset by peer", "gloo", "NCCL", "Broken pipe")
    found = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return isinstance(error, distributed.DistError) or (_together() and found)


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()
