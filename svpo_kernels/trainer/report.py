"""What a run leaves to read: a progress bar, metrics.jsonl, a PNG of the curves and a summary table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any

from rich.table import Table
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

METRICS = "metrics.jsonl"
CURVES = "curves.png"

# One panel a row: title, axis label, and the curves in it (train, and eval where there is one)
PANELS = (
    ("Loss", "loss", ("loss",)),
    ("Pairs won by the implicit reward", "share", ("rewards/accuracies",)),
    ("Implicit reward", "nats times beta", ("rewards/chosen", "rewards/rejected")),
    ("Step log-probability", "nats", ("logps/chosen", "logps/rejected")),
    ("Value head: squared error", "(v - target)^2", ("value/mse",)),
    ("Value head: pairs in order", "share", ("value/accuracy",)),
    ("Steps judged rightly", "share", ("prm/accuracy", "prm/auroc")),
    ("Calibration error of step scores", "ECE", ("prm/ece",)),
    ("First errors found", "share", ("prm/first_error_accuracy", "prm/f1")),
    ("Best of N", "share right", ("prm/best_of/min", "prm/best_of/prod", "prm/best_of/mean", "prm/best_of/last",
                                  "prm/best_of/geomean", "prm/best_of/first", "prm/best_of/oracle")),
    ("Policy loss and KL to the reference", "nats", ("loss/policy", "policy/kl", "policy/approx_kl")),
    ("Ratio to the policy that sampled", "new / old", ("policy/ratio",)),
    ("Members that a bound changed", "share", ("policy/clip_fraction",)),
    ("Compute saved against pairs run one by one", "share", ("compute/saved", "compute/saved_flops")),
)


class MetricsFile(TrainerCallback):
    """Writes every log entry to metrics.jsonl; a resumed run first drops what came after its checkpoint."""

    def __init__(self, output_dir: str | os.PathLike) -> None:
        self.path = Path(output_dir) / METRICS

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(map(_line, state.log_history)), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.log_history:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(state.log_history[-1]))


def read_metrics(output_dir: str | os.PathLike) -> list[dict[str, float]]:
    """The log entries of a run that has ended."""
    path = Path(output_dir) / METRICS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _line(entry: dict[str, float]) -> str:
    """One entry, its keys sorted: so they are in the history that a checkpoint keeps."""
    return json.dumps({"step": entry["step"], **dict(sorted(entry.items()))}) + "\n"


class ProgressBar(ProgressCallback):
    """Theirs, with the newest figures behind the bar instead of lines above it."""

    SHOWN = {"loss": "loss", "rewards/accuracies": "pairs won", "value/mse": "value mse", "prm/accuracy": "steps right",
             "policy/clip_fraction": "clipped", "compute/saved": "saved"}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix({name: f"{logs[key]:.3g}" for key, name in self.SHOWN.items() if key in logs})


def watch(items: Sized, title: str) -> Iterator[Any]:
    """A progress bar over what has a length, gone when it is done."""
    return iter(tqdm(items, desc=title, unit="block", leave=False, dynamic_ncols=True))


def draw_curves(history: list[dict[str, float]], path: str | os.PathLike, title: str = "") -> Path:
    """Write the curves of a run's log history as PNG: one panel a metric that occurs, train and eval in one panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if any(name in entry for name in panel[2] for entry in history)]
    columns = 2 if len(panels) > 1 else 1
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(5.5 * columns, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (heading, label, names) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        for color, name in enumerate(names):
            for prefix, style in (("", "-"), ("eval_", "o--")):
                points = curve(history, prefix + name)
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=f"C{color}", markersize=4, linewidth=1.3,
                              label=f"{prefix}{name}")
        axes.set(title=heading, xlabel="optimizer step", ylabel=label)
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    if title:
        figure.suptitle(title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def curve(history: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    """(step, value) of a metric; what the last entry says of the whole run is no point of it."""
    return [(entry["step"], entry[name]) for entry in history if name in entry and "train_runtime" not in entry]


def last(history: list[dict[str, float]], name: str) -> float | None:
    """The newest value of a metric, None if it never came."""
    return next((entry[name] for entry in reversed(history) if name in entry), None)


def first(history: list[dict[str, float]], name: str) -> float | None:
    return next((entry[name] for entry in history if name in entry), None)


def summary_rows(history: list[dict[str, float]]) -> list[tuple[str, str, str]]:
    """(metric, first, last value as text) of every curve of a run."""
    rows = []
    names = dict.fromkeys(name for panel in PANELS for name in panel[2])
    for prefix in ("", "eval_"):
        for name in names:
            begin, end = (read(history, prefix + name) for read in (first, last))
            if begin is not None:
                share = name.startswith(("compute/", "prm/best_of/")) or name.endswith((
                    "accuracies", "accuracy", "clip_fraction"))
                rows.append((prefix + name, *(f"{value:.1%}" if share else f"{value:.4g}" for value in (begin, end))))
    return rows


def summary_table(history: list[dict[str, float]], title: str) -> Table:
    """The rows of `summary_rows`."""
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    for heading in ("first", "last"):
        table.add_column(heading, justify="right")
    for row in summary_rows(history):
        table.add_row(*row)
    return table


def human(number: float) -> str:
    """1234567 as 1.23 M."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g}"
