"""A contact sheet of faces, drawn with Pillow alone."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, PAPER = (32, 32, 32), (255, 255, 255)
MARGIN = 16


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
