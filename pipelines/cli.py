"""The command `fer`."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table

from fer.errors import UserError, disk_error
from pipelines import report

app = typer.Typer(
    help="Facial-expression-recognition experiments: params.yaml says what, `dvc repro` makes the data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console(width=None if sys.stdout.isatty() else 120)
Overrides = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key of params.yaml.")]
Names = Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Models of params.yaml; all without.")]
RUNS = Path("data/runs")


class _RunByDefault(typer.core.TyperGroup):
    """`fer sweep NAME` is `fer sweep run NAME`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = not args or args[0] in self.commands or args[0] == "--help"
        return super().parse_args(ctx, args if named else ["run", *args])


sweeps = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    help="Search for better settings of a model: `fer sweep NAME`, of params.yaml.",
)
app.add_typer(sweeps, name="sweep")


@app.command()
def train(
    names: Names = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Train models at the same time, evaluate them, record them in MLflow and register the best."""
    from pipelines.params import load

    params = load(overrides=overrides)  # before the frameworks, which take seconds to import
    # the bars and the table say it better; Prefect's UI has the whole log
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    from pipelines import flow

    runs, tracker = flow.prepare(params, names or [])
    folders = [folder for _, folder in runs.values()]
    if all(tracker.recorded(folder) for folder in folders):
        console.print(f"Nothing to do: {len(folders)} run(s) are finished and recorded.")
    else:
        _warn_of_random_weights({name: run for name, (run, _) in runs.items()})
        with _Bars(folders):
            state = flow.train(list(runs), overrides, return_state=True)
        failed = _failures(state)
        if failed:
            raise _first_failure(failed)
    _print_table(report.finished(folders))
    _print_champions(tracker)
    console.print("Look closer: [bold]fer ui[/] (MLflow and Prefect), [bold]fer evaluate RUN[/], [bold]fer compare[/].")


@app.command()
def evaluate(run: Annotated[str, typer.Argument(help="A run id, or the start of one.")]) -> None:
    """Show a finished run's numbers on val and test, class by class."""
    from fer.evaluate import evaluate as evaluate_run

    folder = _find(run)
    summary = evaluate_run(folder, "data")
    _print_table([summary])
    table = Table("class", "test images", "found %", "most often taken for", title="Test, class by class")
    confusion = summary["test"]["confusion"]
    for index, name in enumerate(summary["classes"]):
        line, recall = confusion[index], summary["test"]["recall"][index]
        wrong = max((count, other) for other, count in enumerate(line) if other != index)
        taken = f"{summary['classes'][wrong[1]]} ({wrong[0]})" if wrong[0] else "-"
        table.add_row(name, str(sum(line)), "-" if recall is None else f"{100 * recall:.1f}", taken)
    console.print(table)
    console.print(f"Predictions, confusion matrix, checkpoint: [bold]{folder}[/]")


@app.command()
def compare() -> None:
    """Compare all finished runs, each with its data, and the published numbers for that data set."""
    summaries = report.finished(RUNS.glob("*"))
    if not summaries:
        raise UserError(f"{RUNS}: no finished run; train one with `fer train`")
    by_data: dict[str, list[dict[str, Any]]] = {}
    for summary in summaries:
        by_data.setdefault(summary["data_hash"], []).append(summary)
    for data_hash, group in by_data.items():
        data = group[0]["data"]
        _print_table(group, title=f"{data['dataset']}, {data.get('label_mode', '')} labels, data {data_hash}")
        if data["dataset"] in report.PUBLISHED:
            table = Table("published", "test accuracy", "starts from", title="Published on this data set")
            for name, accuracy, start in report.PUBLISHED[data["dataset"]]:
                table.add_row(name, f"{accuracy:.2f}", start)
            console.print(table)


@app.command()
def models(
    names: Names = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Show what the models of params.yaml cost and where their weights come from; nothing is loaded."""
    from fer.data.labels import CLASSES
    from fer.models import backbones_of, origin
    from fer.models.cost import cost
    from pipelines.params import load

    params = load(overrides=overrides)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("model", no_wrap=True)
    for column in ("parameters", "learning", "GFLOP", "input"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("network: its weights")
    missing = []
    for name in params.named(names or []):
        run = params.models[name]
        networks = [options.name for options in backbones_of(run).values()] or [run.model]
        sources = "\n".join(f"{network}: {source}" for network, source in zip(networks, origin(run)))
        try:
            found = cost(run, len(CLASSES))
            numbers = f"{found.parameters / 1e6:.2f}M", f"{found.trainable / 1e6:.2f}M", f"{found.gflop:.3g}"
        except UserError as error:
            missing.append(f"{name}: {error}")
            numbers = "-", "-", "-"
        table.add_row(name, *numbers, f"{run.image_size}x{run.image_size}x{run.channels}", sources)
    console.print(table)
    console.print(
        "learning: parameters that training changes. GFLOP: one image forward, a multiplication and an addition are "
        "two; training costs three times that for the part that learns. input: what image_size and channels give.",
        style="dim",
    )
    if missing:
        raise UserError("\n".join(missing))


@app.command()
def upscale_gallery(
    faces: Annotated[int, typer.Option(help="How many faces, evenly spaced in the data.", min=1)] = 6,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Draw the same faces enlarged by every super-resolution method whose weights are there, one row each."""
    import numpy as np
    import torch

    from fer.data.charts import contact_sheet
    from fer.data.images import open_images
    from fer.super_resolution.methods import METHODS, OUT_OF_MEMORY, build_upscaler
    from pipelines.params import load

    config = load(overrides=overrides).super_resolution
    images = open_images("data/raw/images.npy", "download")
    chosen = images[np.unique(np.linspace(0, len(images) - 1, faces).astype(int))]
    rows, left_out = {"as it is": chosen.repeat(4, 1).repeat(4, 2)}, []
    for name, method in METHODS.items():
        if name == "none":
            continue
        scale = max(method.scales or (8,))
        try:
            with console.status(f"{name} x{scale}"):
                upscale = build_upscaler(name, scale, config.weights, config.hub_id, config.precision, config.device)
                rows[f"{name} x{scale}"] = upscale(chosen, 1)
        except UserError as error:
            left_out.append(f"{name} left out: {error}")
        except torch.OutOfMemoryError:
            left_out.append(f"{name} left out: {OUT_OF_MEMORY}")
    path = Path("data/upscale_gallery.png")
    contact_sheet(rows, side=4 * images.shape[1]).save(path)
    console.print(f"[bold]{path}[/]: {', '.join(rows)}")
    for line in left_out:
        console.print(line, style="yellow")


@sweeps.command(name="run")
def sweep_run(
    name: Annotated[str, typer.Argument(help="A sweep of params.yaml.")],
    new: Annotated[bool, typer.Option("--new", help="Start another where settings differ from the one begun.")] = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Search, confirm the best with other seeds, record all in MLflow; goes on where it was cut."""
    from pipelines import trials
    from pipelines.params import load, space_of

    params = load(overrides=overrides)
    space_of(params, name)  # before the frameworks, which take seconds to import
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    from pipelines import flow

    plan, _ = flow.prepare_sweep(params, name, new)
    if trials.complete(plan):
        console.print(f"Nothing to do: {plan.folder.name} is complete; raise trials or hours to go on.")
    else:
        _warn_of_random_weights({plan.sweep.base: plan.base})
        with _Board(plan.folder):
            state = flow.sweep(name, overrides, new, return_state=True)
        failed = _failures(state)
        if failed:
            raise _first_failure(failed)
    console.print(_trials_table(plan.folder))
    _print_result(plan.folder)


@sweeps.command(name="status")
def sweep_status(name: Annotated[str | None, typer.Argument(help="A sweep; all without.")] = None) -> None:
    """Show the trials of a sweep and the best so far, also while it runs elsewhere."""
    from pipelines import trials

    found = trials.folders(name)
    if not found:
        raise UserError(
            f"{trials.SWEEPS}: no sweep {name or ''} yet; start one with `fer sweep NAME`".replace("  ", " ")
        )
    for folder in found:
        console.print(_trials_table(folder))
        _print_result(folder)


@sweeps.command(name="apply")
def sweep_apply(
    name: Annotated[str, typer.Argument(help="A finished sweep.")],
    new_name: Annotated[
        str | None, typer.Option("--as", metavar="MODEL", help="Name of the model; NAME_best without.")
    ] = None,
) -> None:
    """Write the best settings of a finished sweep into params.yaml as a model; nothing else there changes."""
    from pipelines import trials
    from pipelines.params import add_model

    found = [(folder, result) for folder in trials.folders(name) if (result := trials.result(folder))]
    if not found:
        raise UserError(f"sweeps.{name}: no finished sweep of that name; run `fer sweep {name}`")
    folder, result = found[0]
    model = new_name or result["best_name"]
    add_model("params.yaml", model, result["run"], result["base"], report.sweep_line(result))
    console.print(f"params.yaml: models.{model}, from {folder.name}; train it with [bold]fer train {model}[/]")


@app.command()
def ui(
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow.")] = 5000,
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect.")] = 4200,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Start the MLflow and Prefect user interfaces on 127.0.0.1 until Ctrl-C."""
    from pipelines.params import load
    from pipelines.tracking import tracking_uri

    uri = tracking_uri(load(overrides=overrides).tracking.uri)
    servers = {}
    if uri.startswith("http"):
        console.print(f"MLflow runs at [bold]{uri}[/]")
    else:
        servers["MLflow", mlflow_port] = ["mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
    servers["Prefect", prefect_port] = ["prefect", "server", "start"]
    _serve(servers)


def _serve(servers: dict[tuple[str, int], list[str]]) -> None:
    """Run servers on 127.0.0.1 and end them all when one ends or on Ctrl-C."""
    import socket

    for (name, port), _ in servers.items():
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                raise UserError(f"--{name.lower()}-port {port}: the port is in use; stop what uses it or give another")
    bin_folder = Path(sys.executable).parent
    running = []
    for (name, port), (program, *words) in servers.items():
        command = [str(bin_folder / program), *words, "--host", "127.0.0.1", "--port", str(port)]
        running.append(
            subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        )
        console.print(f"{name}: [bold]http://127.0.0.1:{port}[/]")
    console.print("Ctrl-C ends both.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while all(server.poll() is None for server in running):
            time.sleep(0.3)
        ended = next(server for server in running if server.poll() is not None)
        raise UserError(f"{Path(ended.args[0]).name} ended: {_last_line(ended)}")  # type: ignore[index, arg-type]
    except KeyboardInterrupt:
        console.print("Stopped.")
    finally:
        for server in running:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
        for server in running:
            server.wait(timeout=15)


def _last_line(server: subprocess.Popen) -> str:
    text = server.stderr.read().decode(errors="replace").strip() if server.stderr else ""
    return text.splitlines()[-1] if text else f"exit status {server.returncode}"


class _Board:
    """The table of a sweep's trials, drawn anew from what they write."""

    def __init__(self, folder: Path):
        self.folder, self.stop = folder, threading.Event()
        self.live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> None:
        self.live.start()
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()
        self.live.stop()

    def _follow(self) -> None:
        while not self.stop.wait(1.0):
            if console.is_terminal:
                self.live.update(_trials_table(self.folder), refresh=True)


def _trials_table(folder: Path) -> Table:
    """Trials, best first; below them how far the sweep is, and the time that is left."""
    from pipelines import trials

    found, about = trials.read_trials(folder), json.loads((folder / "sweep.json").read_text())
    rows = report.trial_rows(found, about["run"]["epochs"])
    columns = [Column(key, justify="right", no_wrap=key in list(rows[0])[:5]) for key in rows[0]] if rows else []
    over = trials.result(folder) is not None and not trials.running(folder)
    caption = None if over else report.progress(found, about, trials.spent(folder), trials.running(folder))
    table = Table(
        *columns, title=folder.name, caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1)
    )
    for row in rows[: max(8, console.height - 8) if console.is_terminal else None]:
        table.add_row(*row.values())
    return table


def _print_result(folder: Path) -> None:
    from pipelines import trials

    found = trials.result(folder)
    if found is not None:
        console.print(Markdown(report.sweep_note(found)))
        name = folder.name.rpartition("-")[0]
        console.print(
            f"Pictures and trials.csv: [bold]{folder}[/]. Keep the best: [bold]fer sweep apply {name} --as MODEL[/]"
        )


class _Bars:
    """A progress bar per run, drawn from the files that the runs write, so that it shows runs on any machine."""

    def __init__(self, folders: list[Path]):
        self.folders, self.stop = folders, threading.Event()
        self.progress = Progress(
            TextColumn("{task.fields[run]}"),
            BarColumn(bar_width=20),
            TextColumn("epoch"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[news]}"),
            console=console,
        )

    def __enter__(self) -> None:
        self.progress.start()
        self.tasks = [self.progress.add_task("", total=None, run=path.name, news="waiting") for path in self.folders]
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()
        self._look()
        self.progress.stop()

    def _follow(self) -> None:
        while not self.stop.wait(0.5):
            self._look()

    def _look(self) -> None:
        for folder, task in zip(self.folders, self.tasks):
            rows = _lines(folder / "metrics.jsonl")
            now = _lines(folder / "progress.json", whole=True)
            if not now:
                continue
            done = now[0]["epoch"] + now[0]["step"] / now[0]["steps"]
            news = f"val accuracy {100 * max(row['val_accuracy'] for row in rows):.2f} %" if rows else "training"
            if (folder / "summary.json").exists():
                news += ", evaluated"
            self.progress.update(task, completed=round(done, 1), total=now[0]["epochs"], news=news)


def _lines(path: Path, whole: bool = False) -> list[dict[str, Any]]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return [json.loads(text)] if whole else [json.loads(line) for line in text.splitlines()]


def _warn_of_random_weights(runs: dict[str, Any]) -> None:
    from fer.models import random_backbones

    for name, run in runs.items():
        for backbone in random_backbones(run):
            console.print(
                f"{name}: {backbone} starts from random weights; its numbers are not those of papers that start from "
                "pretrained ones",
                style="yellow",
            )


def _failures(state: Any) -> dict[str, BaseException]:
    """name -> error of the runs that failed; the flow's own error under `flow`."""
    result = state.result(raise_on_failure=False)
    return {"flow": result} if isinstance(result, BaseException) else result


def _first_failure(failed: dict[str, BaseException]) -> BaseException:
    """One error that tells of all: the user's if all are the user's, else one of the program."""
    lines = "\n".join(str(error) for error in failed.values())
    if all(isinstance(error, UserError) for error in failed.values()):
        return UserError(lines)
    return RuntimeError(lines)


def _find(run: str) -> Path:
    """The folder of the one run whose id starts with `run`."""
    found = sorted(path for path in RUNS.glob(f"{run}*") if path.is_dir())
    if not found:
        known = ", ".join(sorted(path.name for path in RUNS.glob("*") if path.is_dir())) or "none yet"
        raise UserError(f"{run}: no such run in {RUNS}; runs: {known}")
    if len(found) > 1 and RUNS / run not in found:
        raise UserError(f"{run}: fits several runs, give more of the id: {', '.join(path.name for path in found)}")
    return RUNS / run if RUNS / run in found else found[0]


def _print_table(summaries: list[dict[str, Any]], title: str | None = None) -> None:
    first, *others = report.COLUMNS
    columns = [Column(first, no_wrap=True), *(Column(other, justify="right", no_wrap=True) for other in others)]
    table = Table(*columns, title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for summary in summaries:
        table.add_row(*report.row(summary).values())
    console.print(table)
    console.print(report.LEGEND, style="dim")


def _print_champions(tracker: Any) -> None:
    for name, tags in tracker.champions().items():
        accuracy = 100 * float(tags["val_accuracy"])
        console.print(f"models:/{name}@champion: version {tags['version']}, {tags['fer.run_id']}, val {accuracy:.2f} %")


def main() -> None:
    """Entry point: a user's mistake is one line and exit status 2, anything else one line and 1."""
    try:
        app()
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
        gc.freeze()  # else Python looks through all that Ray, MLflow and torch left once more, for seconds


def _fail(error: BaseException, status: int) -> None:
    for line in str(error).splitlines():
        sys.stderr.write(f"error: {line}\n")
    sys.exit(status)
