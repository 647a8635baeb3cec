"""`linear_step_logps` against everyone's vocabulary head: the adopter's question, and sweeps over T, V and f.

A peer whose answer is wrong is not timed: its line says by how much. On the CPU the shapes are scaled down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from .machine import Rates
from .peers import HeadInputs, HeadShape, peers
from .race import Result, error_against, peak_memory, race, weigh

FAMILY = "linear_step_logps"
OURS, FULL, GATHERED = "ours", "eager, all rows", "eager, gathered rows"
ALL_KEPT = "ours, all rows kept"
# Largest error of a value or gradient against fp64, relative to its largest entry, that counts as the same answer
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# Qwen2.5-7B's head is (152064, 3584). The CPU keeps V, where the softmax is, and an eighth of D: 35 GFLOP a product.
QUICK = {
    "tiny": HeadShape(64, 32, 1000, 1.0),
    "cpu": HeadShape(256, 448, 152064, 1.0),
    "gpu": HeadShape(8192, 3584, 152064, 1.0, dtype=torch.bfloat16, device="cuda"),
}
BASE = {
    "tiny": HeadShape(64, 32, 1000, 0.25),
    "cpu": HeadShape(256, 512, 65536, 0.25),
    "gpu": HeadShape(8192, 4096, 128256, 0.25, dtype=torch.bfloat16, device="cuda"),
}
SHARES = (0.05, 0.25, 0.5, 1.0)
TARGETS = {
    False: {FULL: ">= 4", GATHERED: ">= 1.1", "bare products": "<= 1.2"},
    True: {FULL: ">= 3", GATHERED: ">= 1.0", "bare products": "<= 1.2"},
}


def quick(scale: str) -> list[HeadShape]:
    """The adopter's question, at f = 1 and 0.25."""
    return [replace(QUICK[scale], f=f) for f in (1.0, 0.25)]


def sweep(scale: str) -> dict[str, list[HeadShape]]:
    """axis of a plot -> shapes along it: T and V in halvings, f, one thing at a time."""
    base = BASE[scale]
    factors, shares = ((0.25, 0.5, 1, 2), SHARES) if scale != "tiny" else ((0.5, 1), SHARES[1:3])
    return {
        "T": [replace(base, T=int(base.T * factor)) for factor in factors],
        "V": [replace(base, V=int(base.V * factor)) for factor in factors],
        "f": [replace(base, f=f) for f in shares],
    }


def cases(scale: str) -> list[HeadShape]:
    """The quick ones, then every shape of the sweeps once, and its base with a frozen head."""
    shapes = [shape for axis in sweep(scale).values() for shape in axis]
    frozen = [replace(BASE[scale], trainable=False, f=f) for f in (0.25, 1.0)]
    return list(dict.fromkeys([*quick(scale), *shapes, *frozen]))


def run(shape: HeadShape, rates: Rates, **limits: Any) -> Iterator[Result]:
    """One race of forward and backward: time, peak memory, error against fp64, share of the floor."""
    inputs = HeadInputs(shape)
    heads, skipped = peers(shape.device)
    functions = {OURS: inputs.ours()}
    for name, head in heads.items():
        functions[f"{name}, all rows"] = inputs.all_rows(head)
        if shape.f < 1:
            functions[f"{name}, gathered rows"] = inputs.gathered(head)
    variants, memory, errors = _checked(inputs, functions, skipped)
    variants["bare products"] = products(inputs)
    variants["bare products"]()
    yield race(
        f"{FAMILY} forward + backward, {shape}", variants, ours=OURS, targets={}, warm=True, device=shape.device,
        family=FAMILY, floors=["bare products"], work=vars(shape.work), floor_ms=rates.floor_ms(shape.work),
        memory=memory, errors=errors, skipped=skipped, headline=replace(shape, f=1.0) in QUICK.values(),
        curves={"shape": [shape.T, shape.D, shape.V, shape.f, float(shape.trainable)]},
        **{"rounds": 5, "seconds": 6.0, **limits})


