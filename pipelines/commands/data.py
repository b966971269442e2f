"""`fer data check` and `fer upscale-gallery`: a look at the data that `dvc repro` has made."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fer.errors import UserError
from pipelines.commands.terminal import bold, console, doing, with_torch

Prepared = Annotated[str | None, typer.Argument(metavar="[NAME]", help="A data set; the first in params.yaml if none.")]


@with_torch
def data_check(
    name: Prepared = None,
    faces: Annotated[
        str | None,
        typer.Option(metavar="haar|hub|FILE", help="Name images without a face, by Haar cascade or YuNet."),
    ] = None,
) -> None:
    """Look for copies, doubtful labels, blank images and people on two sides; write check.json and check.html."""
    from fer.data.check import NAMED, check
    from fer.data.dataset import open_data
    from fer.data.doubts import doubted
    from fer.data.images import open_images
    from fer.faces.detect import build_detector
    from pipelines import check_page, data_sets, folds
    from pipelines.params import load

    folder = data_sets.folder_of(load(), name)
    detector = None if faces is None else build_detector(None if faces == "haar" else Path(faces))
    slow = "" if detector is None else "; looking for faces takes milliseconds an image"
    with doing(f"Reading {folder}{slow} ..."):
        found = check(folder, detector)
        data = open_data(folder)
        if (predicted := folds.predictions_for(data)) is not None:
            found["doubted"] = {"by": predicted[0], **doubted(predicted[1], data.classes, NAMED)}
    drawn = found["dataset"] == "sample"  # real faces are private
    images = open_images(folder / "raw" / "images.npy", "download") if drawn else None
    numbers, page = check_page.write(found, folder, images)
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    for line in check_page.findings(found):
        style = {"ok": "green", "look": "yellow", "note": "dim"}[line.mark]
        table.add_row(f"[{style}]{line.mark}[/]", line.topic, escape(line.text))
    console.print(table, highlight=False)
    console.print(f"{bold(page)} (open it in a browser), {bold(numbers)}")


def upscale_gallery(
    name: Prepared = None,
    faces: Annotated[int, typer.Option(help="How many faces, evenly spaced in the data.", min=1, max=100)] = 6,
) -> None:
    """Draw the same faces enlarged by every super-resolution method whose weights are available."""
    import numpy as np

    from fer.data.charts import contact_sheet
    from fer.data.images import open_images
    from fer.super_resolution.methods import METHODS, build_upscaler
    from pipelines import data_sets
    from pipelines.params import load

    one = data_sets.load(load(), name)
    config, machine = one.recipe.super_resolution, one.machine
    images = open_images(one.folder / "raw" / "images.npy", "download")
    chosen = images[np.unique(np.linspace(0, len(images) - 1, faces).astype(int))]
    rows, left_out = {"as it is": chosen.repeat(4, 1).repeat(4, 2)}, []
    for key, method in METHODS.items():
        if key == "none":
            continue
        scale = max(method.scales or (8,))
        try:
            with console.status(f"{key} x{scale}"):
                upscale = build_upscaler(key, scale, machine.weights, config.hub_id, config.precision, machine.device)
                rows[f"{key} x{scale}"] = upscale(chosen, 1)
        except UserError as error:
            left_out.append(f"{key} left out: {error}")
    path = one.folder / "upscale_gallery.png"
    contact_sheet(rows, side=4 * images.shape[1]).save(path)
    console.print(f"{bold(path)}: {', '.join(rows)}")
    for line in left_out:
        console.print(line, style="yellow")
