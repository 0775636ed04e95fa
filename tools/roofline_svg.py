"""A roofline plot as SVG, written by hand: one labelled dot a kernel, for light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from itertools import product
from typing import Any

from kernel_report import Row, named_peaks

WIDTH, HEIGHT = 1080, 720
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 60, 56  # margins
NO_FLOP = 2.0**-6  # where on the axis kernels lie that move values only
FONT, LETTER, LINE = 11, 6.3, 13  # px: of labels; a letter's width, at most
COLOURS = (
    "#d1495b", "#2e86de", "#1a9e6b", "#b8741a", "#8e5bd6",
    "#0f9aa8", "#c0509f", "#7f8c1f", "#5c6bc0", "#e0662f",
)  # fmt: skip
STYLE = """
  text { font: 11px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
  .title { font-size: 16px; font-weight: 600; } .small { fill: #59636e; }
  .page { fill: #ffffff; } .grid { stroke: #e4e8ec; } .roof { stroke: #59636e; stroke-width: 1.5; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .small { fill: #9198a1; }
    .page { fill: #0d1117; } .grid { stroke: #262c36; } .roof { stroke: #9198a1; }
  }
"""
Box = tuple[float, float, float, float]  # left, top, right, bottom


class Axes:
    """Intensity and speed, both logarithmic -> pixels."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        """The least and the greatest value of each."""
        self.x_range, self.y_range = x, y

    def x(self, value: float) -> float:
        """Of an intensity."""
        return LEFT + _share(value, self.x_range) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Of a speed."""
        return HEIGHT - BOTTOM - _share(value, self.y_range) * (HEIGHT - TOP - BOTTOM)


def _share(value: float, bounds: tuple[float, float]) -> float:
    least, most = map(math.log, bounds)
    return (math.log(value) - least) / (most - least)


def roofline(machine: dict[str, Any], rows: list[Row]) -> str:
    """The SVG: of each op and dtype the best ISA, at the shape at which it is fastest.

    That is counted in flop a second. rows: of one op and dtype best ISA first.
    """
    peaks = named_peaks(machine["peaks"])
    rates = {label: value for label, value, unit in peaks if unit == "GB/s"}
    flops = {label: value for label, value, unit in peaks if unit != "GB/s"}
    dots = {name: (row, *_point(row, rates, flops)) for name, row in _fastest(rows).items()}
    speeds = [1.0, *(speed for _, _, speed in dots.values())]
    least = min([NO_FLOP, *(intensity for _, intensity, _ in dots.values())])
    axes = Axes((least / 2, 2048), (min(speeds) / 2, 1.6 * max(*flops.values(), *speeds)))
    parts = [*_grid(axes), *_roofs(axes, rates, flops)]
    parts += _dots(axes, dots, [box for _, box in parts if box])
    title = f"npclip kernels and their roofs: {machine['processor']}, {machine['threads']} threads"
    note = (
        "A dot is an op on its best ISA, at its fastest shape. How far it lies below its roof (the "
        "peak of its dtype and ISA, the slope of where its data lie) is the median over the rounds."
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n"
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>\n'
        f'<text class="title" x="{LEFT}" y="24">{escape(title)}</text>\n'
        f'<text class="small" x="{LEFT}" y="42">{note}</text>\n'
        + "\n".join(part for part, _ in parts if part)
        + "\n</svg>\n"
    )


def _fastest(rows: list[Row]) -> dict[str, Row]:
    isas: dict[tuple[str, str], str] = {}
    best: dict[str, Row] = {}
    for row in rows:
        if not row.isa or row.isa != isas.setdefault((row.op, row.dtype), row.isa):
            continue
        if row.kernel not in best or _speed(row) > _speed(best[row.kernel]):
            best[row.kernel] = row
    return best


def _speed(row: Row) -> tuple[float, float]:
    return row.gflops, row.gbytes


def _point(
    row: Row, rates: dict[str, float], flops: dict[str, float]
) -> tuple[float, float]:  # flop a byte, 1e9 flop a second
    """Where a kernel is: without flop, as if it did NO_FLOP of one for every byte.

    Its share of the roof is kept, not its speed: the machine was faster or slower in its rounds.
    """
    intensity = row.intensity or NO_FLOP
    peak = flops.get(f"{row.dtype} {row.isa}", flops.get(f"f32 {row.isa}", math.inf))
    rate = rates["memory"] if row.state == "cold" else max(rates.values())
    return intensity, row.roof * min(peak, intensity * rate)


def _grid(axes: Axes) -> Iterator[tuple[str, Box | None]]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    ticks = [(NO_FLOP, "no flop")]
    ticks += [(2.0**i, f"1/{2**-i}" if i < 0 else f"{2**i}") for i in range(-4, 11, 2)]
    for value, text in ticks:
        x = axes.x(value)
        yield _line("grid", x, TOP, x, bottom), None
        yield _text(x, bottom + 16, text, "small", "middle"), None
    for i in range(-6, 7):
        for value in (10.0**i, 3 * 10.0**i):
            if axes.y_range[0] <= value <= axes.y_range[1]:
                y = axes.y(value)
                yield _line("grid", LEFT, y, right, y), None
                yield _text(LEFT - 6, y + 4, f"{value:g}", "small", "end"), None
    yield _text((LEFT + right) / 2, HEIGHT - 14, "flop a byte", "", "middle"), None
    yield _text(LEFT - 6, TOP - 6, "GFLOP/s", "", "end"), None


def _roofs(
    axes: Axes, rates: dict[str, float], flops: dict[str, float]
) -> Iterator[tuple[str, Box | None]]:
    highest, fastest = max([*flops.values(), 1.0]), max(rates.values())
    for share, (label, rate) in zip((0.45, 0.6), rates.items(), strict=False):
        start = max(axes.x_range[0], axes.y_range[0] / rate)
        ends = axes.x(start), axes.y(rate * start), axes.x(highest / rate), axes.y(highest)
        yield _line("roof", *ends), None
        yield from (("", box) for box in _along(*ends))
        angle = math.degrees(math.atan2(ends[3] - ends[1], ends[2] - ends[0]))
        x, y = (a + (b - a) * share for a, b in (ends[::2], ends[1::2]))
        turn = f' transform="rotate({angle:.1f} {x:.1f} {y:.1f})"'
        yield _text(x, y - 5, f"{label}, {rate:.0f} GB/s", "label", "middle", turn), None
        yield "", (x - 40, y - 40, x + 30, y + 20)
    lowest_label = -math.inf  # downwards
    for peak, labels in _merged(flops):
        left, y, right = axes.x(peak / fastest), axes.y(peak), WIDTH - RIGHT
        yield _line("roof", left, y, right, y), (left, y - 2, right, y + 2)
        lowest_label = max(y - 5, lowest_label + LINE)
        text = f"{', '.join(labels)} GFLOP/s"
        yield (
            _text(right, lowest_label, text, "label", "end"),
            _box(right, lowest_label, text, "end"),
        )


def _merged(flops: dict[str, float]) -> list[tuple[float, list[str]]]:
    """Peaks, downwards; those within a tenth of another are one line."""
    merged: list[tuple[float, list[str]]] = []
    for label, peak in sorted(flops.items(), key=lambda item: -item[1]):
        if not merged or peak < 0.9 * merged[-1][0]:
            merged.append((peak, []))
        merged[-1][1].append(f"{label} {peak:.0f}")
    return merged


def _dots(
    axes: Axes, dots: dict[str, tuple[Row, float, float]], taken: list[Box]
) -> Iterator[tuple[str, Box | None]]:
    places = {name: (axes.x(x), axes.y(y)) for name, (_, x, y) in dots.items()}
    taken += [(x - 5, y - 5, x + 5, y + 5) for x, y in places.values()]
    labels: list[Box] = []
    ops = list(dict.fromkeys(row.op for row, _, _ in dots.values()))
    for name, (x, y) in sorted(places.items(), key=lambda item: item[1][1]):
        row = dots[name][0]
        colour = COLOURS[ops.index(row.op) % len(COLOURS)]
        text_x, text_y, anchor = _free_place(x, y, name, taken, labels)
        leader = _leader(x, y, text_x, text_y)
        labels.append(_box(text_x, text_y, name, anchor))
        taken += [labels[-1], *_along(*leader)]
        speed = f"{row.gflops:.1f} GFLOP/s, {row.gbytes:.1f} GB/s, {row.roof:.0%} of the roof"
        hint = escape(f"{name} {row.shape}, {row.state}: {speed}")
        parts = (
            f'<g stroke="{colour}">{_line("leader", *leader)}</g>',
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">',
            f"<title>{hint}</title></circle>",
            _text(text_x, text_y, name, "label", anchor),
        )
        yield "".join(parts), None


def _free_place(
    x: float, y: float, text: str, taken: list[Box], labels: list[Box]
) -> tuple[float, float, str]:
    """The nearest place for a label that covers nothing; its leader, if possible, crosses none."""
    offsets = [
        (abs(dx) + abs(dy) + (dx < 0), dx, dy)
        for dx in (9, -9, 30, -30, 70, -70, 120, -120, 180, -180)
        for dy in range(-260, 261, 4)
    ]
    for strict, (_, dx, dy) in product((True, False), sorted(offsets)):
        place = x + dx, y + 4 + dy, "start" if dx > 0 else "end"
        left, top, right, bottom = box = _box(place[0], place[1], text, place[2])
        inside = left > LEFT and right < WIDTH - RIGHT and top > TOP and bottom < HEIGHT - BOTTOM
        leader = _along(*_leader(x, y, *place[:2])) if strict else []
        if inside and _is_free([box], taken) and _is_free(leader, labels):
            return place
    return x + 9, y + 4, "start"


def _leader(x: float, y: float, text_x: float, text_y: float) -> Box:
    """From a dot to its label."""
    return x, y, text_x - math.copysign(2, text_x - x), text_y - 4


def _along(x1: float, y1: float, x2: float, y2: float) -> list[Box]:
    """Small boxes along a line."""
    steps = 1 + int(max(abs(x2 - x1), abs(y2 - y1)) / 5)
    points = [(x1 + (x2 - x1) * i / steps, y1 + (y2 - y1) * i / steps) for i in range(steps + 1)]
    return [(x - 2, y - 2, x + 2, y + 2) for x, y in points]


def _is_free(boxes: list[Box], taken: list[Box]) -> bool:
    return not any(
        a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a in boxes for b in taken
    )


def _box(x: float, y: float, text: str, anchor: str) -> Box:
    width = LETTER * len(text)
    left = x - width if anchor == "end" else x
    return left, y - FONT, left + width, y + 2


def _line(kind: str, *ends: float) -> str:
    names = ("x1", "y1", "x2", "y2")
    places = " ".join(f'{name}="{v:.1f}"' for name, v in zip(names, ends, strict=True))
    return f'<line class="{kind}" {places}/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str, more: str = "") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>'
        f"{escape(text)}</text>"
    )
