"""Plots as SVG: a curve per arm, the median of the seeds, with a band from the lowest to the highest seed."""

import html
import statistics
from collections.abc import Mapping, Sequence

COLORS = ("#2f5fd0", "#d0472f", "#2f9e57", "#8a4fc4", "#b98a12", "#4a5361")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 280, 58, 12, 48, 40
Curve = tuple[Sequence[float], Sequence[Sequence[float]]]


def curves(title: str, across: str, arms: Mapping[str, Curve]) -> str:
    """An SVG with a curve per arm.

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

    def text(x: float, y: float, words: str, anchor: str = "start", color: str = "#3a4452") -> str:
        return (
            f'<text x="{x:.0f}" y="{y:.0f}" font-size="11" font-family="sans-serif" fill="{color}" '
            f'text-anchor="{anchor}">{html.escape(words)}</text>'
        )

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
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="background:#fff">{"".join(parts)}</svg>\n'
