"""Step-level policy gradients: reference -> cpu -> triton_ -> cuda -> advantages, weights, presets -> this file."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from .._autograd import once_differentiable
from .._checks import (
    NUMBERS,
    denominators,
    describe,
    fail,
    require_choice,
    require_integer,
    require_no_grad,
    require_number,
    require_positive,
    require_vector,
)
from .advantages import step_advantages
from .presets import POLICY_PRESETS
from .reference import KINDS, KLS, RATIOS, Inputs, Options, compute_dtype, output_sizes
from .weights import policy_weights

__all__ = ["POLICY_PRESETS", "StepPolicyLoss", "policy_weights", "step_advantages", "step_policy_loss"]


class StepPolicyLoss(NamedTuple):
    """loss and its three terms, each differentiable on its own; the rest are metrics over members, detached."""

    loss: Tensor
    """policy + kl_weight * kl - entropy_weight * entropy."""
    policy: Tensor
    """The weighted mean of the members' losses."""
    kl: Tensor
    """0 without ref_logps."""
    entropy: Tensor
    """0 without entropy."""
    clip_fraction: Tensor
    """Share of members that a bound, the dual clip or the limit of 20 changed."""
    ratio_mean: Tensor
    """Mean of pi / old over the members."""
    ratio_max: Tensor
    """The largest of them."""
    approx_kl: Tensor
    """Mean of old - new over the members' tokens."""


# -- raw ops ----------------------------------------------------------------------------------------------------------


def _fake_fwd(*args: Any) -> tuple[Tensor, ...]:
    inputs = Inputs(*args[: len(Inputs._fields)])
    return tuple(inputs.logps.new_empty(size, dtype=compute_dtype(inputs)) for size in output_sizes(inputs))


