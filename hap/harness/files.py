"""Files written whole or not at all; knows nothing of what is in them."""

import os
from pathlib import Path

from hap import HapError


def atomic_write(file: Path, content: bytes) -> None:
    """Writes `content` so that a reader, a crash or a full disk meets the old file or the new one, never a part."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as error:
        raise HapError(f"{file}: cannot be written ({error.strerror}); what was there before is untouched") from None
    finally:
        temporary.unlink(missing_ok=True)
