"""The command `fer`."""

import gc
import io
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError:
    sys.stderr.write("error: typer is missing: `make install`, or pip install -c constraints.txt -e '.[pipeline]'\n")
    sys.exit(2)

from fer.errors import UserError, disk_error
from pipelines.commands import champion, data, results, sweeping, training, using
from pipelines.commands.terminal import console, doing, with_torch


class _RunByDefault(typer.core.TyperGroup):
    """`fer sweep NAME` is `fer sweep run NAME`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = not args or args[0] in self.commands or args[0] == "--help"
        return super().parse_args(ctx, args if named else ["run", *args])


app = typer.Typer(
    help="Facial-expression-recognition experiments. `dvc repro` prepares the data; experiments/ is what to train.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
sweeps = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    help="Search for better settings of an experiment: `fer sweep NAME` runs sweeps/NAME.yaml.",
)
checks = typer.Typer(no_args_is_help=True, help="Look at the data that `dvc repro` has made.")


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"fer {version('fer-pipeline')}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    wanted: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@with_torch
def ui(
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow.", min=1, max=65535)] = 5000,
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect.", min=1, max=65535)] = 4200,
) -> None:
    """Start the MLflow and Prefect user interfaces on 127.0.0.1 until Ctrl-C."""
    from fer.errors import without_password
    from pipelines.guard import guarded
    from pipelines.params import load
    from pipelines.ui import Server, serve

    tracking = load().tracking
    with doing("Starting MLflow and Prefect"):
        from pipelines.tracking import Tracker

        tracker = Tracker(tracking.uri, tracking.experiment)
    servers = []
    if tracker.uri.startswith("http"):
        console.print(f"MLflow: {without_password(tracker.uri).rstrip('/')}{tracker.page}", soft_wrap=True)
    else:
        command = _server("mlflow", mlflow_port, "server", "--workers", "1")
        store = {"MLFLOW_BACKEND_STORE_URI": tracker.uri}  # on the command line others would see a password in it
        servers.append(Server("MLflow", mlflow_port, command, tracker.page, store))
    # where the page finds its data, which else is port 4200
    about = {"PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{prefect_port}/api"}
    servers.append(Server("Prefect", prefect_port, _server("prefect", prefect_port, "server", "start"), "", about))
    with guarded():
        serve(servers, Path("data/logs"), partial(console.print, soft_wrap=True))


def _server(program: str, port: int, *words: str) -> list[str]:
    """The full command line of a server that is installed beside this Python."""
    return [str(Path(sys.executable).parent / program), *words, "--host", "127.0.0.1", "--port", str(port)]


for command in (
    training.train, training.config, results.evaluate, results.ensemble, results.compare, using.predict, using.serve,
    using.explain, using.export, champion.promote, champion.rollback, champion.registry, training.models,
    data.upscale_gallery, ui,
):  # fmt: skip
    app.command()(command)
checks.command("check")(data.data_check)
sweeps.command("run")(sweeping.sweep_run)
sweeps.command("status")(sweeping.sweep_status)
sweeps.command("apply")(sweeping.sweep_apply)
app.add_typer(sweeps, name="sweep")
app.add_typer(checks, name="data")


def main() -> None:
    """Entry point. Errors are printed one per line; exit status 2 for mistakes of the user, 1 for other failures."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold what is no text
    try:
        sys.exit(app(prog_name="fer", standalone_mode=False))
    except typer.TyperException as error:  # of the words themselves
        _fail(_misused(error), 2)
    except UserError as error:
        _fail(error, 2)
    except RuntimeError as error:
        _fail(error, 1)
    except OSError as error:
        known = disk_error(error, "data")
        if known is None:
            raise
        _fail(known, 2)
    finally:
        gc.freeze()  # a last garbage collection of all that Ray, MLflow and torch left would take seconds


def _misused(error: typer.TyperException) -> UserError:
    """A command line that fits no command, in one line; none where typer has printed the help instead."""
    said, context = " ".join(error.format_message().split()).rstrip("."), getattr(error, "ctx", None)
    if not said or context is None:
        return UserError(said)
    return UserError(f"{context.command_path}: {said} (`{context.command_path} --help`)")


def _fail(error: BaseException, status: int) -> None:
    """The only place where a command says what went wrong."""
    for line in str(error).splitlines():
        sys.stderr.write(f"error: {line}\n")
    sys.exit(status)
