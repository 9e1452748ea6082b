"""How Shoal's figures look, and how one figure becomes a PNG and an inline SVG that follows the page's colours.

Colours are Okabe and Ito's (told apart by people with any of the common colour deficiencies), in one order
everywhere; beyond seven lines the dashes and markers differ too. A figure is drawn in the light theme's colours; in
the SVG each of them is replaced by a CSS variable, so the same picture is readable on a dark page.

Text is never parsed (no TeX in a user's label), and no global state of matplotlib is changed.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6f7782")
SERIES_DARK = ("#3f9fe8", "#ff8a4c", "#2cc295", "#e59bc6", "#f0b84a", "#a9dcfa", "#aab3be")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
INK, MUTED, GRID, CARD, BAD = "#1b2430", "#5a6675", "#e4e8ed", "#ffffff", "#b3261e"
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", CARD: "--card", BAD: "--bad"} | {
    color: f"--c{i}" for i, color in enumerate(SERIES)
}
WIDTH, WIDE, HEIGHT = 370.0, 780.0, 235.0  # points; the SVG scales with the page
_RC: Any = {
    "font.size": 9.0,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.0,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "shoal",
    "path.simplify": True,
}


@dataclass
class Picture:
    """One finished figure: its file name without ending, what it shows in words, and its two forms."""

    name: str
    alt: str
    svg: str
    png: bytes
    wide: bool = False


@dataclass
class Canvas:
    """A figure being drawn: one axes with its margins in points, and texts that the page shows over points."""

    figure: Figure
    axes: Axes
    width: float
    height: float
    tips: list[tuple[tuple[float, ...], str]] = field(default_factory=list)

    def tip(self, x: float, y: float, text: str) -> None:
        """Show ``text`` when the reader points near data coordinates (x, y)."""
        self.tips.append(((x, y), text))

    def box_tip(self, left: float, right: float, low: float, high: float, text: str) -> None:
        """Show ``text`` when the reader points into a box in data coordinates."""
        self.tips.append(((left, low, right, high), text))

    def legend(self) -> None:
        """A legend below the axes; the figure grows by its rows."""
        handles, labels = self.axes.get_legend_handles_labels()
        if not handles:
            return
        longest = max(len(label) for label in labels)
        fits = max(1, int((self.width - 50) // (longest * 4.6 + 34)))
        rows = -(-len(handles) // fits)
        columns = -(-len(handles) // rows)
        self._grow(rows * 13.5)
        self.figure.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(self.axes.get_position().x0, 0.0),
            ncols=columns,
            borderaxespad=0.2,
            handlelength=1.8,
            columnspacing=1.4,
            handletextpad=0.6,
        )

    def _grow(self, points: float) -> None:
        box = self.axes.get_position()
        bottom, top = box.y0 * self.height + points, box.y1 * self.height + points
        self.height += points
        self.figure.set_size_inches(self.width / 72, self.height / 72)
        self.axes.set_position((box.x0, bottom / self.height, box.width, (top - bottom) / self.height))

    def finish(self, name: str, alt: str) -> Picture:
        """The figure as a `Picture`."""
        import matplotlib

        svg, png = io.StringIO(), io.BytesIO()
        with matplotlib.rc_context(_RC), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a glyph that the PNG's font lacks
            self.figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
            self.figure.savefig(png, format="png", dpi=150, facecolor=CARD, metadata={"Software": None})
        inline = inline_svg(svg.getvalue(), name, alt)
        inline = inline.removesuffix("</svg>") + "".join(self._tip(*tip) for tip in self.tips) + "</svg>"
        return Picture(name, alt, inline, png.getvalue(), self.width > WIDTH)

    def _tip(self, place: tuple[float, ...], text: str) -> str:
        corners = [place[:2], place[-2:]]
        (x0, y0), (x1, y1) = self.axes.transData.transform(corners).tolist()
        title = f"<title>{escape(text)}</title>"
        if len(place) == 2:
            return f'<circle class="tip" cx="{x0:.1f}" cy="{self.height - y0:.1f}" r="8">{title}</circle>'
        left, top, wide, high = min(x0, x1), self.height - max(y0, y1), abs(x1 - x0), abs(y1 - y0)
        return f'<rect class="tip" x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{high:.1f}">{title}</rect>'


@contextlib.contextmanager
def canvas(
    y_label: str,
    x_label: str,
    *,
    width: float = WIDTH,
    height: float = HEIGHT,
    left: float = 44.0,
    bottom: float = 34.0,
) -> Iterator[Canvas]:
    """A new figure in Shoal's style; ``y_label`` stands above the axis, level, where it can be read."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        top, right = 26.0, 12.0
        axes = figure.add_axes(
            (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height), zorder=1
        )
        axes.set_xlabel(x_label)
        axes.annotate(
            clean(y_label, 90),
            (0, 1),
            xycoords="axes fraction",
            xytext=(-left + 6, 10),
            textcoords="offset points",
            color=INK,
            fontsize=9.5,
            fontweight="bold",
        )
        yield Canvas(figure, axes, width, height)


def line_style(index: int) -> dict[str, Any]:
    """Colour, dashes and marker of the ``index``-th series: the same in every figure."""
    lap = index // len(SERIES)
    return {
        "color": SERIES[index % len(SERIES)],
        "linestyle": DASHES[lap % len(DASHES)],
        "marker": MARKERS[(index + lap) % len(MARKERS)],
    }


def log_scale(axes: Axes) -> None:
    """A vertical log axis whose ticks read 0.01 or 1e-8: matplotlib's own are TeX, which is not parsed here."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    def label(value: float, _: int) -> str:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e") if value < 1e-3 else f"{value:g}"

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    short = high < 100 * low  # less than two decades have too few powers of ten to read values off
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if short else (1.0,), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(label))
    axes.yaxis.set_minor_formatter(NullFormatter())


def clean(text: Any, longest: int = 32) -> str:
    """A label that can be drawn: no control characters, cut in the middle when it is too long."""
    shown = "".join(c if c.isprintable() else " " for c in str(text))
    if len(shown) <= longest:
        return shown
    half = (longest - 1) // 2
    return f"{shown[:half]}…{shown[-half:]}"


def escape(text: Any) -> str:
    """Text as it may stand in HTML, in an attribute too; control characters, which no page may hold, become blanks."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", " ", str(text)))


def inline_svg(svg: str, name: str, alt: str) -> str:
    """matplotlib's SVG made fit to stand in a page: no prologue, its own ids, colours and font from the page.

    Only what is inside tags is rewritten; text (escaped by matplotlib) is left as it is.
    """
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(|href=\")#([\w-]+)", svg))

    def tag(match: re.Match[str]) -> str:
        text = match.group(0)
        text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
        text = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", text)
        text = text.replace("xlink:href", "href")
        text = re.sub(r"#[0-9a-f]{6}(?=[;\"])", lambda m: _variable(m[0]), text)
        return re.sub(r"font: ((?:\w+ )*[\d.]+px) [^;\"]*", r"font: \1 var(--font)", text)

    svg = re.sub(r"<[^>]*>", tag, svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    head = f'<svg role="img" aria-label="{escape(alt)}" {box[0] if box else ""}>'
    return head + svg[svg.index(">") + 1 :]


def _variable(color: str) -> str:
    return f"var({VARIABLES[color]})" if color in VARIABLES else color
