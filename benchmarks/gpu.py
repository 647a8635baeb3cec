"""The figures of a GPU in one command: answers checked first, then CUDA events, flushed caches, medians and floors.

    python -m benchmarks.gpu                  all cases on the current CUDA device
    python -m benchmarks.gpu --only prm       the cases whose name holds "prm"
    python -m benchmarks.gpu --dry-run        tiny shapes on the CPU: that the command works, no figures

Every backend that is there (triton, cuda, reference) and every peer that is installed, on all rows and on the scored
rows gathered before. Floors are the bytes or the products that nobody can do without, at this device's own copy, read
and product rates, measured in the same run. Writes benchmarks/results/<device>-<date>.json.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import svpo_kernels as sk
from svpo_kernels.bench import step_logps as rows
from svpo_kernels.bench.machine import Rates, Work, describe, installed, measure
from svpo_kernels.bench.peers import HeadInputs, HeadShape, peers
from svpo_kernels.bench.race import Clock
from svpo_kernels.linear_step_logps import cuda as cuda_head

RESULTS = Path(__file__).parent / "results"
# A variant whose answer is further from fp64 than this, relative to the largest value, is not timed.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"


@dataclass
class Row:
    """One variant of one case. share: floor / ms; rate in GB/s or TFLOP/s of the work that cannot be left out."""

    case: str
    variant: str
    ms: float | None = None
    rate: float | None = None
    unit: str = ""
    floor_ms: float | None = None
    share: float | None = None
    peak_mib: float | None = None
    device_us: float | None = None  # of replays in a CUDA graph, for ops that a launch takes longer than
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Case:
    """variants: name -> call that returns what `exact` does; `work` is the least that any of them must do."""

    name: str
    dtype: torch.dtype
    work: Work
    variants: dict[str, Callable[[], list[Tensor]]]
    exact: Callable[[], list[Tensor]]
    small: bool = False


# -- cases --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """The shapes of a run. heads: (T, D, V, f); logits: (T, V)."""

    device: str
    dtype: torch.dtype
    logits: tuple[tuple[int, int], ...]
    heads: tuple[tuple[int, int, int, float], ...]
    P: int
    prm: tuple[int, int, int]  # T, D, S


FULL = Scale("cuda", torch.bfloat16, ((8192, 128256), (8192, 151936)),
             ((8192, 4096, 128256, 1.0), (8192, 4096, 128256, 0.25), (8192, 2304, 256000, 1.0),
              (8192, 4096, 151936, 1.0)), 64, (8192, 4096, 256))
TINY = Scale("cpu", torch.float32, ((16, 1000),), ((32, 16, 300, 0.25),), 8, (32, 16, 5))


def backends(op: str, device: str) -> list[str]:
    report = sk.backends(op, device=device)
    return [name for name in ("cuda", "triton", "cpu", "reference") if report[name] == "usable"]


def cases(scale: Scale) -> Iterator[tuple[str, Callable[[str], Case]]]:
    """Names and builders: one case's tensors are gone before the next one's are made."""
    for T, V in scale.logits:
        for backward, what in ((False, "forward"), (True, "forward + backward")):
            shape = rows.RowShape(T, V, scale.dtype, backward, scale.device)
            yield f"step_logps {what}, {shape}", partial(_logits, shape)
    for T, D, V, f in scale.heads:
        for kind in ("no grad", "frozen", "trainable"):
            shape = HeadShape(T, D, V, f, kind == "trainable", scale.dtype, scale.device)
            name = str(shape).replace("frozen head", "no grad") if kind == "no grad" else str(shape)
            yield f"linear_step_logps, {name}", partial(_head, shape, kind)
    yield f"svpo_loss forward + backward, P {scale.P}", partial(_svpo_loss, scale)
    T, D, S = scale.prm
    yield f"prm_scores, {S} steps of {T} rows, D {D}", partial(_prm_scores, scale)


def _logits(shape: rows.RowShape, name: str) -> Case:
    logits, labels, step_ids = rows.inputs(shape)
    plan = sk.StepPlan.from_step_ids(labels.cpu(), step_ids.cpu(), shift=0, num_steps=rows.S).to(shape.device)
    upstream = torch.randn(rows.S, device=shape.device)
    logits.requires_grad_(shape.backward)

    def wrap(function: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        if not shape.backward:
            return lambda: [function()]

        def both() -> list[Tensor]:
            out = function()
            return [out.detach(), *torch.autograd.grad(out, logits, upstream)]

        return both

    def exact() -> list[Tensor]:
        """By the formula, 512 rows at a time."""
        out, grads = torch.zeros(rows.S, dtype=torch.float64, device=shape.device), []
        for part in torch.arange(shape.T, device=shape.device).split(512):
            logp = torch.log_softmax(logits.detach()[part].double(), -1)
            out.index_add_(0, step_ids[part], logp.gather(1, labels[part, None]).squeeze(1))
            g = upstream.double()[step_ids[part]].unsqueeze(1)
            if shape.backward:
                grads.append(logp.exp_().mul_(-g).scatter_add_(1, labels[part, None], g).float())
        return [out, torch.cat(grads)] if shape.backward else [out]

    variants = {f"ours, {backend}": wrap(lambda b=backend: sk.step_logps(logits, plan, backend=b))
                for backend in backends("step_logps", shape.device)}
    others = {"eager": rows.eager, "torch.compile": rows.compiled} | ({"TRL": rows.trl} if installed("trl") else {})
    variants |= {peer: wrap(lambda g=call: g(logits, labels, step_ids)) for peer, call in others.items()}
    return Case(name, shape.dtype, shape.work, variants, exact)


def _head(shape: HeadShape, kind: str, name: str) -> Case:
    inputs = HeadInputs(shape)
    grad = kind != "no grad"
    work = shape.work
    if not grad:
        work = Work(work.read, 0.0, 2 * int(shape.T * shape.f) * shape.D * shape.V)
        inputs.hidden.requires_grad_(False)

    def wrap(function: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        return (lambda: inputs.backward(function)) if grad else (lambda: [function()])

    ours = backends("linear_step_logps", shape.device)
    # 2048 MiB keep all rows of the largest shape: three products, nothing is computed twice
    variants = {f"ours, {backend}": wrap(inputs.ours(backend=backend, logits_budget_mb=2048)) for backend in ours}
    if grad and "cuda" in ours:
        once = inputs.ours(backend="cuda", logits_budget_mb=2048)
        variants["ours, cuda, rows in clusters"] = wrap(_in_clusters(once))
    for peer, head in peers(shape.device)[0].items():
        variants[f"{peer}, all rows"] = wrap(inputs.all_rows(head))
        if shape.f < 1:
            variants[f"{peer}, gathered rows"] = wrap(inputs.gathered(head))
    return Case(name, shape.dtype, work, variants, inputs.exact if grad else lambda: inputs.exact()[:1])


def _in_clusters(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """With rows held by csrc/cuda/cluster_rows.cu where they can be: the race that is to decide on the default."""

    def run() -> Tensor:
        before, cuda_head.CLUSTERS = cuda_head.CLUSTERS, True
        try:
            return function()
        finally:
            cuda_head.CLUSTERS = before

    return run


def _svpo_loss(scale: Scale, name: str) -> Case:
    torch.manual_seed(0)
    P, device = scale.P, scale.device
    lp, ref, values, targets = (torch.randn(2 * P, device=device) for _ in range(4))
    leaves = [lp.requires_grad_(), values.requires_grad_()]
    pairs = torch.randperm(2 * P).view(P, 2).to(device)

    def run(backend: str, lp: Tensor, ref: Tensor, values: Tensor, targets: Tensor) -> list[Tensor]:
        out = sk.svpo_loss(lp, pairs, ref, values=values, value_targets=targets, rank="logistic", backend=backend).loss
        return [out.detach(), *torch.autograd.grad(out, (lp, values))]

    variants = {f"ours, {backend}": partial(run, backend, leaves[0], ref, leaves[1], targets)
                for backend in backends("svpo_loss", device)}
    doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in (leaves[0], ref, leaves[1], targets)]
    work = Work(4.0 * 2 * P * 4, 4.0 * 2 * P * 2)
    return Case(name, torch.float32, work, variants, lambda: run("reference", *doubles), small=True)


def _prm_scores(scale: Scale, name: str) -> Case:
    torch.manual_seed(0)
    (T, D, S), device = scale.prm, scale.device
    hidden, weight = torch.randn(T, D, device=device).to(scale.dtype), torch.randn(1, D, device=device) / D**0.5
    positions = torch.sort(torch.randperm(T)[:S]).values.to(device)

    def run(backend: str, hidden: Tensor, weight: Tensor) -> list[Tensor]:
        return [sk.prm_scores(hidden, positions, weight, activation="sigmoid", backend=backend)]

    variants = {f"ours, {backend}": partial(run, backend, hidden, weight)
                for backend in backends("prm_scores", device)}
    variants["eager, all rows"] = lambda: [torch.sigmoid(hidden.float() @ weight[0])[positions]]
    variants["eager, gathered rows"] = lambda: [torch.sigmoid(hidden[positions].float() @ weight[0])]
    work = Work(S * D * torch.finfo(scale.dtype).bits / 8 + 4 * D)
    return Case(name, torch.float32, work, variants, lambda: run("reference", hidden.double(), weight.double()),
                small=True)


# -- one variant --------------------------------------------------------------------------------------------------


def judge(got: list[Tensor], exact: list[Tensor]) -> float:
    """The largest distance from fp64 over all results, each relative to its largest value; NaN is infinite."""
    worst = 0.0
    for a, b in zip(got, exact, strict=True):
        error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-3)
        worst = max(worst, error.item() if error.isfinite() else float("inf"))
    return worst


def time_it(function: Callable[[], Any], clock: Clock, seconds: float, least: int = 5, most: int = 50) -> float:
    """Median of up to `most` calls, at least `least`, in about `seconds`."""
    times, start = [], time.perf_counter()
    while len(times) < least or (len(times) < most and time.perf_counter() - start < seconds):
        times.append(clock(function))
    return statistics.median(times)


def graph_us(function: Callable[[], Any], copies: int = 20) -> float:
    """Device time of one call: copies of it in a CUDA graph, so that no launch is waited for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(copies):
            function()
    clock = Clock("cuda")
    return 1e3 * statistics.median(clock(graph.replay) for _ in range(20)) / copies


