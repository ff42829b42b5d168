"""What a record must say of where it was made: environment and code."""

import platform
import subprocess
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hap

if TYPE_CHECKING:
    import torch

PACKAGES = ("numpy", "scipy", "scikit-learn", "torchvision", "safetensors", "transformers")


def environment(device: "torch.device") -> dict[str, Any]:
    """Versions, device, threads and platform, as they are now."""
    import torch  # here, for whoever asks for the code alone need not wait for it

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
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
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
