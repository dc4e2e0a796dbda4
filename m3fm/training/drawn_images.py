# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Drawn images of other things than chests: pages, plots, patterns and noise.

Half of the kinds serve the fit of the input check, the other half its measurement. Every image is (256, 256) float32
in 0..1 and follows from its kind and number.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE = 256
_TEXT = (
    "findings impression history patient report normal table figure result value total page name date count of the "
    "and with no for index return print import left right method data mean error rate 12.5 3.7 2026 0.03 100 %"
)
_WORDS = _TEXT.split()


def draw(kind: str, number: int) -> np.ndarray:
    """Draw one image.

    Args:
        kind: A key of `FIT_KINDS` or `MEASURE_KINDS`.
        number: Which of the kind's endless images.

    Returns:
        (256, 256) float32 in 0..1.

    Raises:
        ValueError: If the kind is unknown.
    """
    drawer = (FIT_KINDS | MEASURE_KINDS).get(kind)
    if drawer is None:
        raise ValueError(f"kind: got {kind!r}, expected one of {sorted(FIT_KINDS | MEASURE_KINDS)}")
    rng = np.random.default_rng([number, *kind.encode()])
    return np.clip(drawer(rng), 0, 1).astype(np.float32)


def _lines(rng: np.random.Generator, count: int) -> list[str]:
    return [" ".join(rng.choice(_WORDS, int(rng.integers(2, 12)))) for _ in range(count)]


def _as_pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32) / 255


