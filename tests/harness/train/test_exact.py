"""Numbers that come out the same each time: what torch is asked for, and what a record says where that cannot be.

No GPU is there: ops without a deterministic algorithm are played by a layer that raises as torch does.
"""

import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from small import RECIPE, net, small
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hap import Budget
from hap.harness.tasks import digits_bert, digits_preresnet
from hap.harness.tasks.cache import Trained
from hap.harness.train.exact import determined, exactly, undetermined
from hap.harness.train.loop import fit, generator
from hap.hessian.hutchinson import hutchinson
from hap.implants import least_squares
from hap.methods import hessian_trace, magnitude, taylor
from hap.plan import plan
from hap.structure import kernels
from hap.structure.groups import couple
from hap.structure.kernels import pooled, sound
from hap.structure.tracing import trace
from hap.surgery.apply import apply

BACKENDS = torch.backends
PARTS = [BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn]
PARTS += [BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn]
# ops that have no deterministic kernel on a GPU, as torch.use_deterministic_algorithms lists them
LISTED = {
    *("avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
    *("adaptive_max_pool2d_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward"),
    *("max_unpool2d", "max_unpool3d", "upsample_linear1d_backward", "upsample_bilinear2d_backward"),
    *("upsample_bicubic2d_backward", "upsample_trilinear3d_backward", "reflection_pad1d_backward"),
    *("reflection_pad2d_backward", "reflection_pad3d_backward", "nll_loss2d_forward", "_ctc_loss_backward"),
    *("put_", "histc", "grid_sampler_2d_backward", "grid_sampler_3d_backward", "kthvalue"),
    *("median.dim", "_embedding_bag_dense_backward"),
}


def settings():
    cudnn = BACKENDS.cudnn
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return cudnn.deterministic, cudnn.benchmark, *modes, *(part.fp32_precision for part in PARTS)


@pytest.fixture
def precisions():
    """As they are for the other tests."""
    before = [part.fp32_precision for part in PARTS]
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    BACKENDS.fp32_precision = "none"
    for part, precision in zip(PARTS, before, strict=True):
        part.fp32_precision = precision


@pytest.mark.parametrize(
    "prepare",
    [
        lambda: None,
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    ],
    ids=["plain", "older name", "newer name", "told to warn"],
)
def test_inside_all_is_exact_and_outside_as_it_was(prepare, precisions):
    prepare()
    try:
        with exactly(), exactly():  # as a run has it around a training
            torch.empty(3)
        before = settings()
        with exactly():
            assert torch.are_deterministic_algorithms_enabled()
            assert BACKENDS.cudnn.deterministic
            assert not BACKENDS.cudnn.benchmark
            assert not torch.utils.deterministic.fill_uninitialized_memory
            assert torch.get_float32_matmul_precision() == "highest"
            assert not BACKENDS.cuda.matmul.allow_tf32
            assert not BACKENDS.cudnn.allow_tf32
            assert {part.fp32_precision for part in PARTS} <= {"ieee", "none"}
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)


SAID = "undone_backward_cuda does not have a deterministic implementation, but you set it to be. You can turn it off."


class Undetermined(nn.Module):
    """Raises as an op of torch does that has no deterministic algorithm."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if not torch.is_deterministic_algorithms_warn_only_enabled() and self.calls > 1:
            raise RuntimeError(SAID)
        return x


def test_a_training_with_such_an_op_is_made_all_the_same_and_says_so():
    lines, plain, model = [], net(), nn.Sequential(net(), Undetermined())
    curve = fit(model, small(), RECIPE, rng=generator(0), say=lines.append)
    expected = fit(plain, small(), RECIPE, rng=generator(0))
    note = "undone_backward_cuda has no deterministic algorithm: made again, the numbers may differ"
    assert curve.notes == [note]
    assert [str(line) for line in lines if "undone" in line] == [f"warning: {note}"]
    losses = [[row["train_loss"] for row in each.epochs] for each in (curve, expected)]
    assert losses[0] == losses[1]  # begun anew from where it was
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_pass_and_a_score_begins_anew():
    with pytest.raises(RuntimeError, match="else"):
        determined(lambda: exec('raise RuntimeError("something else")'), print, print)
    rng, told = generator(0), []

    def score():
        drawn = torch.rand(2, generator=rng)
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(SAID)
        return drawn

    state = rng.get_state()
    with exactly():
        found = determined(score, told.append, lambda: rng.set_state(state))
    assert torch.equal(found, torch.rand(2, generator=generator(0)))
    assert told == [undetermined(SAID)]


class Ops(TorchDispatchMode):
    """The names of all ops."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func).removeprefix("aten.").removesuffix(".default"))
        return func(*args, **(kwargs or {}))


SCORES = [hessian_trace, taylor, magnitude, partial(hutchinson, probes=1)]


@pytest.mark.parametrize("workload", [digits_preresnet, digits_bert], ids=["PreResNet", "BERT"])
def test_no_workload_calls_an_op_without_a_deterministic_kernel(workload, monkeypatch):
    """Tracing, scores, surgery, a training and its validation, on a CPU, where the ops have the same names.

    What the test cannot see is a name that torch gives an op on GPUs alone.
    """
    if workload is digits_bert:
        pytest.importorskip("transformers")
    weights = workload._network(0 if workload is digits_bert else generator(0)).state_dict()
    monkeypatch.setattr(workload, "cached", lambda *_: Trained(weights, []))
    task = workload.task(0, **{"samples" if workload is digits_bert else "images": 16})
    first = next(task.train(16, generator(0)))
    task = replace(task, train=lambda batch_size, rng: iter([first]), train_size=16)
    with Ops() as ops:
        groups = couple(task.model, trace(task.model, task.example, call=task.loss.call))
        for score in SCORES:
            score(task.model, task.loss, task.batches, groups, rng=generator(0))
        chosen = plan(groups, magnitude(task.model, task.loss, [], groups, rng=generator(0)), Budget(prunable=0.5))
        implant = None if workload is digits_bert else least_squares
        inputs = [x for x, _ in task.batches]
        pruned = apply(task.model, groups, chosen, implant, batches=inputs, call=task.loss.call)
        fit(pruned, task, replace(RECIPE, epochs=1, batch_size=16), rng=generator(0))
    assert {"index_add_", "native_batch_norm" if implant else "native_layer_norm"} <= ops.seen  # it does watch
    assert not ops.seen & LISTED


def test_adaptive_pooling_by_slices_is_that_of_torch():
    x = torch.rand(2, 3, 11, 7, dtype=torch.double, generator=generator(0), requires_grad=True)
    for size in (3, (5, 7), (None, 2), (11, 1), 13):
        found, expected = pooled(x, size), F.adaptive_avg_pool2d(x, size)
        torch.testing.assert_close(found, expected)
        slopes = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
        torch.testing.assert_close(*slopes)


def test_adaptive_pooling_goes_by_slices_on_a_gpu_alone(monkeypatch):
    seen, layer = [], nn.AdaptiveAvgPool2d(3)
    monkeypatch.setattr(kernels, "pooled", lambda *given: seen.append(given) or given[0])
    x = torch.rand(1, 2, 6, 6)
    with sound(layer):
        assert layer(x).shape == (1, 2, 3, 3)
        assert not seen
        layer(Elsewhere(x))
    assert [size for _, size in seen] == [3]


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda")
