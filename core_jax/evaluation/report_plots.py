"""Line and bar plots as inline SVG: no scripts, colours from the page, readable on a phone."""

import html
import math
from collections.abc import Sequence
from typing import Any

# Axes of the drawing in user units; the page scales it.
_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 12, 12, 50
_LONGEST = 24  # characters of a bar's name
# Distinguishable by the colour-blind and on light and dark paper (Okabe and Ito, 2008).
COLOURS = ("#0a84c6", "#e07b00", "#12a37a", "#c45aa0", "#b8a100", "#d4492a", "#5cb3e6", "#8a8a8a")


def draw(plot: dict[str, Any], title: str) -> str:
    """Returns the SVG of a plot as `Report.add_plot` stores it; its legend is below, in HTML."""
    body = _bars(plot) if plot["kind"] == "bar" else _lines(plot)
    if body is None:
        return "<p class='note'>No finite values to plot.</p>"
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    height = _HEIGHT + _slant_room(plot)
    labels = (
        f"<text x='{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}' y='{height - 8}' class='label' "
        f"text-anchor='middle'>{html.escape(plot['x_label'])}</text>"
        f"<text transform='translate(14 {middle:.0f}) rotate(-90)' class='label' "
        f"text-anchor='middle'>{html.escape(plot['y_label'])}</text>"
    )
    return (
        f"<svg class='plot' viewBox='0 0 {_WIDTH} {height}' role='img' "
        f"aria-label='{html.escape(title, quote=True)}'>{body}{labels}</svg>{_legend(plot)}"
    )


def _bar_labels(plot: dict[str, Any]) -> list[str]:
    points = [point for columns in plot["series"].values() for point in _points(columns)]
    return list(dict.fromkeys(str(point[0]) for point in points))


def _slant_room(plot: dict[str, Any]) -> int:
    """Height below the drawing for the names of bars that are too long to stand side by side."""
    labels = _bar_labels(plot) if plot["kind"] == "bar" else []
    longest = max(map(len, labels), default=0)
    slot = (_WIDTH - _LEFT - _RIGHT) / max(1, len(labels))
    return 0 if longest * 7 <= slot else round(min(longest, _LONGEST) * 4.4)


def _legend(plot: dict[str, Any]) -> str:
    if len(plot["series"]) < 2:
        return ""
    items = "".join(
        f"<li><span style='background:{COLOURS[i % len(COLOURS)]}'></span>{html.escape(name)}</li>"
        for i, name in enumerate(plot["series"])
    )
    return f"<ul class='legend'>{items}</ul>"


class _Axis:
    """Maps values to positions and chooses ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log=False, zero=False):
        self.log = log
        low, high = min(values), max(values)
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-12 * max(1.0, abs(high)):
            pad = 0.5 if log or high == 0 else abs(high) * 0.1
            low, high = low - pad, high + pad
        elif not log:
            pad = (high - low) * 0.04
            low, high = low if zero and low == 0 else low - pad, high + pad
        self.low, self.high, self.start, self.end = low, high, start, end

    def place(self, value: float) -> float:
        """Position of a value on the drawing."""
        share = ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the axis."""
        if self.log and self.high - self.low >= 1:
            first, last = math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9)
            return [10.0**e for e in range(first, last + 1)]
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        raw = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]


def tick_text(value: float) -> str:
    """Returns a short text of a round number."""
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


def _points(columns: dict[str, list]) -> list[tuple]:
    """(x, y, low, high) of the finite points."""
    number = len(columns["x"])
    low, high = columns.get("low", [None] * number), columns.get("high", [None] * number)
    rows = zip(columns["x"], columns["y"], low, high, strict=True)
    return [row for row in rows if row[0] is not None and row[1] is not None]


def _spread(points: Sequence[tuple]) -> list[float]:
    return [v for point in points for v in point[1:] if v is not None]


def _y_grid(axis: _Axis) -> str:
    parts = []
    for tick in axis.ticks():
        y = axis.place(tick)
        parts.append(
            f"<line x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}' class='grid'/>"
            f"<text x='{_LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{tick_text(tick)}</text>"
        )
    return "".join(parts)


