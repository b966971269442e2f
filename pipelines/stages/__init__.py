"""The DVC stages. Each runs as `python -m pipelines.stages.<name>` in the root folder of the project."""

import sys
from collections.abc import Callable

from fer.errors import UserError, disk_error
from pipelines.params import Params, load


def run(stage: Callable[[Params], None]) -> None:
    """Run a stage with the validated params.yaml; a UserError or a disk error is printed and the exit status is 2."""
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
    for line in error.lines:
        sys.stderr.write(f"error: {line}\n")
    return 2
