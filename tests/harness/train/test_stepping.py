"""One step: what reaches the weights, whatever the precision, the compiler and the memory."""

from dataclasses import replace

import pytest
import torch
from small import INPUTS, RECIPE, TARGETS, net, small
from torch import nn
from torch.nn import functional as F

from hap import HapError
from hap.harness.train import step as stepping
from hap.harness.train.loop import fit, generator
from hap.harness.train.step import Stepper, distillation
from hap.hessian.losses import CrossEntropy


def plain():
    """Without BatchNorm, so that samples do not see each other."""
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.3, generator(1, str(parameter.shape)))
    return model


def gradients(model, **recipe):
    task = small(model=recipe.pop("teacher", model), loss=recipe.pop("loss", CrossEntropy()))
    chosen = replace(RECIPE, **recipe)
    model.zero_grad()
    loss = Stepper(model, task, chosen, chosen.micro_batch or 64)(INPUTS, TARGETS)
    return float(loss), [parameter.grad.clone() for parameter in model.parameters()]


def close(one, other, rtol=1e-5):
    torch.testing.assert_close(one[0], other[0], rtol=rtol, atol=1e-6)
    torch.testing.assert_close(one[1], other[1], rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy(weight=torch.tensor([0.2, 3.0]), label_smoothing=0.1)])
@pytest.mark.parametrize("micro", [1, 24, 63])
def test_micro_batches_add_up_to_the_batch(micro, loss):
    """Also where samples have weights, by which parts of equal size differ."""
    close(gradients(plain(), micro_batch=micro, loss=loss), gradients(plain(), loss=loss), 1e-4)


