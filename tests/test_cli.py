"""What a command shows while it works. Its mistakes are in test_mistakes.py, its results in the tests of each part."""

import os
import pty
import subprocess
from contextlib import suppress
from pathlib import Path

from conftest import BIN, environment


def test_on_a_terminal_something_moves_while_torch_is_imported(project: Path) -> None:
    ours, theirs = pty.openpty()
    command = subprocess.Popen(
        [BIN / "fer", "config", "doe"], cwd=project, env=environment(TERM="xterm"), stdout=theirs
    )
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # at the end of the command
        while piece := os.read(ours, 1 << 16):
            shown += piece
    os.close(ours)
    assert command.wait() == 0
    assert b"Starting" in shown.partition(b"setting")[0]
