"""The program, run in the process of the test."""

import sys

import pytest
import typer

from growkit_cli import main as program

COMMAND = typer.main.get_command(program.app)  # calling the app would build it anew each time, which is slow


def growkit(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the program in this process: exit status, stdout, stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["growkit", *map(str, arguments)])
        patch.setattr(program, "app", COMMAND)
        patch.setenv("GROWKIT_DEBUG", "")
        status = 0
        try:
            program.main()
        except SystemExit as left:
            status = int(left.code or 0)
    out, err = capsys.readouterr()
    return status, out, err