def peak_mib(function: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = function()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def figures(row: Row, work: Work, rates: Rates) -> Row:
    """Rate, floor and its share, from the time: products where the floor is theirs, else bytes."""
    row.floor_ms = rates.floor_ms(work)
    row.share = row.floor_ms / row.ms
    bound = work.flops / rates.tflops / 1e9 >= rates.floor_ms(replace(work, flops=0.0))
    row.rate, row.unit = (work.flops / row.ms / 1e9, "TFLOP/s") if bound else (
        (work.read + work.write) / row.ms / 1e6, "GB/s")
    return row


def run_case(case: Case, rates: Rates, device: str, seconds: float) -> Iterator[Row]:
    clock, exact = Clock(device), case.exact()
    for name, function in case.variants.items():
        row = Row(case.name, name)
        try:
            row.error = judge(function(), exact)
            if row.error > TOLERANCE[case.dtype]:
                row.note = f"wrong: {row.error:.1e} from fp64, not timed"
            else:
                row.ms = time_it(function, clock, seconds)
                figures(row, case.work, rates)
                if device == "cuda":
                    row.peak_mib = peak_mib(function)
                    row.device_us = graph_us(function) if case.small and name.startswith("ours") else None
        except torch.OutOfMemoryError:
            row.note = "out of memory"
        except Exception as error:  # a peer that cannot run here costs its row, not the run
            if name.startswith("ours"):
                raise
            row.note = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}" if str(error) else repr(error)
        yield row
        if device == "cuda":
            torch.cuda.empty_cache()


