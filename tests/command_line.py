"""What tests of the command line share."""

import pytest

from pathline.cli import main


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    """The command ends with exit code 2 and one line that says why."""
    capsys.readouterr()
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0], lines[0]