def test_a_batch_of_ignored_targets_leaves_the_weights_alone():
    model = plain()
    loss = Stepper(model, small(model=model), RECIPE, 64)(INPUTS, torch.full_like(TARGETS, -100))
    assert loss == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_distillation_is_that_of_its_source():
    """The oracle is cross-entropy with soft targets less the teacher's entropy, in float64."""
    model, teacher = plain(), net().eval()
    loss, found = gradients(model, teacher=teacher, distil=0.7, temperature=3.0)
    student, taught = (each(INPUTS).double() / 3.0 for each in (model, teacher))
    soft = F.cross_entropy(student, taught.softmax(1)) - F.cross_entropy(taught, taught.softmax(1))
    expected = 0.3 * F.cross_entropy(model(INPUTS), TARGETS) + 0.7 * 9.0 * soft
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for grad, other in zip(found, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_distillation_adds_up_over_micro_batches_and_has_a_temperature_of_its_own():
    teacher = net().eval()
    whole = gradients(plain(), teacher=teacher, distil=0.5)
    close(gradients(plain(), teacher=teacher, distil=0.5, micro_batch=10), whole, 1e-4)
    close(gradients(plain(), teacher=teacher, distil=0.5, temperature=4.0), whole, 0)
    assert float(distillation(torch.zeros(3, 2), torch.zeros(3, 2), 2.0)) == 0


def test_there_is_nothing_to_learn_from_oneself():
    task = small()
    with pytest.raises(HapError, match=r"small: recipe\.distil needs a dense model"):
        fit(task.model, task, replace(RECIPE, distil=0.5), rng=generator(0))


def test_bf16_computes_in_bf16_and_keeps_weights_and_loss_in_float32():
    seen, model = [], plain()
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    rounded, exact = gradients(model, autocast="bf16"), gradients(model)
    assert seen == [torch.bfloat16, torch.float32]
    assert all(grad.dtype == torch.float32 for grad in rounded[1])
    assert rounded[0] != exact[0]
    assert rounded[0] == pytest.approx(exact[0], rel=0.02)
    for one, other in zip(rounded[1], exact[1], strict=True):
        assert float((one - other).norm() / other.norm()) < 0.05


def test_a_compiler_that_fails_is_told_of_and_leaves_no_trace(monkeypatch):
    def broken(model, **options):
        model(INPUTS)  # BatchNorm has counted this batch when the compiler fails
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", broken)
    lines, plainly, compiled = [], net(), net()
    without = fit(plainly, small(), RECIPE, rng=generator(0))
    curve = fit(compiled, small(), replace(RECIPE, compile=True), rng=generator(0), say=lines.append)
    assert curve.notes == ["torch.compile failed, training uncompiled: RuntimeError: no compiler here"]
    assert [str(line) for line in lines if line.startswith("warning")] == [f"warning: {curve.notes[0]}"]
    assert without.notes == []
    assert all(torch.equal(value, plainly.state_dict()[name]) for name, value in compiled.state_dict().items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler about itself
@pytest.mark.filterwarnings("ignore:.*TF32:UserWarning")  # its advice for GPUs
def test_a_compiled_model_trains_to_the_same_weights():
    """Where there is no C++ compiler the fallback does, and says so."""
    plainly, compiled = net(), net()
    fit(plainly, small(), replace(RECIPE, epochs=1), rng=generator(0))
    curve = fit(compiled, small(), replace(RECIPE, epochs=1, compile=True), rng=generator(0))
    assert curve.notes == [] or "training uncompiled" in curve.notes[0]
    for name, value in compiled.state_dict().items():
        torch.testing.assert_close(value, plainly.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler about itself
@pytest.mark.filterwarnings("ignore:.*TF32:UserWarning")  # its advice for GPUs
def test_the_tenth_pruned_network_is_compiled_as_the_first_is(monkeypatch):
    """They share a class, and torch compiles eight versions of one function in a process; the backend counts them."""
    compiled = []

    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.one, self.two = nn.Linear(6, width), nn.Linear(width, 2)

        def forward(self, x):
            return self.two(self.one(x).relu())

    def backend(graph, example, options=None):
        compiled[-1] += 1
        return graph.forward

    plainly = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, dynamic, options: plainly(model, dynamic=dynamic, backend=backend)
    )
    for width in range(3, 13):
        compiled.append(0)
        curve = fit(Net(width), small(), replace(RECIPE, epochs=1, compile=True), rng=generator(0))
        assert curve.notes == []
    assert compiled == [1] * 10


def starved(limit, model):
    """A model that has memory for `limit` samples, and whose BatchNorm has seen them before it finds out."""

    def hook(module, args):
        if module.training and len(args[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    model[3].register_forward_pre_hook(hook)
    return model


def test_where_memory_runs_out_micro_batches_are_halved_and_it_is_told():
    """The oracle is a training told from the start to take micro-batches of the size that fits."""
    lines, model, oracle = [], starved(5, net()), net()
    curve = fit(model, small(), RECIPE, rng=generator(0), say=lines.append)
    fit(oracle, small(), replace(RECIPE, micro_batch=5), rng=generator(0))
    assert [note.partition(" from here")[0] for note in curve.notes] == [
        "memory ran out: micro-batches of 10",
        "memory ran out: micro-batches of 5",
    ]
    assert sum(line.startswith("warning: memory ran out") for line in lines) == 2
    assert all(torch.equal(value, oracle.state_dict()[name]) for name, value in model.state_dict().items())


def test_where_two_samples_are_too_much_it_ends_in_one_line():
    with pytest.raises(HapError, match=r"^small: memory ran out with micro-batches of 2 samples \(CUDA out of memory"):
        fit(starved(0, net()), small(), RECIPE, rng=generator(0))


def test_other_errors_pass():
    def broken(batch_size, rng):
        raise RuntimeError("something else")
        yield

    with pytest.raises(RuntimeError, match="something else"):
        fit(net(), small(train=broken), RECIPE, rng=generator(0))
    for said in (
        "DefaultCPUAllocator: not enough memory: you tried",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    ):
        assert stepping.memory_ran_out(RuntimeError(said))
