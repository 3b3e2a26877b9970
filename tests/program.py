"""The program, run in the process of the test."""

import sys

import pytest

from growkit_cli import main as program


def growkit(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the program in this process: exit status, stdout, stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["growkit", *map(str, arguments)])
        patch.setenv("GROWKIT_DEBUG", "")
        status = 0
        try:
            program.main()
        except SystemExit as left:
            status = int(left.code or 0)
    out, err = capsys.readouterr()
    return status, out, err
