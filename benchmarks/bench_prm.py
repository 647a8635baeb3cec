"""PRM scores from two rows of the lm_head at the step ends, against full logits and against gathered rows."""

from __future__ import annotations

import torch

import svpo_kernels as sk

from .race import check_same, race

T, D, V, S = 512, 1024, 128256, 32
GOOD, BAD = 10, 12


@torch.no_grad()
def test_scores_from_lm_head(record) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(T, D), torch.randn(V, D) / D**0.5
    positions = torch.sort(torch.randperm(T)[:S]).values

    def full_logits():
        return (hidden @ weight.t())[positions][:, [GOOD, BAD]].softmax(-1)[:, 0]

    def gathered():
        return (hidden[positions] @ weight[[GOOD, BAD]].t()).softmax(-1)[:, 0]

    def ours():
        return sk.prm_scores_from_lm_head(hidden, positions, weight, GOOD, BAD)

    for function in (ours, gathered):
        check_same([full_logits()], [function()], rtol=1e-4, atol=1e-6)

    def repeat(function):
        def run():
            for _ in range(200):
                function()

        return run

    case = f"prm_scores_from_lm_head, {S} steps of {T} tokens, head ({V}, {D}), float32"
    once = {"ours": ours, "eager, full logits": full_logits}
    record(race(case, once, ours="ours", targets={"eager, full logits": ">= 100"}), ours)
    often = {"ours": repeat(ours), "eager, gathered rows and two columns": repeat(gathered)}
    record.again(
        race(f"{case}, 200 times", often, ours="ours", targets={"eager, gathered rows and two columns": ">= 1.3"})
    )
