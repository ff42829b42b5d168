"""What is said of convolutions: a process that dies, hangs or computes nonsense is told as what it did."""

import signal
import subprocess

import pytest

from hap.harness.cli import probe
from hap.harness.cli.probe import KNOWN, Shape, errors, line, verdict


def test_a_convolution_without_a_fault_is_right_in_each_part():
    assert max(errors(Shape(16, 8, 8, dtype="float32"))) < 1e-5
    assert len(errors(Shape(3, 8, 8, last=False, backward=False))) == 3
    assert 1e-4 < max(errors(Shape(16, 8, 8, dtype="bfloat16"))) < 0.1


@pytest.mark.parametrize(
    ("code", "printed", "told"),
    [
        (0, "[1e-7, 1e-7, 1e-7]", None),
        (0, "[1e-7, 1e-7, 0.8]", "gives a wrong gradient of the weight (by 0.8)"),
        (0, "[NaN, 1e-7, 1e-7]", "gives a wrong output (by nan)"),
        (-signal.SIGSEGV, "", "dies of SIGSEGV"),
        (1, "", "fails: ValueError: no"),
    ],
)
def test_what_a_process_did_is_said(monkeypatch, code, printed, told):
    done = subprocess.CompletedProcess([], code, printed, "Traceback\nValueError: no\n")
    monkeypatch.setattr(probe.subprocess, "run", lambda *given, **options: done)
    assert verdict(KNOWN) == told
    assert line().startswith("convolutions: torch " if told else "convolutions: right")


def test_a_process_that_does_not_end_is_ended(monkeypatch):
    assert verdict(KNOWN, seconds=0.01) == "does not end in 0 s"
    monkeypatch.setattr(probe, "verdict", lambda *given, **options: "does not end in 20 s")
    assert line() == "convolutions: not known, for the probe does not end in 20 s: it hangs, or the machine is busy"


def test_the_process_is_real():
    assert verdict(Shape(16, 8, 8)) is None
    assert "no_such_dtype" in verdict(Shape(16, 8, 8, dtype="no_such_dtype"))
