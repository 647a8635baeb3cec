"""The results of a run as PNG: the head against T, V and f, shares of the floor, savings by tree shape, loss curves."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import linear_step_logps, training, trees
from .race import Result

DPI, COLORS = 90, 256  # a plot stays below 100 kB; in all colours the largest takes 215


def draw(results: Iterable[Result], folder: Path) -> list[Path]:
    """Every plot that these results have data for."""
    results = list(results)
    made = [plot(results, folder) for plot in (draw_head, draw_floors, draw_savings, draw_passes, draw_losses)]
    return [path for path in made if path is not None]


def _figure(columns: int, rows: int = 1, width: float = 4.4, height: float = 3.4) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: Path) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    Image.open(drawn).convert("RGB").quantize(COLORS).save(path, optimize=True)
    return path


def _ticks(panel: Any, values: Iterable[float]) -> None:
    """A mark at each value, in plain numbers, on a logarithmic axis."""
    values = sorted(set(values))
    panel.set_xticks(values, [f"{value:g}" for value in values], fontsize=7)
    panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)


def _series(results: list[Result], axis: int) -> list[Result]:
    """The races that differ in one number of their shape only: the largest such group, in its order."""
    shaped = [r for r in results if r.family == linear_step_logps.FAMILY and "shape" in r.curves]
    others = [tuple(x for i, x in enumerate(r.curves["shape"]) if i != axis) for r in shaped]
    if not others:
        return []
    common = Counter(others).most_common(1)[0][0]
    group = [r for r, other in zip(shaped, others, strict=True) if other == common]
    return sorted(group, key=lambda r: r.curves["shape"][axis])


def draw_head(results: list[Result], folder: Path) -> Path | None:
    """Time and peak memory of everyone's vocabulary head against T, V and f."""
    axes_of = {"T (tokens)": 0, "V (words)": 2, "f (scored / all rows)": 3}
    series = {label: _series(results, axis) for label, axis in axes_of.items()}
    if max(map(len, series.values())) < 2:
        return None
    figure, axes = _figure(3, 2)
    for column, (label, group) in enumerate(series.items()):
        x = [r.curves["shape"][axes_of[label]] for r in group]
        names = list(dict.fromkeys(name for r in group for name in r.medians))
        peers = list(dict.fromkeys(name.rpartition(", ")[0] for name in names))
        for row, unit in enumerate(("ms", "peak MiB")):
            panel = axes[row][column]
            for name in names:
                values = [(r.medians if row == 0 else r.memory).get(name) for r in group]
                points = [(a, b) for a, b in zip(x, values, strict=True) if b]
                if points:
                    peer, _, rows = name.rpartition(", ")
                    style = dict(color=f"C{peers.index(peer)}", linestyle=":" if rows == "all rows" else "-")
                    if not peer:  # ours and the floor
                        floor = name in group[0].floors
                        style = dict(color="black", linestyle="--" if floor else "-", linewidth=1 if floor else 3)
                    panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
            panel.set(xscale="log", yscale="log", xlabel=label, ylabel=unit)
            _ticks(panel, x)
            panel.grid(alpha=0.3)
    handles, labels = axes[0][2].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, loc="outside lower center", ncols=5)
    figure.suptitle("Log-prob head, forward + backward: time and peak memory")
    return _save(figure, folder / "head.png")


def draw_floors(results: list[Result], folder: Path) -> Path | None:
    """Share of the floor that ours and the best peer reach."""
    with_floor = [r for r in results if r.floor_ms is not None]
    if not with_floor:
        return None
    figure, axes = _figure(1, 1, width=10, height=0.8 + 0.34 * len(with_floor))
    panel = axes[0][0]
    for place, r in enumerate(with_floor):
        peers = [name for name in r.medians if name not in (r.ours, *r.floors)]
        panel.barh(place - 0.2, r.share(r.ours), 0.4, color="black", label="ours" if place == 0 else None)
        if peers:
            best = min(peers, key=r.medians.__getitem__)
            panel.barh(place + 0.2, r.share(best), 0.4, color="C1", label="best peer" if place == 0 else None)
            panel.text(r.share(best), place + 0.2, f" {best}", va="center", fontsize=6)
    panel.axvline(1.0, color="C3", linewidth=1)
    panel.set(yticks=range(len(with_floor)), xlabel="share of the floor (1: this machine's own copy or product rate)",
              title="How near the floor")
    panel.set_yticklabels([r.case.replace("forward + backward", "fwd + bwd") for r in with_floor], fontsize=6)
    panel.invert_yaxis()
    panel.legend(fontsize=8)
    return _save(figure, folder / "floors.png")


