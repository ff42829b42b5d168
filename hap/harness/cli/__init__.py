"""The command `hap`."""

from hap.harness.cli.app import main as main
