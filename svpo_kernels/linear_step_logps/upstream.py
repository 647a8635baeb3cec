"""Upstream gradients of `linear_step_logps`: what stands before U, and what stands beside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..plan import PlanTensors
from . import modes
from .branching import branch_terms, likely_terms
from .row_kernels import RowKernels, Stats


class Upstream(NamedTuple):
    """How the rows that the backward multiplies with become gradients: dz0 = factor U + terms.

    In logits mode the upstreams are in the rows already: no factor, no terms. g (N,), G and E (R,): of the log-probs
    and of the entropies; G without what logsumexp takes from the columns.
    """

    g: Tensor
    G: Tensor
    E: Tensor | None
    terms: Tensor | None

    @classmethod
    def of(
        cls,
        kernels: RowKernels,
        grad_out: Tensor,
        grad_entropy: Tensor,
        grad_logsumexp: Tensor,
        stats: Stats,
        plan: PlanTensors,
        o: modes.Options,
    ) -> Upstream:
        g, G = kernels.row_grads(grad_out, plan, o.reduction)
        L = kernels.row_grads(grad_logsumexp, plan, "none")[1] if o.logsumexp else None
        given = (stats.label_z0, stats.logp)
        if o.mode == "logits":
            E = kernels.row_grads(grad_entropy, plan, "none")[1] if o.entropy else torch.zeros_like(G)
            return cls(g, G if L is None else G - L, E, None)
        terms = branch_terms(*given, g, plan, o.vocab_size, *o.transform)
        if L is not None:  # J softmax(z) = J[l*] onehot(l*) - U
            G, terms = G - L, terms + likely_terms(L, *given, plan, o.vocab_size, *o.transform)
        return cls(g, G, None, terms)

    def scaled(self, rows: Tensor) -> Tensor:
        """(R, X) rows with the factor in front of U."""
        return rows if self.E is not None else (rows * self.G[:, None]).to(rows.dtype)

    def apply(self, kernels: RowKernels, uw: Tensor, weight: Tensor, plan: PlanTensors) -> Tensor:
        """Rows of dz0 W from those of U W."""
        if self.terms is None:
            return uw
        return kernels.branch_hidden(uw, weight.to(uw.dtype), self.terms, self.G, plan, 0)
