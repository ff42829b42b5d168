"""A pruned model leaves Python as any module does: torch.export and ONNX compute what it computes.

The oracle is the pruned model itself, on batches of other sizes than the one exported; that it is right, surgery's
tests find out.
"""

import io

import pytest
import torch
from torch import nn

from hap import Budget, CrossEntropy, apply, couple, trace
from hap.harness.tasks.nets import preresnet, resnet, vgg16
from hap.implants import centre_tap, least_squares
from hap.methods import magnitude
from hap.plan import plan
from hap.surgery.patch import Patch


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pruned(build, how, implant):
    """Half of the parameters pruned, BatchNorm statistics far from their defaults, channels last as in the tasks."""
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3, generator=seeded(1))
            nn.init.uniform_(module.running_var, 0.5, 2.0, generator=seeded(2))
    x = torch.randn(2, 3, 16, 16, generator=seeded(3))
    groups = couple(model, trace(model, x), how)
    chosen = plan(groups, magnitude(model, CrossEntropy(), [], groups, rng=seeded()), Budget(params=0.5, implant=0.3))
    small = apply(model, groups, chosen, implant, batches=[x]).to(memory_format=torch.channels_last)
    return small.eval(), x


MODELS = {
    "union-residuals": lambda: pruned(lambda: preresnet(11, (8, 12, 16), rng=seeded()), "union", least_squares),
    "projections": lambda: pruned(lambda: resnet(8, (8, 12, 16), "B", rng=seeded()), "union", centre_tap),
    "tied": lambda: pruned(lambda: resnet(8, (8, 12, 16), "A", rng=seeded()), "tied", centre_tap),
}


@pytest.fixture(params=MODELS)
def model(request):
    small, x = MODELS[request.param]()
    patches = [module for module in small.modules() if isinstance(module, Patch)]
    assert any(len(patch.parts) == 2 for patch in patches)  # implants
    if request.param != "tied":
        assert any(len(patch.places) < patch.width for patch in patches)  # zeros in a stream
    return small, x


def sizes(x):
    return [x, torch.cat([x, -x, x[:1]]), x[:1]]


# the packer takes weights that lie channels last for slices of something larger; they come back whole, as is tested
@pytest.mark.filterwarnings("ignore:No complete tensor found:UserWarning")
@torch.no_grad()
def test_torch_export_computes_the_same_for_any_batch_and_comes_back_from_a_file(model):
    small, x = model
    program = torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in sizes(x):
        torch.testing.assert_close(program.module()(batch), small(batch), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loaded(batch), small(batch), rtol=1e-5, atol=1e-6)


# torch's exporter uses what torch and onnxscript have deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@torch.no_grad()
def test_onnx_runtime_computes_the_same_for_any_batch(model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    small, x = model
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    torch.onnx.export(small, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False).save(tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    for batch in sizes(x):
        (found,) = session.run(None, {name: batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), small(batch), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_network_without_batchnorm_is_exported_with_its_biases():
    small, x = pruned(lambda: nn.Sequential(vgg16(rng=seeded())).eval(), "tied", centre_tap)
    program = torch.export.export(small, (x,))
    torch.testing.assert_close(program.module()(x), small(x), rtol=1e-4, atol=1e-5)
