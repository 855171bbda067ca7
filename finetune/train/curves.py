"""Curves as SVG, drawn without a library: a report must stand alone, and few numbers need little ink."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 220, 56, 24, 10     # units of the drawing; a page scales it
MOST = 240                                                  # points of a curve; more are averaged
Points = Sequence[tuple[float, float]]                      # (step, value)


def chart(series: Mapping[str, Points]) -> str:
    """The curves over one pair of axes. A value's numbers show when the mouse is over its step; values that are not finite
    are left out. Curve number n has the class `s<n>`, which the page gives its colour."""
    kept = {name: thinned([(x, y) for x, y in points if math.isfinite(y)]) for name, points in series.items()}
    every = [point for points in kept.values() for point in points]
    if not every:
        return ""
    right = max(x for x, _ in every) or 1
    ticks = rounded(min(y for _, y in every), max(y for _, y in every))
    low, high = ticks[0], ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        return (LEFT + (WIDTH - LEFT - 4) * x / right, TOP + (HEIGHT - BOTTOM - TOP) * (high - y) / (high - low))

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for tick in ticks:
        _, y = at(0, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for x in sorted({0, right / 2, right}):
        where, anchor = at(x, low)[0], "middle" if 0 < x < right else "start" if not x else "end"
        parts.append(f'<text x="{where:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{x:g}</text>')
    said: dict[float, list[str]] = {}
    for n, (name, points) in enumerate(kept.items()):
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        parts.append(f'<polyline class="s{n}" points="{line}"/>')
        if len(points) == 1:
            parts.append('<circle class="s{}" cx="{:.1f}" cy="{:.1f}" r="3"/>'.format(n, *at(*points[0])))
        for x, y in points:
            said.setdefault(x, []).append(f"{name} {y:.6g}")
    edges = sorted(said)
    for x, before, after in zip(edges, edges[:1] + edges, edges[1:] + edges[-1:]):
        begin, end = (at((x + side) / 2, low)[0] for side in (before, after))
        parts.append(f'<rect class="hover" x="{begin:.1f}" y="{TOP}" width="{max(end - begin, 1):.1f}" '
                     f'height="{HEIGHT - BOTTOM - TOP}"><title>{escape(f"step {x:g}: " + ", ".join(said[x]))}</title></rect>')
    return "".join([*parts, "</svg>"])


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most MOST points: neighbours are averaged, and stand at the last one's step."""
    size = -(-len(points) // MOST) or 1
    groups = [points[i:i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def rounded(low: float, high: float) -> list[float]:
    """From three to seven round numbers, the first not above `low` and the last not below `high`."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    power = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (power * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]
