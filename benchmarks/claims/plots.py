"""Plots as SVG: curves of arms, and differences between arms with their intervals."""

import html
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.claims import experiment
from unimm_jax.evals.bootstrap import Difference

COLORS = ("#2f5fd0", "#d0472f", "#2f9e57", "#8a4fc4", "#b98a12", "#4a5361")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 280, 58, 12, 48, 40
Curve = tuple[Sequence[float], Sequence[Sequence[float]]]


def curves(title: str, across: str, arms: Mapping[str, Curve]) -> str:
    """An SVG with a curve per arm: the median of the seeds, with a band from the lowest to the highest seed.

    Args:
      across: label of the horizontal axis.
      arms: name → (x [N], for each seed y [N]).
    """
    every_x = [x for xs, _ in arms.values() for x in xs]
    every_y = [y for _, seeds in arms.values() for ys in seeds for y in ys]
    left, right, low, high = min(every_x), max(every_x), min(every_y), max(every_y)

    def place(x: float, y: float) -> str:
        across_px = LEFT + (x - left) / ((right - left) or 1) * (WIDTH - LEFT - RIGHT)
        return f"{across_px:.1f},{TOP + (high - y) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [text(LEFT, 16, title, color="#111820")]
    frame = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"'
    parts.append(f'<rect {frame} fill="none" stroke="#c5ccd6"/>')
    parts += [text(LEFT - 6, TOP + 8, f"{high:.3g}", "end"), text(LEFT - 6, HEIGHT - BOTTOM, f"{low:.3g}", "end")]
    parts += [
        text(LEFT, HEIGHT - BOTTOM + 15, f"{left:g}"),
        text(WIDTH - RIGHT, HEIGHT - BOTTOM + 15, f"{right:g}", "end"),
    ]
    parts.append(text(WIDTH / 2, HEIGHT - 8, across, "middle"))
    for number, (name, (xs, seeds)) in enumerate(arms.items()):
        color = COLORS[number % len(COLORS)]
        columns = list(zip(*seeds, strict=True))
        band = [place(x, max(column)) for x, column in zip(xs, columns, strict=True)]
        band += [place(x, min(column)) for x, column in reversed(list(zip(xs, columns, strict=True)))]
        middle = [place(x, statistics.median(column)) for x, column in zip(xs, columns, strict=True)]
        parts.append(f'<polygon points="{" ".join(band)}" fill="{color}" fill-opacity="0.15"/>')
        parts.append(f'<polyline points="{" ".join(middle)}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        parts.append(text(LEFT + 100 * number, 34, name, color=color))
    return svg(WIDTH, HEIGHT, parts)


def differences(title: str, found: Mapping[str, Difference]) -> str:
    """An SVG with a line for each difference: its mean, its 95% interval, and a point for each seed.

    Args:
      found: differences by name.
    """
    found = experiment.labeled(found)
    values = [x for d in found.values() for x in (d.low, d.high, *d.per_seed)]
    low, high = min([*values, 0.0]), max([*values, 0.0])
    names = 8 + 6.2 * max(map(len, found), default=0)
    width, height, row = names + 320, TOP + 24 * len(found) + 24, 24
    left, right = names + 12, width - RIGHT - 8

    def place(value: float) -> float:
        return left + (value - low) / ((high - low) or 1) * (right - left)

    bottom = TOP + row * len(found)
    parts = [text(8, 16, title, color="#111820"), text(8, 34, "mean, 95% interval, and each seed (circles)")]
    parts.append(f'<path d="M{place(0):.1f} {TOP - 6}V{bottom}" stroke="#c5ccd6"/>')
    for number, (name, d) in enumerate(found.items()):
        y = TOP + row * number + row / 2
        color = COLORS[2] if d.low > 0 else COLORS[1] if d.high < 0 else COLORS[5]
        parts.append(text(8, y + 4, name))
        parts.append(f'<path d="M{place(d.low):.1f} {y}H{place(d.high):.1f}" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<rect x="{place(d.mean) - 3:.1f}" y="{y - 5}" width="6" height="10" fill="{color}"/>')
        circle = f'cy="{y}" r="3.5" fill="#fff" fill-opacity="0.6" stroke="{color}"'
        parts += [f'<circle cx="{place(value):.1f}" {circle}/>' for value in d.per_seed]
    ends = [(low, "start"), (high, "end")]
    parts += [text(place(value), bottom + 14, f"{value:+.3g}", anchor) for value, anchor in ends if value]
    parts.append(text(place(0), bottom + 14, "0", "middle"))
    return svg(width, height, parts)


def text(x: float, y: float, words: str, anchor: str = "start", color: str = "#3a4452") -> str:
    """A text of an SVG."""
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" font-size="11" font-family="sans-serif" fill="{color}" '
        f'text-anchor="{anchor}">{html.escape(words)}</text>'
    )


def svg(width: float, height: float, parts: Sequence[str]) -> str:
    """An SVG of so many pixels."""
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="background:#fff">{"".join(parts)}</svg>\n'
