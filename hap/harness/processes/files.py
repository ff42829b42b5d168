"""Files written whole or not at all, by one process at a time; knows nothing of what is in them."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

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
    """Holds the file for this process, waiting for another; the system lets go when a process dies.

    HapError where the lock cannot be written, or where the file system has no locks.
    """
    lock = _lock(file)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = _of(lock).acquire()
    except OSError as error:
        raise HapError(f"{lock}: cannot be written ({error.strerror})") from None
    with held:
        try:
            for left in file.parent.glob(f".{file.name}.*.tmp"):  # of a process that was killed while it wrote
                left.unlink(missing_ok=True)
            yield
        finally:
            lock.unlink(missing_ok=True)  # while it is held: who waits for it sees that it is gone, and begins again


def is_locked(file: Path) -> bool:
    """Whether another process holds the file now."""
    lock = _lock(file)
    try:
        if lock.exists():
            with _of(lock).acquire(blocking=False):
                lock.unlink(missing_ok=True)  # left by a process that was killed
    except Timeout:
        return True
    except OSError:  # nobody can hold what cannot be opened
        return False
    return False


def _lock(file: Path) -> Path:
    return file.with_name(f".{file.name}.lock")


def _of(lock: Path) -> FileLock:
    # a file that only exists would outlive a process that dies
    return FileLock(lock, fallback_to_soft=False)