def _page(rng: np.random.Generator, paper: int = 255, ink: int = 0, indents: tuple[int, ...] = (0,)) -> Image.Image:
    image = Image.new("L", (SIDE, SIDE), paper)
    canvas = ImageDraw.Draw(image)
    size = int(rng.integers(9, 20))
    font = ImageFont.load_default(size)
    left = int(rng.integers(4, 30))
    for row, line in enumerate(_lines(rng, SIDE // (size + 4))):
        place = (left + size * int(rng.choice(indents)), 4 + row * (size + 4))
        canvas.text(place, line[: int(rng.integers(6, 60))], fill=ink, font=font)
    return image


def _text_page(rng: np.random.Generator) -> np.ndarray:
    return _as_pixels(_page(rng))


def _scanned_page(rng: np.random.Generator) -> np.ndarray:
    turned = _page(rng, 235, 40).rotate(float(rng.normal(0, 3)), fillcolor=200, resample=Image.Resampling.BICUBIC)
    pixels = _as_pixels(turned.filter(ImageFilter.GaussianBlur(0.7)))
    shade = np.linspace(1, rng.uniform(0.6, 0.9), SIDE)[None]
    return pixels * shade + rng.normal(0, 0.03, (SIDE, SIDE))


def _code(rng: np.random.Generator) -> np.ndarray:
    image = _page(rng, 30, 200, indents=(0, 1, 2, 3))
    ImageDraw.Draw(image).rectangle((0, 0, SIDE, int(rng.integers(8, 20))), fill=70)
    return _as_pixels(image)


def _table(rng: np.random.Generator) -> np.ndarray:
    image = Image.new("L", (SIDE, SIDE), 250)
    canvas = ImageDraw.Draw(image)
    rows, columns = int(rng.integers(5, 14)), int(rng.integers(3, 7))
    for row in range(rows + 1):
        canvas.line((8, 8 + row * 240 // rows, 248, 8 + row * 240 // rows), fill=90)
    for column in range(columns + 1):
        canvas.line((8 + column * 240 // columns, 8, 8 + column * 240 // columns, 248), fill=90)
    for row in range(rows):
        for column in range(columns):
            place = (12 + column * 240 // columns, 10 + row * 240 // rows)
            canvas.text(place, str(rng.choice(_WORDS))[:6], fill=10, font=ImageFont.load_default(10))
    return _as_pixels(image)


def _line_plot(rng: np.random.Generator) -> np.ndarray:
    image = Image.new("L", (SIDE, SIDE), 255)
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((30, 10, 245, 225), outline=0)
    x = np.linspace(31, 244, 60)
    for _ in range(int(rng.integers(1, 5))):
        y = 120 + rng.uniform(10, 45) * np.sin(x / rng.uniform(8, 60)) + np.cumsum(rng.normal(0, 4, 60))
        canvas.line(
            list(zip(x.tolist(), np.clip(y, 12, 224).tolist(), strict=True)), fill=int(rng.integers(0, 160)), width=2
        )
    for tick in range(6):
        canvas.text((6, 12 + 40 * tick), str(int(rng.integers(0, 99))), fill=0, font=ImageFont.load_default(10))
    return _as_pixels(image)


def _bar_chart(rng: np.random.Generator) -> np.ndarray:
    image = Image.new("L", (SIDE, SIDE), 245)
    canvas = ImageDraw.Draw(image)
    count = int(rng.integers(3, 12))
    width = 230 // count
    for i in range(count):
        canvas.rectangle(
            (15 + i * width, int(rng.integers(20, 220)), 15 + i * width + int(width * 0.7), 235),
            fill=int(rng.integers(20, 200)),
        )
    canvas.line((12, 10, 12, 235, 248, 235), fill=0)
    canvas.text((60, 2), " ".join(rng.choice(_WORDS, 3)), fill=0, font=ImageFont.load_default(12))
    return _as_pixels(image)


def _white_noise(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0.5, rng.uniform(0.1, 0.4), (SIDE, SIDE))


def _salt_and_pepper(rng: np.random.Generator) -> np.ndarray:
    pixels = np.full((SIDE, SIDE), rng.uniform(0.2, 0.8))
    struck = rng.random((SIDE, SIDE)) < rng.uniform(0.05, 0.5)
    return np.where(struck, rng.random((SIDE, SIDE)) > 0.5, pixels)


def _spectral(rng: np.random.Generator, slope: float) -> np.ndarray:
    """Return noise whose amplitude falls with frequency to the power of -slope, in 0..1."""
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None])
    frequency[0, 0] = 1
    spectrum = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
    pixels = np.fft.irfft2(spectrum / frequency**slope, s=(SIDE, SIDE))
    return (pixels - pixels.min()) / np.ptp(pixels)


def _soft_noise(rng: np.random.Generator) -> np.ndarray:
    return _spectral(rng, rng.uniform(0.6, 1.2))


def _clouds(rng: np.random.Generator) -> np.ndarray:
    return _spectral(rng, rng.uniform(1.5, 2.6))


def _gradient(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[0:1:256j, 0:1:256j]
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.cos(angle) * x + np.sin(angle) * y
    if rng.random() < 0.5:
        ramp = np.hypot(x - rng.uniform(0, 1), y - rng.uniform(0, 1))
    return (ramp - ramp.min()) / np.ptp(ramp)


def _grating(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 60)
    return 0.5 + 0.5 * np.sin((np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi / period)


def _checkerboard(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[0:SIDE, 0:SIDE] // int(rng.integers(4, 48))
    low, high = sorted(rng.uniform(0, 1, 2))
    return np.where((x + y) % 2, low, high + 0.1)


def _square_code(rng: np.random.Generator) -> np.ndarray:
    cells = int(rng.integers(21, 45))
    bits = (rng.random((cells, cells)) > 0.5).astype(np.float32)
    for y, x in ((0, 0), (0, cells - 7), (cells - 7, 0)):
        bits[y : y + 7, x : x + 7] = 0
        bits[y + 1 : y + 6, x + 1 : x + 6] = 1
        bits[y + 2 : y + 5, x + 2 : x + 5] = 0
    grown = np.kron(bits, np.ones((220 // cells, 220 // cells), dtype=np.float32))
    pixels = np.ones((SIDE, SIDE), dtype=np.float32)
    pixels[18 : 18 + len(grown), 18 : 18 + len(grown)] = grown
    return pixels


def _ellipses(rng: np.random.Generator) -> np.ndarray:
    pixels = np.zeros((SIDE, SIDE))
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    for _ in range(int(rng.integers(1, 8))):
        cy, cx = rng.uniform(-0.6, 0.6, 2)
        inside = ((x - cx) / rng.uniform(0.05, 0.7)) ** 2 + ((y - cy) / rng.uniform(0.05, 0.7)) ** 2 < 1
        pixels[inside] = rng.uniform(0, 1)
    return pixels


def _silhouette(rng: np.random.Generator) -> np.ndarray:
    """Return a body with head and limbs, bright on dark or dark on bright."""
    image = Image.new("L", (SIDE, SIDE), 0)
    canvas = ImageDraw.Draw(image)
    cx, top, scale = int(rng.integers(100, 156)), int(rng.integers(10, 40)), rng.uniform(0.7, 1.1)
    canvas.ellipse((cx - 22 * scale, top, cx + 22 * scale, top + 50 * scale), fill=220)
    canvas.rounded_rectangle((cx - 45 * scale, top + 55 * scale, cx + 45 * scale, top + 140 * scale), 15, fill=200)
    for side in (-1, 1):
        canvas.line((cx + side * 45 * scale, top + 65 * scale, cx + side * 75 * scale, top + 150 * scale), 190, 16)
        canvas.line((cx + side * 20 * scale, top + 140 * scale, cx + side * 28 * scale, 250), 190, 22)
    pixels = _as_pixels(image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 3)))))
    return 1 - pixels if rng.random() < 0.5 else pixels


def _marker(rng: np.random.Generator) -> np.ndarray:
    image = Image.new("L", (SIDE, SIDE), int(rng.choice([0, 20, 128, 255])))
    canvas = ImageDraw.Draw(image)
    place = tuple(int(v) for v in rng.integers(10, 200, 2))
    canvas.text(place, str(rng.choice(["R", "L", "AP", "PORTABLE"])), fill=200, font=ImageFont.load_default(24))
    return _as_pixels(image)


def _frame(rng: np.random.Generator) -> np.ndarray:
    """Return an exposure without a patient: an even bright field inside a dark collimator."""
    pixels = np.zeros((SIDE, SIDE))
    top, left = (int(v) for v in rng.integers(5, 60, 2))
    bottom, right = (int(v) for v in rng.integers(190, 250, 2))
    pixels[top:bottom, left:right] = rng.uniform(0.4, 1)
    return pixels + rng.normal(0, rng.uniform(0.002, 0.03), pixels.shape)


Drawer = Callable[[np.random.Generator], np.ndarray]
FIT_KINDS: dict[str, Drawer] = {
    "text_page": _text_page,
    "line_plot": _line_plot,
    "white_noise": _white_noise,
    "soft_noise": _soft_noise,
    "gradient": _gradient,
    "checkerboard": _checkerboard,
    "ellipses": _ellipses,
    "marker": _marker,
}
MEASURE_KINDS: dict[str, Drawer] = {
    "scanned_page": _scanned_page,
    "code": _code,
    "table": _table,
    "bar_chart": _bar_chart,
    "salt_and_pepper": _salt_and_pepper,
    "clouds": _clouds,
    "grating": _grating,
    "square_code": _square_code,
    "silhouette": _silhouette,
    "frame": _frame,
}