# -- the command --------------------------------------------------------------------------------------------------


def clocks() -> str:
    """Name, driver, clocks, power limit and temperature as nvidia-smi has them; it is only asked, nothing is set."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi did not answer: {error}"


def line(row: Row) -> str:
    if row.ms is None:
        return f"  {row.variant:42s} {row.note}"
    peak = "" if row.peak_mib is None else f"{row.peak_mib:9.0f} MiB"
    device = "" if row.device_us is None else f"{row.device_us:8.2f} us in a graph"
    return (f"  {row.variant:42s} {row.ms:10.3f} ms {row.rate:9.1f} {row.unit:7s} {row.share:7.1%} of the floor "
            f"{row.floor_ms:.3f} ms{peak} error {row.error:.1e}{device}")


def write(path: Path, about: dict[str, Any], found: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "rows": [asdict(row) for row in found]}, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--seconds", type=float, default=1.0, help="about the time that one variant is measured")
    parser.add_argument("--output", type=Path, help="the JSON file (default: benchmarks/results/<device>-<date>.json)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    given = parser.parse_args(arguments)
    if not given.dry_run and not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device here; --dry-run tries the command on the CPU", file=sys.stderr)
        return 2
    scale = TINY if given.dry_run else FULL
    command = "python -m benchmarks.gpu " + " ".join(sys.argv[1:] if arguments is None else arguments)
    rates = measure(scale.device, scale.dtype, "tiny" if given.dry_run else None)
    about = {**describe(command.strip()), "rates": asdict(rates), "skipped": peers(scale.device)[1],
             "gpu": "" if given.dry_run else clocks()}
    print(*(f"{key}: {value}" for key, value in about.items()), sep="\n")
    found: list[Row] = []
    for name, build in cases(scale):
        if given.only not in name:
            continue
        print(f"\n{name}", flush=True)
        for row in run_case(build(name), rates, scale.device, given.seconds):
            found.append(row)
            print(line(row), flush=True)
    if not given.dry_run:
        about["gpu after"] = clocks()
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    path = given.output or RESULTS / f"{name}-{about['date']}.json"
    if given.output or not given.dry_run:
        write(path, about, found)
        print(f"\nwritten: {path}")
    wrong = [row for row in found if row.variant.startswith("ours") and row.ms is None]
    print(*(f"WRONG: {row.case}, {row.variant}: {row.note}" for row in wrong), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
