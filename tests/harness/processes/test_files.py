"""Locks: one holder at a time, nothing left behind."""

import errno
from concurrent.futures import ThreadPoolExecutor

import pytest

from hap import HapError
from hap.harness.processes.files import is_locked, locked


def test_one_holds_a_file_at_a_time_though_the_lock_is_removed_after_each(tmp_path):
    """Threads wait for each other as processes do, for each opens the lock by itself."""
    file = tmp_path / "counter"
    file.write_text("0")

    def count(_):
        with locked(file):
            file.write_text(str(int(file.read_text()) + 1))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(80)))
    assert file.read_text() == "80"
    assert [path.name for path in tmp_path.iterdir()] == ["counter"]


def test_a_lock_is_seen_while_it_is_held(tmp_path):
    file = tmp_path / "folder" / "record"
    assert not is_locked(file)
    with locked(file):
        assert is_locked(file)
    assert not is_locked(file)


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch):
    def refuses(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock._unix.fcntl.flock", refuses)
    with pytest.raises(HapError) as caught, locked(tmp_path / "record"):
        pass
    assert str(caught.value) == f"{tmp_path / '.record.lock'}: cannot be written (No locks available)"
