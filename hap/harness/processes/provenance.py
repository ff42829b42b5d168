"""What a record must say of where it was made: environment and code."""

import os
import platform
import subprocess
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hap

if TYPE_CHECKING:
    import torch

LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
PACKAGES = ("numpy", "scipy", "scikit-learn", "torchvision", "safetensors", "transformers")


def environment(device: "torch.device") -> dict[str, Any]:
    """Versions, device, threads and platform, as they are now; in one block what of the machine can move numbers."""
    import torch  # here, for whoever asks for the code alone need not wait for it

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "machine": _machine(device),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def processor() -> str:
    """The model of the processor, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _machine(device: "torch.device") -> dict[str, str]:
    """Processor, instruction set and what limits it; of a GPU its driver and the versions of CUDA and cuDNN too."""
    import torch

    found = {"processor": processor(), "instructions": torch.backends.cpu.get_cpu_capability()}
    found |= {name: os.environ[name] for name in LIMITS if os.environ.get(name)}
    if device.type != "cuda":
        return found
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found | {
        "driver": (driver or "unknown").splitlines()[0],  # a line for each GPU
        "cuda": str(torch.version.cuda),
        "cudnn": str(cudnn),
    }


def code(package: Path = Path(hap.__file__).parent) -> dict[str, Any]:
    """The sha256 over the sources of `package`; its commit, and whether it differs from it, where git knows it."""
    # a copy installed inside another repository is not of that repository's commit
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None
    commit = _git(package, "rev-parse", "HEAD") if tracked else None
    dirty = bool(_git(package, "status", "--porcelain", "--", ".")) if commit else None
    return {"commit": commit, "dirty": dirty, "sha256": checksum(package)}


def checksum(package: Path) -> str:
    """The sha256 over the names and the bytes of the sources of `package`."""
    total = sha256()
    for file in sorted(package.rglob("*.py")):
        total.update(f"{file.relative_to(package).as_posix()}\0".encode() + file.read_bytes())
    return total.hexdigest()


def _git(folder: Path, *arguments: str) -> str | None:
    return _said("git", "-C", str(folder), *arguments)


def _said(*command: str) -> str | None:
    """What a command prints; None where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
