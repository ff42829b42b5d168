"""From a batch to a step: precision, compilation, micro-batches, distillation, dropout, optimiser; knows no epochs."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from hap.harness.processes import ranks
from hap.harness.task import Task
from hap.harness.train.recipe import Recipe

LEAST = 2  # samples of a micro-batch: BatchNorm has no variance over one
TEMPERATURE = 4.0  # of the distillation, where a recipe does not say [Hinton15]


def memory_ran_out(error: Exception) -> bool:
    """Whether a device, or the machine, had no memory left."""
    signs = ("out of memory", "not enough memory", "ALLOC_FAILED")  # of CUDA, of the CPU, of cuBLAS and cuDNN
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in signs)


@dataclass
class Stepper:
    """What one optimiser step of a recipe does to a batch; `notes` are what the record must say of it."""

    model: nn.Module
    task: Task
    recipe: Recipe
    micro_batch: int
    notes: list[str] = field(default_factory=list)
    _forward: nn.Module | None = None
    _samples: int = 0  # what it was compiled for

    def __call__(self, inputs: Any, targets: Tensor, whole: int | None = None) -> Tensor:
        """The share of these samples in the mean loss of the batch, its gradient added to the model's.

        Nothing waits for the device. `whole`: the samples of the batch on all ranks, where these are not all; the
        gradient is then that of the whole batch on each. In micro-batches each part counts by its size; BatchNorm then
        sees parts, not the batch.
        """
        mine, total = len(targets), targets.new_zeros((), dtype=torch.float32)
        whole, mass = whole or mine, ranks.summed(self.task.loss.mass(targets))
        mass = mass.where(mass > 0, 1)  # a batch of ignored targets has no loss; 0 / 0 would spoil the weights
        world = ranks.world()
        # of sizes as equal as can be; as many on each rank, for in each the ranks wait for each other
        parts = min(math.ceil(math.ceil(whole / world) / self.micro_batch), whole // world)
        for number in range(parts):
            part = slice(number * mine // parts, (number + 1) * mine // parts)
            cut = inputs if parts == 1 else tree_map(lambda t, part=part: ranks.rows(t, part, mine), inputs)
            with self._alone(number < parts - 1):
                loss = self._loss(cut, targets[part], mass, len(targets[part]) / whole)
                (loss * world if world > 1 else loss).backward()  # type: ignore[no-untyped-call]  # DDP takes the mean
            total += loss.detach()
        return total

    def _alone(self, more: bool) -> AbstractContextManager[Any]:
        """Ranks tell each other their gradients once a batch, where `more` micro-batches do not follow."""
        wrapped = isinstance(self._forward, nn.parallel.DistributedDataParallel)
        return cast(Any, self._forward).no_sync() if wrapped and more else nullcontext()

    def halve(self) -> bool:
        """Half the micro-batch from here on, told; False where the least is too much already."""
        if self.micro_batch <= LEAST:
            return False
        self.micro_batch, self._forward = (self.micro_batch + 1) // 2, None
        self.note(
            f"memory ran out: micro-batches of {self.micro_batch} from here on, their gradients added up; "
            "BatchNorm sees micro-batches"
        )
        return True

    def accept(self, line: str) -> None:
        """Ops without a deterministic algorithm are called from here on, and `line` says so."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        self._forward = None  # what averages over ranks is left in the middle of a pass
        self.note(line)

    def note(self, line: str) -> None:
        """Keeps a line for the record, once: a training that goes on meets the same again."""
        if line not in self.notes:
            self.notes.append(line)

    def _loss(self, inputs: Any, targets: Tensor, mass: Tensor, share: float) -> Tensor:
        """The part of the batch's mean loss that these samples, a `share` of it, are."""
        loss, distil = self.task.loss, self.recipe.distil
        if self.recipe.label_smoothing is not None:
            loss = replace(loss, label_smoothing=self.recipe.label_smoothing)
        outputs = self._outputs(self._network(inputs, len(targets)), inputs)
        found = loss.total(outputs, targets) / mass
        if distil is None:
            return found
        with torch.no_grad():
            taught = self._outputs(self.task.model, inputs)
        temperature = self.recipe.temperature or TEMPERATURE
        return (1 - distil) * found + distil * share * distillation(outputs, taught, temperature)

    def _outputs(self, model: nn.Module, inputs: Any) -> Tensor:
        """What the loss takes, in single precision at least."""
        if self.recipe.autocast is None:
            return self.task.loss.call(model, inputs)  # type: ignore[no-any-return]
        where = next(self.model.parameters()).device.type
        with torch.autocast(where, torch.bfloat16):
            return self.task.loss.call(model, inputs).float()  # type: ignore[no-any-return]

    def _network(self, inputs: Any, samples: int) -> nn.Module:
        """The model, compiled where that is asked for and works; a ragged batch is not worth compiling for."""
        if self._forward is None:
            compiled = self._compiled(inputs) if self.recipe.compile else self.model
            self._forward, self._samples = ranks.averaging(compiled), samples
        return self._forward if samples == self._samples or ranks.world() > 1 else self.model

    def _compiled(self, inputs: Any) -> nn.Module:
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        # pruned networks share a class, and of one function torch compiles 8 versions in a process and then no more
        torch.compiler.reset()
        try:
            compiled = cast(nn.Module, torch.compile(self.model, dynamic=False, options=_options()))
            self._outputs(compiled, inputs).sum().backward()  # type: ignore[no-untyped-call]
        except Exception as error:  # whatever a compiler raises; running out of memory is another matter
            if isinstance(error, RuntimeError) and memory_ran_out(error):
                raise
            self.note(f"torch.compile failed, training uncompiled: {type(error).__name__}: {_line(error)}")
            return self.model
        finally:  # the trial leaves no trace
            self.model.zero_grad(set_to_none=True)
            for buffer, before in buffers:
                buffer.copy_(before)
        return compiled


def optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimiser of a recipe, fused."""
    if recipe.optimiser is None:
        chosen: dict[str, Any] = {"momentum": recipe.momentum, "nesterov": recipe.nesterov}
        return torch.optim.SGD(model.parameters(), lr=recipe.lr, fused=True, weight_decay=recipe.weight_decay, **chosen)
    spared = [p for p in model.parameters() if p.dim() < 2]  # biases, and scale and shift of norms
    rest = [p for p in model.parameters() if p.dim() >= 2]
    groups = [{"params": rest, "weight_decay": recipe.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=recipe.lr, fused=True)


@contextmanager
def dropping(model: nn.Module, rng: torch.Generator) -> Iterator[None]:
    """Dropout draws from torch's global stream: inside it is seeded by `rng`, and outside as it was."""
    if not any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules()):
        yield
        return
    seed = int(torch.randint(2**62, (), generator=rng)) + ranks.rank()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many CPU threads inside, as many as before outside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def distillation(outputs: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of the softened class probabilities, mean over the samples, in nats [Hinton15]."""
    student, teacher = ((each / temperature).log_softmax(-1) for each in (outputs, taught))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _options() -> dict[str, Any]:
    """Kernels are not chosen by timing them, or a training that goes on later could round otherwise."""
    from torch._inductor import config  # 0.3 s, for those who compile

    return {"deterministic": True} if hasattr(config, "deterministic") else {}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
