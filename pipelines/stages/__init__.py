"""The DVC stages. Each runs as `python -m pipelines.stages.<stage> <data set>` in the root folder of the project."""

import os
import sys
import threading
import time
from collections.abc import Callable

from fer.errors import UserError, disk_error
from fer.files import held
from pipelines.data_sets import SETS, Prepared, load
from pipelines.params import load as load_params

PATIENCE = 5.0  # seconds to wait for another stage, which may be ending with the dvc that started it


def run(stage: Callable[[Prepared], None]) -> None:
    """Run a stage on the data set that the command names, alone in its folder, no longer than the dvc that started it.

    It ends as `ended` says.
    """
    if "DVC_STAGE" in os.environ:
        threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()

    def work() -> None:
        one = load(load_params(), *sys.argv[1:2])
        one.folder.mkdir(parents=True, exist_ok=True)
        with held(one.folder, PATIENCE):
            stage(one)

    ended(work)


def ended(work: Callable[[], None]) -> None:
    """Do some work. A UserError or a disk error in it is printed and the exit status is 2."""
    try:
        work()
    except UserError as error:
        sys.exit(_fail(error))
    except OSError as error:
        known = disk_error(error, SETS)
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