def _whisker(x: float, low: float, high: float, axis: _Axis, colour: str) -> str:
    top, bottom = axis.place(high), axis.place(low)
    return (
        f"<path d='M{x:.1f} {bottom:.1f}V{top:.1f}M{x - 4:.1f} {bottom:.1f}h8"
        f"M{x - 4:.1f} {top:.1f}h8' stroke='{colour}' class='whisker'/>"
    )


def _lines(plot: dict[str, Any]) -> str | None:
    series = {name: sorted(_points(columns)) for name, columns in plot["series"].items()}
    everything = [point for points in series.values() for point in points]
    if not everything:
        return None
    x_values = [point[0] for point in everything]
    across = _Axis(x_values, _LEFT + 8, _WIDTH - _RIGHT - 8, log=plot["log_x"])
    up = _Axis(_spread(everything), _HEIGHT - _BOTTOM, _TOP, log=plot["log_y"])
    parts = [_y_grid(up)]
    distinct = sorted(set(x_values))
    # Few measured places: they are the ticks. Otherwise round numbers.
    for tick in distinct if len(distinct) <= 7 else across.ticks():
        x = across.place(tick)
        parts.append(
            f"<text x='{x:.1f}' y='{_HEIGHT - _BOTTOM + 18}' text-anchor='middle'>"
            f"{tick_text(tick)}</text>"
        )
    for i, (name, points) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        places = [(across.place(p[0]), up.place(p[1])) for p in points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        if path:
            parts.append(f"<path d='M{path}' stroke='{colour}' class='line'/>")
        for (x, y), (value, height, low, high) in zip(places, points, strict=True):
            if low is not None and high is not None:
                parts.append(_whisker(x, low, high, up, colour))
            if len(points) <= 60:
                text = html.escape(f"{name}: {value:.6g}, {height:.6g}")
                parts.append(
                    f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3.2' fill='{colour}'>"
                    f"<title>{text}</title></circle>"
                )
    return "".join(parts)


def _bars(plot: dict[str, Any]) -> str | None:
    series = {name: _points(columns) for name, columns in plot["series"].items()}
    everything = [point for points in series.values() for point in points]
    if not everything:
        return None
    labels = _bar_labels(plot)
    up = _Axis(_spread(everything), _HEIGHT - _BOTTOM, _TOP, zero=True)
    slot = (_WIDTH - _LEFT - _RIGHT) / len(labels)
    width = min(54.0, slot * 0.8 / len(series))
    base, parts = up.place(0.0), [_y_grid(up)]
    for i, (name, points) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        for label, height, low, high in points:
            centre = _LEFT + slot * (labels.index(str(label)) + 0.5)
            x = centre + (i - (len(series) - 1) / 2) * width
            y = up.place(height)
            text = html.escape(f"{name}, {label}: {height:.6g}")
            parts.append(
                f"<rect x='{x - width * 0.45:.1f}' y='{min(y, base):.1f}' width='{width * 0.9:.1f}'"
                f" height='{abs(y - base):.1f}' fill='{colour}'><title>{text}</title></rect>"
            )
            if low is not None and high is not None:
                parts.append(_whisker(x, low, high, up, "currentColor"))
    parts.append(
        f"<line x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{base:.1f}' y2='{base:.1f}' class='axis'/>"
    )
    turn = _slant_room(plot) > 0
    for i, label in enumerate(labels):
        x, y = _LEFT + slot * (i + 0.5), _HEIGHT - _BOTTOM + 18
        short = label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"
        how = (
            f"transform='translate({x + 4:.1f} {y - 4}) rotate(-40)' text-anchor='end'"
            if turn else f"x='{x:.1f}' y='{y}' text-anchor='middle'"
        )  # fmt: skip
        parts.append(f"<text {how}>{html.escape(short)}<title>{html.escape(label)}</title></text>")
    return "".join(parts)
