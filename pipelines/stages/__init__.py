"""The DVC stages. Each is run as `python -m pipelines.stages.<name>` in the project's root folder."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fer.errors import UserError, disk_error
from pipelines.params import Params, load


def run(stage: Callable[[Params], None]) -> None:
    """Run a stage with the checked params.yaml; a user's mistake ends in one line and exit status 2."""
    try:
        stage(load())
    except UserError as error:
        sys.exit(_fail(error))
    except OSError as error:
        known = disk_error(error, "data")
        if known is None:
            raise
        sys.exit(_fail(known))


def _fail(error: UserError) -> int:
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return 2


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write in that takes the place of `target` when the block ends, and vanishes when it fails."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(target, ignore_errors=True)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
