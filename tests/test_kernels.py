"""Triton's kernels without a GPU: interpreted, for which Triton must know before anything imports it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_do_what_torch_does():
    pytest.importorskip("triton", minversion="3.7")  # 3.6 interprets no loop with NumPy 2.5
    tests = Path(__file__).with_name("interpreted_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
