"""Files written whole or not at all, by one process at a time; knows nothing of what is in them."""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from hap import HapError


def atomic_write(file: Path, content: bytes) -> None:
    """Writes `content` so that a reader, a crash or a full disk meets the old file or the new one, never a part."""
    atomic_writes({file: content})


def atomic_writes(contents: Mapping[Path, bytes]) -> None:
    """Writes several files; a full disk leaves all as they were, for each is in its place only when all are written."""
    temporary = {file: file.with_name(f".{file.name}.{os.getpid()}.tmp") for file in contents}
    file = next(iter(contents))
    try:
        for file, content in contents.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            with temporary[file].open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        for file in contents:
            os.replace(temporary[file], file)
    except OSError as error:
        raise HapError(f"{file}: cannot be written ({error.strerror}); what was there before is untouched") from None
    finally:
        for left in temporary.values():
            with suppress(OSError):
                left.unlink(missing_ok=True)


def cache() -> Path:
    """Where trained networks and unfinished trainings lie: $HAP_CACHE, else ./.hap."""
    return Path(os.environ.get("HAP_CACHE") or ".hap")


@contextmanager
def caching(folder: Path) -> Iterator[None]:
    """Within it, trained networks and unfinished trainings lie in `folder`, not where the real ones do."""
    before = os.environ.get("HAP_CACHE")
    os.environ["HAP_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["HAP_CACHE"]
        os.environ.update({} if before is None else {"HAP_CACHE": before})


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Holds the file for this process, waiting for another; the system lets go when a process dies."""
    lock = _lock(file)
    descriptor = _acquire(lock)
    try:
        for left in file.parent.glob(f".{file.name}.*.tmp"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def is_locked(file: Path) -> bool:
    """Whether another process holds the file now."""
    try:
        descriptor = os.open(_lock(file), os.O_RDWR)
    except OSError:  # no one made the lock
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)


def _lock(file: Path) -> Path:
    return file.with_name(f".{file.name}.lock")


def _acquire(lock: Path) -> int:
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise HapError(f"{lock}: cannot be written ({error.strerror})") from None
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _same(descriptor, lock):
            return descriptor
        os.close(descriptor)  # the holder removed the file while this process waited for it


def _same(descriptor: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except FileNotFoundError:
        return False