def _checked(inputs: HeadInputs, functions: dict[str, Callable[[], torch.Tensor]],
             skipped: dict[str, str]) -> tuple[dict[str, Callable[[], Any]], dict[str, float], dict[str, float]]:
    """(variants with the right answer, their peak MiB, their errors); a peer with a wrong one goes to skipped."""
    exact, device = inputs.exact(), inputs.shape.device
    variants: dict[str, Callable[[], Any]] = {}
    memory, errors = {}, {}
    for name, function in functions.items():
        def run(function: Callable[[], torch.Tensor] = function) -> list[torch.Tensor]:
            return inputs.backward(function)

        try:
            run()  # compiles, and wakes allocators, before it is weighed
            memory[name], got = peak_memory(run, device)
        except Exception as error:  # a peer's own failure is a line of the table, ours is an error
            if name == OURS:
                raise
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
            continue
        errors[name] = error_against(exact, got)
        if errors[name] <= LIMITS[inputs.shape.dtype]:
            variants[name] = run
        elif name == OURS:
            raise AssertionError(f"{FAMILY}: {inputs.shape}: error {errors[name]:.2e} against fp64")
        else:
            skipped[name] = f"wrong answer: error {errors[name]:.2e} against fp64"
    return variants, {name: memory[name] for name in variants}, {name: errors[name] for name in variants}


def products(inputs: HeadInputs) -> Callable[[], None]:
    """The floor: 2 matrix products (frozen head) or 3 (trainable), into buffers that exist already."""
    h, w = inputs.hidden.detach()[inputs.rows], inputs.weight.detach()
    z, dh, dw = h.new_zeros(h.shape[0], w.shape[0]), torch.zeros_like(h), torch.zeros_like(w)

    def run() -> None:
        torch.mm(h, w.t(), out=z)
        torch.mm(z, w, out=dh)
        if inputs.shape.trainable:
            torch.mm(z.t(), h, out=dw)

    return run


def promised(shape: HeadShape, rates: Rates) -> Result:
    """The race of DESIGN section 8, its bars where f = 0.25: eager and PyTorch's own op, without the other peers."""
    inputs = HeadInputs(shape)
    heads = peers(shape.device)[0]
    functions = {OURS: inputs.ours(), FULL: inputs.all_rows(heads["eager"]), GATHERED: inputs.gathered(heads["eager"])}
    if "F.linear_cross_entropy" in heads:
        functions["F.linear_cross_entropy, gathered"] = inputs.gathered(heads["F.linear_cross_entropy"])
    variants, memory, errors = _checked(inputs, functions, {})
    variants["bare products"] = products(inputs)
    variants["bare products"]()
    return race(f"{FAMILY} forward + backward, {shape}", variants, ours=OURS, rounds=7, seconds=20, warm=True,
                targets=TARGETS[shape.trainable] if shape.f == 0.25 else {}, floors=["bare products"], family=FAMILY,
                work=vars(shape.work), floor_ms=rates.floor_ms(shape.work), memory=memory, errors=errors,
                headline=True)


def budget(shape: HeadShape, mebibytes: int, factor: float) -> Result:
    """Peak memory within a budget of logits, against full logits."""
    inputs = HeadInputs(shape)
    functions = {OURS: inputs.ours(logits_budget_mb=mebibytes), FULL: inputs.all_rows(peers(shape.device)[0]["eager"])}
    variants, _, _ = _checked(inputs, functions, {})
    head = "trainable" if shape.trainable else "frozen"
    size = f"{shape.T} x {shape.D} x {shape.V}"
    return weigh(f"{FAMILY} peak extra memory, {head} head, {size}, {mebibytes} MiB budget", variants, ours=OURS,
                 targets={FULL: f">= {factor}"}, family=FAMILY, headline=True)


def within_budget(shape: HeadShape, mebibytes: int, most: float) -> Result:
    """Time within a budget that cannot keep U: four products, against the three of a call that keeps all of it."""
    inputs = HeadInputs(shape)
    functions = {OURS: inputs.ours(logits_budget_mb=mebibytes), ALL_KEPT: inputs.ours(logits_budget_mb=2**20)}
    variants, memory, errors = _checked(inputs, functions, {})
    case = f"{FAMILY} forward + backward, {shape}, {mebibytes} MiB budget"
    return race(case, variants, ours=OURS, rounds=7, seconds=60, targets={ALL_KEPT: f"<= {most}"},
                floors=[ALL_KEPT], warm=True, family=FAMILY, memory=memory, errors=errors, headline=True)