def _fake_bwd(slopes: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(slopes.new_empty(slopes.shape[1] if need else 0) for need in args[-2:])


dispatch.define(
    __name__,
    "step_policy_loss_fwd(Tensor logps, Tensor old_logps, Tensor advantages, Tensor? step_ids, Tensor? is_weights, "
    "Tensor? ref_logps, Tensor? entropy, Tensor? weights, Tensor? totals, str ratio, str kind, float clip_low, "
    "float clip_high, float dual_clip, float tau_positive, float tau_negative, str kl, float kl_weight, "
    "float entropy_weight, float total_members, float total_tokens, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_fwd,
)
dispatch.define(
    __name__,
    "step_policy_loss_bwd(Tensor slopes, Tensor denominators, Tensor? grad_loss, Tensor? grad_policy, "
    "Tensor? grad_kl, Tensor? grad_entropy, float kl_weight, float entropy_weight, bool has_kl, bool has_entropy, "
    "bool need_logps, bool need_entropy, str backend) -> (Tensor, Tensor)",
    _fake_bwd,
)


# -- autograd ---------------------------------------------------------------------------------------------------------


class _StepPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Options, backend: str, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        given = Inputs(*inputs)
        *outputs, slopes, denominators = dispatch.call("step_policy_loss_fwd", backend, inputs[0], (*inputs, *options))
        needs = [ctx.needs_input_grad[2 + Inputs._fields.index(name)] for name in ("logps", "entropy")]
        own = (given.logps, given.entropy)
        # The inputs too, so that a second derivative finds them and raises.
        ctx.save_for_backward(slopes, denominators, *(x for x, need in zip(own, needs, strict=True) if need))
        ctx.given = (options.kl_weight, options.entropy_weight, given.ref_logps is not None, given.entropy is not None)
        ctx.needs, ctx.dtypes, ctx.backend = needs, [None if x is None else x.dtype for x in own], backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[4:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        slopes, denominators = ctx.saved_tensors[:2]
        found = dispatch.call("step_policy_loss_bwd", ctx.backend, slopes,
                              (slopes, denominators, *grads[:4], *ctx.given, *ctx.needs))
        logps, entropy = (grad.to(dtype) if need else None
                          for grad, dtype, need in zip(found, ctx.dtypes, ctx.needs, strict=True))
        return None, None, *Inputs(logps, None, None, entropy=entropy)


# -- public functions -------------------------------------------------------------------------------------------------


def step_policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    step_ids: Tensor | None = None,
    *,
    ratio: str = "token",
    kind: str = "ppo",
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    tau: tuple[float, float] = (1.0, 1.05),
    is_weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    kl: str = "k3",
    kl_weight: float = 0.0,
    entropy: Tensor | None = None,
    entropy_weight: float = 0.0,
    weights: Tensor | None = None,
    totals: tuple[float, float] | Tensor | None = None,
    backend: str = "auto",
) -> StepPolicyLoss:
    """Clipped policy-gradient loss with one advantage a step, KL penalty and entropy bonus, in one pass.

    Equivalent to, with ratio="token", kind="ppo" and no NaN in the advantages:

        A = advantages[step_ids]
        rho = (logps - old_logps).clamp(-20, 20).exp()
        policy = (torch.max(-rho * A, -rho.clamp(1 - lo, 1 + hi) * A) * is_weights * weights).sum() / totals[0]
        d = (ref_logps - logps).clamp(-20, 20)
        kl = ((d.exp() - d - 1) * weights).sum() / totals[1]
        loss = policy + kl_weight * kl - entropy_weight * (entropy * weights).sum() / totals[1]

    Args:
        logps: (N,) log-probs of the scored tokens under the policy, `reduction="none"` of the row ops.
        old_logps: (N,) under the policy that sampled them.
        advantages: (S,), one a step; NaN: the step's members do not count.
        step_ids: (N,) integers, the step of each token, in any order; below 0: the token counts nowhere. None: every
            token is a step (N = S).
        ratio: "token": members are tokens, u = logps · "step": members are steps, u the sum of a step's logps ·
            "step_mean": its mean, rho the geometric mean of the token ratios. r = clamp(u - old u, -20, 20) without
            gradient outside, rho = exp(r).
        kind: "ppo": max(-rho A, -clip(rho, 1 - lo, 1 + hi) A) · "cispo": -stopgrad(clip(rho, 1 - lo, 1 + hi)) A u ·
            "sapo": -A sigmoid(t (rho - 1)) 4 / t with t = tau[0] for A > 0, else tau[1].
        clip: (lo, hi), each >= 0; read by "ppo" and "cispo".
        dual_clip: c > 1, only with "ppo": for A < 0 the loss is at most -c A. None: no such bound.
        tau: two numbers > 0; read by "sapo".
        is_weights: one a member, (N,) or (S,): multiplies its loss (not its KL, not the denominators), as corrections
            for a sampler that is not the old policy do.
        ref_logps: (N,) under the reference policy. Required with a kl_weight; without one the KL is reported.
        kl: "k1": -d · "k2": d^2 / 2 · "k3": exp(d) - d - 1, of each token, d = clamp(ref_logps - logps, -20, 20).
        entropy: (N,) of the policy at each token (`stats=("entropy",)` of linear_step_logps); required with an
            entropy_weight.
        weights: (N,), the weight of each token in every sum; a step takes its first token's. None: 1.
        totals: the denominators (members, tokens), numbers or a (2,) tensor; None: this call's own members, and its
            tokens with a step. With those of the whole optimizer step, neither loss nor gradient depends on how it was
            cut into calls. `policy_weights` makes weights and totals of the usual averages.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        StepPolicyLoss. loss, policy, kl, entropy (): fp32 (fp64 when an input is), 0 with zero gradient without
        members. clip_fraction, ratio_mean, ratio_max, approx_kl (): detached, over this call's members, unweighted;
        NaN without members.

    Differentiable once in logps and entropy, exact for an upstream on the loss and on each term. Run-to-run bitwise
    equal.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: a shape, device or option that does not fit, kl_weight without ref_logps, entropy_weight without
            entropy, an advantage for a step without tokens, a total of 0 beside members, another tensor that requires
            grad.
        IndexError: a step id at or above S (on a device: NaN).

    Source: PPO (arXiv 1707.06347), dual clip (arXiv 1912.09729), GSPO (arXiv 2507.18071), CISPO (MiniMax-M1, arXiv
    2506.13585), SAPO (arXiv 2511.20347); k1, k2, k3: Schulman, Approximating KL Divergence (2020).
    """
    op = "step_policy_loss"
    for name, value, choices in (("ratio", ratio, RATIOS), ("kind", kind, KINDS), ("kl", kl, KLS)):
        require_choice(op, name, value, choices)
    require_number(op, "kl_weight", kl_weight)
    require_number(op, "entropy_weight", entropy_weight)
    low, high = _two_numbers(op, "clip", clip, ">= 0", lambda x: x >= 0)
    taus = _two_numbers(op, "tau", tau, "> 0", lambda x: x > 0)
    if dual_clip is not None:
        require_positive(op, "dual_clip", dual_clip)
        if not dual_clip > 1:
            fail(op, "dual_clip", "> 1", dual_clip)
        if kind != "ppo":
            fail(op, "dual_clip", f"None with kind={kind!r} (only 'ppo' has it)", dual_clip)
    require_vector(op, "logps", logps, logps, None, "(N,)")
    N = logps.shape[0]
    step_ids = _check_steps(op, step_ids, advantages, logps)
    members = ("(N,)", N) if ratio == "token" else ("(S,)", advantages.shape[0])
    for name, x, (letters, size) in (
        ("old_logps", old_logps, ("(N,)", N)), ("is_weights", is_weights, members),
        ("ref_logps", ref_logps, ("(N,)", N)), ("entropy", entropy, ("(N,)", N)), ("weights", weights, ("(N,)", N)),
    ):
        if x is not None or name == "old_logps":
            require_vector(op, name, x, logps, size, letters)
    require_no_grad(op, old_logps=old_logps, advantages=advantages, is_weights=is_weights, ref_logps=ref_logps,
                    weights=weights)
    if kl_weight and ref_logps is None:
        fail(op, "ref_logps", f"the (N,) log-probs of the reference policy with kl_weight={kl_weight:g}", None)
    if entropy_weight and entropy is None:
        fail(op, "entropy", f"the (N,) entropies of the policy with entropy_weight={entropy_weight:g}", None)
    totals, numbers = denominators(op, "totals", totals, logps, ("members", "tokens"))
    inputs = Inputs(logps, old_logps, advantages, step_ids, is_weights, ref_logps, entropy, weights, totals)
    if logps.dtype != torch.float64 and compute_dtype(inputs) == torch.float64:
        inputs = inputs._replace(logps=logps.double())  # the dtype of the first tensor decides which backends can run
    options = Options(ratio, kind, float(low), float(high), torch.inf if dual_clip is None else float(dual_clip),
                      float(taus[0]), float(taus[1]), kl, float(kl_weight), float(entropy_weight), *numbers)
    return StepPolicyLoss(*_StepPolicyLoss.apply(options, backend, *inputs))


# -- checks -----------------------------------------------------------------------------------------------------------


def _check_steps(op: str, step_ids: Any, advantages: Any, logps: Tensor) -> Tensor | None:
    """step_ids as int64 or int32, and advantages that go with them."""
    N = logps.shape[0]
    if step_ids is None:
        require_vector(op, "advantages", advantages, logps, N, "one a token without step_ids, (N,)")
        return None
    require_vector(op, "advantages", advantages, logps, None, "(S,)")
    require_integer(op, "step_ids", step_ids)
    if step_ids.dim() != 1 or step_ids.shape[0] != N or step_ids.device != logps.device:
        fail(op, "step_ids", f"(N,) = ({N},) on {logps.device}", step_ids)
    return step_ids if step_ids.dtype in (torch.int64, torch.int32) else step_ids.long()


def _two_numbers(op: str, name: str, pair: object, rule: str, holds: Any) -> tuple[float, float]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(x, NUMBERS) for x in pair):
        fail(op, name, "two numbers", describe(pair), TypeError)
    if not all(holds(x) for x in pair):
        fail(op, name, f"two numbers {rule}", describe(pair))
    return tuple(pair)