def draw_savings(results: list[Result], folder: Path) -> Path | None:
    """FLOPs saved against tree shape; dashed: the bound by counting tokens."""
    shaped = [r for r in results if r.family == trees.SHAPES]
    if not shaped:
        return None
    figure, axes = _figure(4, width=3.8)
    length = Counter(r.curves["shape"][2] for r in shaped).most_common(1)[0][0]
    usual = [r for r in shaped if r.curves["shape"][2] == length]
    for panel, baseline in zip(axes[0][:2], (trees.PAIRWISE, trees.DISTINCT), strict=True):
        for color, children in enumerate(sorted({r.curves["shape"][1] for r in usual if r.curves["shape"][0] > 1})):
            own = [r for r in usual if r.curves["shape"][1] == children]
            _saved(panel, own, 0, baseline, f"C{color}", f"{children:.0f} children")
        panel.set(xlabel="depth", ylabel="FLOPs saved", title=f"against {baseline}, steps of {length:.0f} tokens")
    siblings, steps = axes[0][2:]
    for color, baseline in enumerate((trees.PAIRWISE, trees.DISTINCT)):
        label = f"against {baseline}"
        _saved(siblings, [r for r in usual if r.curves["shape"][0] == 1], 1, baseline, f"C{color}", label)
        _saved(steps, [r for r in shaped if r.curves["shape"][:2] == [3, 4]], 2, baseline, f"C{color}", label)
    siblings.set(xscale="log", xlabel="siblings", title=f"answers to one prompt, {length:.0f} tokens each")
    steps.set(xscale="log", xlabel="tokens a step", title="depth 3, 4 children")
    for panel in (siblings, steps):
        _ticks(panel, panel.lines[0].get_xdata())
    for panel in axes[0]:
        panel.set_ylim(0, 1)
        panel.title.set_fontsize(9)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, loc="lower right")
    figure.suptitle("Training FLOPs saved, Llama-3-8B, exact attention; dashed: the bound by counting tokens")
    return _save(figure, folder / "savings.png")


def _saved(panel: Any, shaped: list[Result], axis: int, baseline: str, color: str, label: str) -> None:
    """A line of savings along one number of the shape, its bound by tokens dashed."""
    shaped = sorted(shaped, key=lambda r: r.curves["shape"][axis])
    x = [r.curves["shape"][axis] for r in shaped]
    panel.plot(x, [1 - r.medians["packed"] / r.medians[baseline] for r in shaped], "o-", color=color, markersize=4,
               label=label)
    which = (trees.PAIRWISE, trees.DISTINCT).index(baseline)
    panel.plot(x, [r.curves["bound by tokens"][which] for r in shaped], "--", color=color, linewidth=1)


def draw_passes(results: list[Result], folder: Path) -> Path | None:
    """Seconds of one pass over all pairs, by tree."""
    timed = [r for r in results if r.family == trees.PASSES]
    if not timed:
        return None
    figure, axes = _figure(1, 1, width=9, height=0.8 + 0.5 * len(timed))
    panel = axes[0][0]
    for shift, (name, color) in enumerate((("packed", "black"), (trees.DISTINCT, "C0"), (trees.PAIRWISE, "C1"))):
        rows = [(place + 0.27 * (shift - 1), r.medians[name]) for place, r in enumerate(timed) if name in r.medians]
        if rows:
            panel.barh([a for a, _ in rows], [b / 1e3 for _, b in rows], 0.27, color=color, label=name)
    panel.set(xscale="log", yticks=range(len(timed)), xlabel="seconds", title="One pass over all pairs, by tree")
    panel.set_yticklabels([r.case for r in timed], fontsize=7)
    panel.invert_yaxis()
    panel.legend(fontsize=8)
    return _save(figure, folder / "trees.png")


def draw_losses(results: list[Result], folder: Path) -> Path | None:
    """The loss curves of every way to train the same pairs, and the seconds that a step took."""
    trained = [r for r in results if r.family == training.FAMILY and r.unit == "ms" and r.curves]
    if not trained:
        return None
    figure, axes = _figure(len(trained))
    for panel, r in zip(axes[0], trained, strict=True):
        for order, (name, losses) in enumerate(r.curves.items()):
            # widest below, thinnest on top: curves that agree show as one line with a coloured border
            panel.plot(range(1, len(losses) + 1), losses, linewidth=9 - 2.3 * order, color=f"C{order}", alpha=0.9,
                       label=f"{name}: {r.medians[name]:,.0f} ms a step")
        panel.set(xlabel="optimizer step", ylabel="loss", title=r.case.removeprefix("training step, "),
                  xticks=range(1, len(losses) + 1))
        panel.title.set_fontsize(8)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.suptitle("The same loss, four ways")
    return _save(figure, folder / "training.png")
