"""Writes the pages that are made from code and results: `python docs/generate.py`; with `--check` it only compares.

settings.md from the configuration and the presets, models.md from the equality test's table, the figures of README.md
and benchmarks.md from `benchmarks/results/cpu.json`. Never edited by hand; `tests/test_docs.py` compares.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
MADE = "<!-- made by docs/generate.py -->"
FIELDS = "## Fields of `TrainingArguments` of transformers"
# Rows of the README: one figure each that no other row restates.
HEADLINES = (
    "three real trees, tokens",
    "three real trees at the defaults (same_kind, any gap), tokens",
    "three real trees, training FLOPs, Llama-3-8B, exact attention",
    "deep synthetic tree (depth 6, 4 children), tokens",
)
RACES = (
    "linear_step_logps forward + backward, frozen head, T 1024, D 1024, V 65536, f 0.25, float32",
    "linear_step_logps forward + backward, trainable head, T 1024, D 1024, V 65536, f 0.25, float32",
    "step_logps forward, 512 x 128256 float32",
    "prm_scores_from_lm_head, 32 steps of 512 tokens, head (128256, 1024), float32, 200 times",
    "training step, 3 real trees, gap > 0.6",
)


# -- settings ---------------------------------------------------------------------------------------------------------


def settings() -> str:
    import transformers

    from svpo_kernels.trainer import policy
    from svpo_kernels.trainer.keys import table
    from svpo_kernels.trainer.presets import PRESETS, SETTINGS
    from svpo_kernels.trainer.settings import own_keys

    lines = ["# Settings of `svpo train`", "", MADE, "", "| key | default | |", "| --- | --- | --- |"]
    lines += [f"| `{key}` | `{default}` | {cell(text)} |" for key, default, text in own_keys()]
    lines += ["", "## Presets", "", "A key of the loss that is left out takes the preset's value."]
    known = {name: (preset, preset | SETTINGS.get(name, {})) for name, preset in PRESETS.items()}
    known |= {name: (preset, {"objective": "policy"} | policy.preset_keys(name))
              for name, preset in policy.PRESETS.items()}
    for name, (preset, keys) in known.items():
        values = ", ".join(f"`{key}: {value}`" for key, value in keys.items())
        lines += ["", f"**{name}**: {values}", "", f"- Source: {preset.source}", f"- Stated there: {preset.theirs}",
                  f"- Ours: {preset.ours}"]
    lines += ["", f"{FIELDS} {transformers.__version__}", "", "| key | here | |", "| --- | --- | --- |"]
    for key in table():
        how = f"by {key.key}" if key.how == "elsewhere" else key.how
        lines.append(f"| `{key.name}` | {cell(how)} | {cell(key.note)} |")
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# -- models -----------------------------------------------------------------------------------------------------------


def models() -> str:
    import streams
    import tiny_models

    streamed = streams.ATTENTION | streams.HYBRIDS | streams.MORE_HYBRIDS
    lines = ["# Models", "", MADE, "",
             "Every row is a test (`tests/test_models.py`): a small random model of the architecture, packed, against "
             "a separate run of every path; or the refusal, with what it names. Streamed (`sk.stream_backward`, "
             "`packing: stream`): `tests/test_stream.py`, equal to separate runs to 1e-9 in fp64. A model that is not "
             "listed is asked itself before training (`sk.check_packing`).", "",
             "| architecture | layers | packed trees | streamed |", "| --- | --- | --- | --- |"]
    for name, config in tiny_models.configs().items():
        layers = sorted(set(getattr(config, "layer_types", None) or ["full_attention"]))
        lines.append(f"| {type(config).__name__.removesuffix('Config')} ({name}) | {', '.join(layers)} | exact | "
                     f"{'exact' if name in streamed else 'not tested'} |")
    for name, (config, why) in tiny_models.refused().items():
        lines.append(f"| {type(config).__name__.removesuffix('Config')} ({name}) | "
                     f"{cell(why.replace('|', ' or '))} | refused by name | "
                     f"{'exact' if name in streamed else 'refused by name'} |")
    for name, config in (streams.HYBRIDS | streams.MORE_HYBRIDS).items():
        if name not in tiny_models.refused():
            layers = sorted(set(getattr(config, "layer_types", None) or ["linear_attention"]))
            lines.append(f"| {type(config).__name__.removesuffix('Config')} ({name}) | {', '.join(layers)} | "
                         "refused by name | exact |")
    return "\n".join(lines) + "\n"


# -- figures ----------------------------------------------------------------------------------------------------------


def figure(value: float, unit: str) -> str:
    if unit in ("tokens", "FLOPs"):
        return f"{value:,.0f}" if value < 1e9 else f"{value:.3g}"
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def savings(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| counted | packed | less than pairwise | less than distinct |"
    yield "| --- | --- | --- | --- |"
    for row in rows:
        packed, pairwise, distinct = row["medians"].values()
        shares = " | ".join(f"{100 * (1 - packed / other):.1f} %" for other in (pairwise, distinct))
        yield f"| {row['case']} | {figure(packed, row['unit'])} | {shares} |"


def races(rows: list[dict[str, Any]], every: bool) -> Iterator[str]:
    """ours, then the peers: all of them, or the strongest and the first."""
    from svpo_kernels.bench.race import Result

    yield "| measured | ours | against |"
    yield "| --- | --- | --- |"
    for result in map(Result.from_row, rows):
        peers = [name for name in result.medians if name != result.ours]
        if not every:
            real = [name for name in peers if name not in result.floors]
            best = min(real, key=lambda name: result.medians[name])
            peers = [real[0], *(name for name in (best,) if name != real[0]),
                     *(name for name in peers if name in result.floors)]
        others = []
        for name in peers:
            kind = "floor, " if name in result.floors else ""
            goal = f" ({result.targets[name]})" if every and name in result.targets else ""
            others.append(f"{kind}{name} {figure(result.medians[name], result.unit)}: {result.ratio(name):.2f}x{goal}")
        ours = f"{figure(result.medians[result.ours], result.unit)} {result.unit}"
        yield f"| {result.case} | {ours} | {'; '.join(others)} |"


def results() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    data = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())
    return data, data["results"]


def machine(data: dict[str, Any]) -> str:
    return f"{data['device']}, Python {data['python']}, torch {data['torch']}, {data['date']}"


def readme() -> str:
    data, rows = results()
    by_case = {row["case"]: row for row in rows}
    lines = [*savings([by_case[case] for case in HEADLINES if case in by_case]), "",
             *races([by_case[case] for case in RACES if case in by_case], every=False), "",
             f"{machine(data)}; medians of interleaved runs in one process, answers checked first. A peer's ratio is "
             "theirs / ours: above 1 we are ahead; a floor's is ours / floor: 1 is the limit."]
    return between((ROOT / "README.md").read_text(), "promise", lines)


def benchmarks() -> str:
    from svpo_kernels.bench.race import Result
    from svpo_kernels.bench.results import losses
    from svpo_kernels.bench.trees import SAVINGS

    data, rows = results()
    timed = [Result.from_row(row) for row in rows if row["unit"] == "ms"]
    behind = losses(timed)
    lines = [f"{machine(data)}. Medians of interleaved runs in one process; every answer is checked first. A peer's "
             "ratio is theirs / ours: above 1 we are ahead. A floor's is ours / floor: 1 is the limit. In brackets: "
             f"what was to be reached. A peer is ahead in {len({case for case, _, _ in behind})} of {len(timed)} "
             "races.", "",
             *savings([row for row in rows if row["family"] == SAVINGS]), "",
             *races([row for row in rows if row["headline"] and row["family"] != SAVINGS], every=True)]
    if behind:
        lines += ["", "Where a peer is ahead:", ""]
        lines += [f"- {case}: {peer} takes {100 / ratio:.0f} % of our time" for case, peer, ratio in behind]
    return between((ROOT / "docs" / "benchmarks.md").read_text(), "figures", lines)


def between(text: str, name: str, lines: list[str]) -> str:
    """The text with what stands between the markers of that name made new."""
    body = "\n".join([f"<!-- {name}:begin -->", *lines, f"<!-- {name}:end -->"])
    text, count = re.subn(f"<!-- {name}:begin -->.*?<!-- {name}:end -->", lambda _: body, text, flags=re.S)
    if count != 1:
        raise ValueError(f"the markers of {name!r} must be there once, got {count}")
    return text


PAGES: dict[str, Callable[[], str]] = {
    "docs/settings.md": settings, "docs/models.md": models, "docs/benchmarks.md": benchmarks, "README.md": readme,
}


def stale() -> list[str]:
    """Pages that differ from what this would write."""
    return [page for page, make in PAGES.items() if not (ROOT / page).is_file() or (ROOT / page).read_text() != make()]


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit("\n".join(f"{page} is stale: run python docs/generate.py" for page in stale()))
    for page, make in PAGES.items():
        (ROOT / page).write_text(make())
