"""`fer predict`, `fer serve`, `fer explain` and `fer export`: what was trained at work on pictures."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import Progress, TextColumn

from fer.errors import UserError, without_password
from pipelines.commands.champion import registered
from pipelines.commands.terminal import (
    RUNS,
    bold,
    check_target,
    console,
    data_of,
    doing,
    find_model,
    find_run,
    print_rows,
    with_torch,
)

Yunet = Annotated[
    Path | None,
    typer.Option(metavar="FILE|hub", help="YuNet instead of OpenCV's Haar cascade; hub fetches its file once."),
]
MinFace = Annotated[
    int, typer.Option(metavar="PIXELS", help="Side of the smallest face to find; larger is faster.", min=0, max=100_000)
]
Margin = Annotated[float | None, typer.Option(help="Side of the crop in sides of the face's box.", min=0.1, max=10)]
Seconds = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="Average each face of a video over so long.", min=0.01)
]
Even = Annotated[
    float, typer.Option(help="0: classes as frequent as in training; 1: all equally; 0.5: between.", min=0, max=1)
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto, cpu or cuda.")]
FACES = 8  # that are explained
CHAMPION = (None, "champion")  # as the name of a run
_SO_FAR = (*Progress.get_default_columns(), TextColumn("{task.fields[news]}"))


@with_torch
def predict(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Pictures, videos, animations, or folders of them.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="A run id, or a checkpoint's folder; the champion by default.")
    ] = None,
    cropped: Annotated[bool, typer.Option("--cropped", help="Every picture is a face, cropped like the data.")] = False,
    boxes: Annotated[
        Path | None, typer.Option(help="Your own boxes: a table with file, left, top, right, bottom.")
    ] = None,
    camera: Annotated[
        str | None, typer.Option(help="A camera instead of files, by number or address, until Ctrl-C.")
    ] = None,
    smooth: Seconds = None,
    out: Annotated[Path, typer.Option(help="The table to write: .csv or .parquet.")] = Path("predictions.csv"),
    annotated: Annotated[Path | None, typer.Option(help="A folder for the pictures with their faces marked.")] = None,
    yunet: Yunet = None,
    min_face: MinFace = 0,
    margin: Margin = None,
    even: Even = 0.0,
    device: Device = "auto",
) -> None:
    """Find faces in pictures and videos and predict their expressions."""
    from PIL import Image

    from fer.faces.boxes import Boxes
    from fer.faces.detect import build_detector
    from fer.faces.predict import AT_ONCE
    from fer.faces.predict import camera as filmed
    from fer.predict import Predictor
    from pipelines import predicting

    check_target("--out", out, (".csv", ".parquet"))
    finders = {"--cropped": cropped, "--boxes": boxes, "--yunet": yunet}
    predicting.check(paths, camera, finders, {"--min-face": min_face, "--margin": margin})
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # it is read all the same
    with predicting.until_ctrl_c(camera is not None) as stopped:
        files = _files(paths or [])
        predicting.check_written(files, annotated, boxes, out)
        live = None if camera is None else filmed(camera, stopped)
        own = None if boxes is None else Boxes(boxes, files)
        detector = own or (None if cropped else build_detector(yunet, min_face))
        folder = _model(run)
        predictor = Predictor(folder, device, even)
        console.print(f"Model: {folder}", style="dim", highlight=False, markup=False)
        if camera is not None and not console.is_terminal:
            console.print(f"Reading camera {without_password(camera)} until Ctrl-C", style="dim", highlight=False)
        with Progress(*_SO_FAR, console=console, transient=True) as bar:
            pictures = _frames(files, bar) if live is None else _counted(live, bar)
            found = _predicted(predictor, pictures, detector, margin, 1 if live else AT_ONCE, smooth, annotated)
            counts, moving = _written(found, predictor.classes, out, smooth is not None)
    if smooth is not None and camera is None and not moving:
        console.print("--smooth: no file with several frames, so nothing was averaged", style="yellow")
    for what, count in counts.most_common():
        console.print(f"{count:6}  {what}", highlight=False, markup=False)
    console.print(bold(out))


def _files(paths: list[Path]) -> list[Path]:
    from pipelines import predicting

    files, others = predicting.files(paths) if paths else ([], 0)
    if others:
        console.print(f"{others} file(s) left out: no picture or video by their names", style="yellow")
    if files and not console.is_terminal:
        console.print(f"Reading {len(files)} file(s)", style="dim", highlight=False)
    return files


def _frames(files: list[Path], bar: Progress) -> Iterator[Any]:
    """The frames of all files; the bar counts files, and how far each is."""
    from fer.faces.predict import frames

    task = bar.add_task("files", total=len(files), news="")
    for place, file in enumerate(files):
        for frame in frames(file):
            bar.update(task, completed=place + frame.number / frame.of, news=f"{place + 1} of {len(files)}")
            yield frame
    bar.update(task, completed=len(files))


def _counted(frames: Iterator[Any], bar: Progress) -> Iterator[Any]:
    task = bar.add_task("camera, until Ctrl-C", total=None, news="")
    for frame in frames:
        bar.update(task, news=f"{frame.number + 1} frames")
        yield frame


def _predicted(
    predictor: Any, pictures: Iterator[Any], detector: Any, margin: float | None, at_once: int, smooth: float | None,
    annotated: Path | None,
) -> Iterator[Any]:  # fmt: skip
    """The faces in the pictures, averaged over time and drawn into copies as they come, where that is wanted."""
    from fer.faces.annotate import annotate
    from fer.faces.predict import predict as faces_in
    from fer.faces.smooth import smooth as averaged

    found = faces_in(predictor, pictures, detector, margin, at_once)
    if smooth is not None:
        found = averaged(found, smooth)
    if annotated is None:
        return found
    annotated.mkdir(parents=True, exist_ok=True)
    return annotate(found, annotated, predictor.classes)


def _written(found: Iterable[Any], classes: list[str], out: Path, smoothed: bool) -> tuple[Counter[str], bool]:
    """Write the table; returns how often each expression or note occurs, and whether anything has several frames."""
    from pipelines import predicting

    counts, moving = Counter[str](), False
    for one in predicting.write(found, classes, out, smoothed):
        row = one.row(classes)
        counts[str(row["prediction"] or row["note"])] += 1
        moving |= one.frame.number > 0
    return counts, moving


@with_torch
def serve(
    run: Annotated[
        str | None, typer.Option(help="A run id, or a checkpoint's folder; without, the champion, whoever that is.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=1, max=65535)] = 8080,
    yunet: Yunet = None,
    min_face: MinFace = 0,
    even: Even = 0.0,
    device: Device = "auto",
    batching: Annotated[
        bool, typer.Option("--batching/--no-batching", help="Faces of several requests share a pass.")
    ] = True,
) -> None:
    """Answer for pictures over HTTP, and with a page, on 127.0.0.1 until Ctrl-C."""
    from fer.faces.detect import build_detector
    from pipelines import serving
    from pipelines.answering import Models

    with closing(serving.listen(port)) as listener:
        serving.set_up()
        detector = build_detector(yunet, min_face)
        folder = None if run in CHAMPION else _model(run)
        find = _champion() if folder is None else lambda: (folder, None)
        models = Models(find, detector, device, even)
        console.print(f"{models.now.names['run']} answers: http://127.0.0.1:{port}. Ctrl-C stops it.", highlight=False)
        stop = models.follow(partial(console.print, markup=False, highlight=False)) if folder is None else None
        serving.serve(serving.build_app(models, batching), listener)
        if stop is not None:
            stop()
    console.print("Stopped.")


@with_torch
def explain(
    run: Annotated[str, typer.Argument(help="A run id, or a checkpoint's folder; or `champion`.")],
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Pictures of faces, cropped like the data; else test images.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write, which shows the faces.")] = ...,  # type: ignore[assignment]
    faces: Annotated[
        int | None, typer.Option(help="How many test images, drawn by --seed; 8 by default.", min=1)
    ] = None,
    names: Annotated[str | None, typer.Option(help="Names of test images instead, with commas between them.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw, the random weights and the random orders.", min=0)] = 0,
    device: Device = "auto",
) -> None:
    """Draw what predictions rest on, beside the same of random weights, and test whether that says anything."""
    from fer import explain as explaining
    from fer.files import new_folder, refuse_beside
    from fer.predict import Predictor
    from pipelines import explaining as writing

    if os.path.lexists(out):
        raise UserError(f"--out {out}: exists already; name another folder")
    if paths and names is not None:
        raise UserError("--names: is for test images; leave it out, or the pictures")
    if faces is not None and (paths or names is not None):
        raise UserError("--faces: draws test images; leave it out, or name none")
    folder = _model(run)
    predictor = Predictor(folder, device)
    chosen = writing.read(paths, predictor) if paths else _test_faces(folder, faces or FACES, names, seed)
    if why := explaining.no_grad_cam(predictor):
        console.print(f"{explaining.OCCLUSION} alone, without {explaining.GRAD_CAM}: {why}", style="yellow")
    refuse_beside(out)
    with new_folder(out) as partial, Progress(console=console, transient=True) as bar:
        found = explaining.explain(predictor, chosen.pixels, seed)
        shown = bar.track(found, total=len(chosen.names), description="faces")
        verdicts = writing.write(partial, chosen, shown, predictor.classes)
    rows = ((verdict.method, *map(writing.shown, writing.checks(verdict).values())) for verdict in verdicts)
    print_rows((f"mean of {len(chosen.names)}", *writing.CHECKS), rows)
    console.print(writing.LEGEND, style="dim", highlight=False)
    for verdict in verdicts:
        console.print(f"{verdict.method}: {verdict.words}", highlight=False)
    console.print(f"{bold(out)} shows faces: mind where you copy it")


def _test_faces(folder: Path, count: int, names: str | None, seed: int) -> Any:
    from fer.run_folder import CONFIG
    from pipelines.explaining import of_test

    if not (folder / CONFIG).exists():
        raise UserError(f"{folder}: is no run's folder, so its test images are unknown; name pictures of faces")
    return of_test(folder, data_of(folder), count, None if names is None else names.split(","), seed)


@with_torch
def export(
    run: Annotated[str | None, typer.Argument(help="A run id, or the start of one; the champion by default.")] = None,
    to: Annotated[
        Literal["folder", "onnx"], typer.Option(help="A folder with a model card, or one ONNX file.")
    ] = "folder",
    out: Annotated[Path | None, typer.Option(help="What to write; exports/<run id> or .onnx by default.")] = None,
) -> None:
    """Write a finished run as a folder that `Predictor` loads, or as an ONNX file for other programs."""
    from fer import export as exporting

    folder = _model(run) if run in CHAMPION else find_run(run)
    target = out or Path("exports") / (folder.name if to == "folder" else f"{folder.name}.onnx")
    with doing(f"Writing {target}"):
        if to == "folder":
            exporting.write_folder(folder, target)
        else:
            worst = exporting.write_onnx(folder, target)
    if to == "onnx":
        console.print(f"Probabilities as torch's for batches of 1, 3 and 7 faces: to {worst:.1g}", highlight=False)
    console.print(bold(target))


def _model(run: str | None) -> Path:
    """The folder of a checkpoint: of the run that is named, else of the champion of the current data set."""
    return _champion()()[0] if run in CHAMPION else find_model(run)


def _champion() -> Callable[[], tuple[Path, str]]:
    """A function that looks who is champion of the current data set: the folder of its run, and its version."""
    from pipelines.predicting import checkpoint_of
    from pipelines.store import check_answers

    name, tracker = registered(None)

    def find() -> tuple[Path, str]:
        check_answers(tracker.uri)
        with tracker.in_one_line():
            champions = tracker.registry.champions()
        return checkpoint_of(champions, name.removeprefix("fer-"), RUNS), champions[name]["version"]

    return find
