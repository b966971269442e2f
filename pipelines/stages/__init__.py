"""The DVC stages. Each runs as `python -m pipelines.stages.<name>` in the root folder of the project."""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fer.errors import UserError, disk_error
from fer.files import held
from pipelines.params import Params, load

DATA = Path("data")
PATIENCE = 5.0  # seconds to wait for another stage, which may be ending with the dvc that started it


def run(stage: Callable[[Params], None]) -> None:
    """Run a stage with the validated params.yaml, alone in the data folder, and no longer than the dvc that started it.

    A UserError or a disk error is printed and the exit status is 2.
    """
    if "DVC_STAGE" in os.environ:
        threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    try:
        params = load()
        with held(DATA, PATIENCE):
            stage(params)
    except UserError as error:
        sys.exit(_fail(error))
    except OSError as error:
        known = disk_error(error, DATA)
        if known is None:
            raise
        sys.exit(_fail(known))


def _end_with(parent: int) -> None:
    """Exit when the process that started this one is gone: its next run may want other data in the same place."""
    while os.getppid() == parent:
        time.sleep(0.2)
    try:
        _fail(UserError("dvc, which started this stage, is gone; run `dvc repro` again"))
    finally:
        os._exit(2)


def _fail(error: UserError) -> int:
    for line in error.lines:
        sys.stderr.write(f"error: {line}\n")
    return 2
