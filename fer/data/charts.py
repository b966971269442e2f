"""Pictures of a data set, drawn with Pillow alone: a bar chart of the class balance and a contact sheet of faces."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, PAPER, BAR = (32, 32, 32), (255, 255, 255), (70, 120, 180)
MARGIN = 16


def bar_chart(counts: dict[str, dict[str, int]]) -> Image.Image:
    """One panel per split, one bar per class with its count. Each panel has its own scale, as train is far larger."""
    font, bold = ImageFont.load_default(15), ImageFont.load_default(18)
    names = list(next(iter(counts.values())))
    step, gutter, bar, number = 28, 110, 180, 60
    panel = bar + number + MARGIN
    size = (MARGIN + gutter + panel * len(counts), 3 * MARGIN + 24 + step * len(names))
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    top = 2 * MARGIN + 24
    for line, name in enumerate(names):
        draw.text((MARGIN + gutter - 10, top + step * line + 10), name, INK, font, anchor="rm")
    for column, (split, classes) in enumerate(counts.items()):
        left = MARGIN + gutter + panel * column
        draw.text((left, MARGIN), f"{split}: {sum(classes.values()):,} images", INK, bold)
        most = max(1, *classes.values())
        for line, count in enumerate(classes.values()):
            y = top + step * line
            draw.rectangle((left, y, left + round(bar * count / most), y + 20), BAR)
            draw.text((left + round(bar * count / most) + 6, y + 10), f"{count:,}", INK, font, anchor="lm")
    return picture


def contact_sheet(faces: dict[str, np.ndarray], side: int = 72) -> Image.Image:
    """One row per class: its name and its images, uint8 [n, H, W] or [n, H, W, 3], each `side` pixels high and wide."""
    font = ImageFont.load_default(16)
    gutter, gap = 110, 4
    columns = max(len(images) for images in faces.values())
    size = (2 * MARGIN + gutter + columns * (side + gap), 2 * MARGIN + len(faces) * (side + gap))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for line, (name, images) in enumerate(faces.items()):
        y = MARGIN + line * (side + gap)
        draw.text((MARGIN + gutter - 10, y + side // 2), name, INK, font, anchor="rm")
        for column, image in enumerate(images):
            sheet.paste(Image.fromarray(image).resize((side, side)), (MARGIN + gutter + column * (side + gap), y))
    return sheet
