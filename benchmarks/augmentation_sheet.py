# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Draw what augmentation makes of the example images: a row an image, as inference sees it and in six epochs.

The last column has every strength doubled. Writes a PNG.
"""

import argparse
from dataclasses import fields
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from m3fm import M3FMImageProcessor
from m3fm.training.augmentation import STRENGTHS, Augmentation, Strengths
from m3fm.training.fed_studies import Draw, FedStudy
from m3fm.training.study_images import StudyPixels

ROOT = Path(__file__).resolve().parents[1]
# Those whose licence asks for no more than attribution (examples/README.md).
IMAGES = {"cxr_covid_pneumonia.jpg": "cxr", "cxr_pneumonia_child.jpg": "cxr", "ct_slice_luna16.jpg": "ct"}
EPOCHS = 6
SIDE, GAP, HEAD = 160, 4, 18


def doubled(strengths: Strengths) -> Strengths:
    """Returns twice each strength, shares no larger than 1."""
    shares = ("jpeg", "slices", "mirror")
    values = {each.name: 2 * getattr(strengths, each.name) for each in fields(strengths)}
    return Strengths(**{name: min(value, 1.0) if name in shares else value for name, value in values.items()})


def rendered(path: Path, modality: str, augmentation: Augmentation | None, epoch: int) -> np.ndarray:
    """Returns one image as it goes into the model, in 0..1, (SIDE, SIDE)."""
    processor = M3FMImageProcessor(size=SIDE, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    study = FedStudy(path.name, modality, (path,), (None,), {}, {})
    _, batch = StudyPixels(processor, augmentation=augmentation).batch([study], Draw(0, epoch))
    return batch["pixel_values"][0, 0, 0].numpy()


def main() -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "augmentation.png")
    options = parser.parse_args()
    usual, strong = Augmentation(), Augmentation({name: doubled(each) for name, each in STRENGTHS.items()})
    heads = ["inference", *(f"epoch {epoch}" for epoch in range(EPOCHS)), "twice as strong"]
    step = SIDE + GAP
    sheet = Image.new("L", (len(heads) * step - GAP, HEAD + len(IMAGES) * step - GAP), 255)
    canvas = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        canvas.text((column * step + 2, 2), head, fill=0, font=ImageFont.load_default(12))
    for row, (name, modality) in enumerate(IMAGES.items()):
        ways = [(None, 0), *((usual, epoch) for epoch in range(EPOCHS)), (strong, EPOCHS)]
        for column, (augmentation, epoch) in enumerate(ways):
            plane = rendered(ROOT / "examples" / name, modality, augmentation, epoch)
            place = (column * step, HEAD + row * step)
            sheet.paste(Image.fromarray((plane * 255).round().astype(np.uint8)), place)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.output, optimize=True)
    print(f"{options.output}: {sheet.width} x {sheet.height}")


if __name__ == "__main__":
    main()
