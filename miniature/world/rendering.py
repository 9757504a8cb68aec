"""Pixels of a scene, antialiased: every object is drawn at four times the size and averaged.

Only a patch around an object is drawn large, so a scene takes a fraction of a millisecond.
"""

import functools
import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from miniature.world import vocabulary as vocab
from miniature.world.scenes import Background, Object, Scene

_SCALE = 4
_PATCH = 24  # pixels; holds the largest object with room for its alignment to whole pixels
_STRIPE = 8  # quarter pixels: two pixels of colour, two of the other tone
_DOT_PITCH, _DOT_RADIUS = 16, 5  # quarter pixels
_RIM = 3  # quarter pixels


def render(scene: Scene) -> np.ndarray:
    """Draws a scene.

    Args:
        scene: what to draw; the same scene always gives the same pixels.

    Returns:
        uint8 [64, 64, 3], RGB.
    """
    return np.asarray(render_image(scene))


def render_image(scene: Scene) -> Image.Image:
    """Draws a scene as a Pillow image of 64x64 pixels, mode RGB."""
    image = _background(scene.background)
    for obj in scene.objects:
        _paste(image, obj)
    return image


def _background(background: Background) -> Image.Image:
    size = vocab.IMAGE_SIZE
    if background.is_plain:
        return Image.new("RGB", (size, size), background.top_rgb)
    weight = np.linspace(0.0, 1.0, size)[:, None]
    top, bottom = np.array(background.top_rgb), np.array(background.bottom_rgb)
    rows = np.rint(top + weight * (bottom - top)).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(rows[:, None], (size, size, 3))))


def _paste(image: Image.Image, obj: Object) -> None:
    left, top = (c // _SCALE - _PATCH // 2 for c in obj.centre)
    x, y = obj.centre[0] - left * _SCALE, obj.centre[1] - top * _SCALE
    side = _PATCH * _SCALE
    mask = Image.new("L", (side, side), 0)
    _draw_shape(ImageDraw.Draw(mask), obj.shape, x, y, obj.diameter / 2)
    paint = Image.new("RGB", (_PATCH, _PATCH), obj.rgb)
    if obj.texture != "plain":
        other = Image.new("RGB", (_PATCH, _PATCH), second_tone(obj.rgb))
        # Dots and stripes start at the object's middle: no object misses its texture. They end
        # a pixel before its outline, without which small shapes are hard to tell apart.
        inner = Image.new("L", (side, side), 0)
        _draw_shape(ImageDraw.Draw(inner), obj.shape, x, y, obj.diameter / 2 - _RIM)
        middle = y + round(0.15 * obj.diameter) if obj.shape == "triangle" else y
        marks = ImageChops.multiply(inner, _texture_mask(obj.texture, x, middle))
        paint.paste(other, (0, 0), marks.reduce(_SCALE))
    image.paste(paint, (left, top), mask.reduce(_SCALE))


def second_tone(rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    """The tone of stripes and dots: darker on a light colour, lighter on a dark one."""
    luminance = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2]
    target, share = (0, 0.6) if luminance > 115 else (255, 0.7)
    red, green, blue = (round(c + share * (target - c)) for c in rgb)
    return red, green, blue


@functools.lru_cache(maxsize=512)
def _texture_mask(texture: str, x: int, y: int) -> Image.Image:
    side = _PATCH * _SCALE
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    if texture == "striped":
        first = (y - _STRIPE // 2) % (2 * _STRIPE) - 2 * _STRIPE
        for at in range(first, side, 2 * _STRIPE):
            draw.rectangle((0, at, side, at + _STRIPE - 1), fill=255)
    else:
        for row in range(y % _DOT_PITCH - _DOT_PITCH, side + _DOT_PITCH, _DOT_PITCH):
            for column in range(x % _DOT_PITCH - _DOT_PITCH, side + _DOT_PITCH, _DOT_PITCH):
                r = _DOT_RADIUS
                draw.ellipse((column - r, row - r, column + r, row + r), fill=255)
    return mask


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: int, y: int, r: float) -> None:
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "square":
        half = 0.88 * r
        draw.rectangle((x - half, y - half, x + half, y + half), fill=255)
    elif shape == "cross":
        arm = 0.36 * r
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=255)
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=255)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)], fill=255)
    elif shape == "diamond":
        draw.polygon([(x, y - r), (x + 0.8 * r, y), (x, y + r), (x - 0.8 * r, y)], fill=255)
    elif shape == "star":
        draw.polygon(_star(x, y + 0.05 * r, 1.08 * r), fill=255)
    else:
        raise ValueError(f"unknown shape {shape!r}; there are {', '.join(vocab.SHAPES)}")


def _star(x: float, y: float, r: float) -> list[tuple[float, float]]:
    radii = (r, 0.46 * r)
    angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
    return [
        (x + radii[i % 2] * math.cos(a), y + radii[i % 2] * math.sin(a))
        for i, a in enumerate(angles)
    ]
