"""Step-level preference, value, ranking and SFT loss: reference -> cpu -> triton_ -> cuda -> presets -> this file."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
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
from .presets import PRESETS
from .reference import Inputs, Options, compute_dtype, svpo_loss_terms, weighted_sum

__all__ = ["PRESETS", "SVPOLoss", "dvo_loss", "svpo_loss"]

PREFERENCES = ("sigmoid", "ipo", "hinge")
RANKS = ("hinge", "logistic", "implicit")
COUNTS = ("pairs", "labelled steps", "SFT steps")


class SVPOLoss(NamedTuple):
    """loss and its four terms, each differentiable on its own; the rest are metrics, detached."""

    loss: Tensor
    """preference_weight * preference + value_weight * value + rank_weight * rank + sft_weight * sft."""
    preference: Tensor
    """The mean over pairs, before its weight, as the three that follow."""
    value: Tensor
    """The mean over labelled steps."""
    rank: Tensor
    """The mean over pairs."""
    sft: Tensor
    """The mean over SFT steps."""
    chosen_rewards: Tensor
    """(P,) beta (lp - ref) of the chosen steps; NaN without step_logps."""
    rejected_rewards: Tensor
    """(P,), of the rejected ones."""
    accuracy: Tensor
    """Share of pairs whose chosen reward is larger."""
    value_accuracy: Tensor
    """Share of pairs whose chosen value is larger; NaN without values."""


# -- raw ops ----------------------------------------------------------------------------------------------------------


def _fake_fwd(*args: Any) -> tuple[Tensor, ...]:
    inputs = Inputs(*args[: len(Inputs._fields)])
    like, dtype = inputs.pairs, compute_dtype(inputs)
    S = (inputs.step_logps if inputs.step_logps is not None else inputs.values).shape[0]
    P = like.shape[0]
    return tuple(like.new_empty(size, dtype=dtype) for size in (*[()] * 7, (P,), (P,), (4, S)))


def _fake_bwd(slopes: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(slopes.new_empty(slopes.shape[1] if need else 0) for need in args[-3:])


dispatch.define(
    __name__,
    "svpo_loss_fwd(Tensor? step_logps, Tensor? ref_step_logps, Tensor? values, Tensor? value_targets, Tensor pairs, "
    "Tensor? sft_steps, Tensor? pair_weights, Tensor? label_smoothings, Tensor? margins, Tensor? rank_margins, "
    "Tensor? counts, float beta, str preference, float preference_weight, float label_smoothing, float margin, "
    "float value_weight, str rank, float rank_margin, float rank_scale, float rank_weight, float sft_weight, "
    "float pair_count, float value_count, float sft_count, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_fwd,
)
dispatch.define(
    __name__,
    "svpo_loss_bwd(Tensor slopes, Tensor? grad_loss, Tensor? grad_preference, Tensor? grad_value, Tensor? grad_rank, "
    "Tensor? grad_sft, float preference_weight, float value_weight, float rank_weight, float sft_weight, "
    "bool need_logps, bool need_ref, bool need_values, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_bwd,
)


# -- autograd ---------------------------------------------------------------------------------------------------------


class _SvpoLoss(torch.autograd.Function):
    """Joins terms that `svpo_loss_fwd` has computed to the graph of step_logps, ref_step_logps and values.

    kept: slopes and the op's inputs. The op runs outside, so that its metrics and its other arguments need not pass
    through here: at P = 64 that is a tenth of the time.
    """

    @staticmethod
    def forward(ctx: Any, step_logps: Tensor | None, ref_step_logps: Tensor | None, values: Tensor | None,
                terms: tuple[Tensor, ...], kept: tuple[Tensor | None, ...], options: Options,
                backend: str) -> tuple[Tensor, ...]:
        # A reference computed under torch.inference_mode is the rule, and autograd does not save such tensors.
        ctx.save_for_backward(*[x.clone() if x is not None and x.is_inference() else x for x in kept])
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return terms

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, grads, ctx.needs_input_grad[:3]), None, None, None, None


class _TracedSvpoLoss(torch.autograd.Function):
    """The same with the op inside, as torch.compile wants it."""

    @staticmethod
    def forward(ctx: Any, options: Options, backend: str, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        *terms, accuracy, value_accuracy, chosen, rejected, slopes = torch.ops.svpo.svpo_loss_fwd(
            *inputs, *options, backend)
        ctx.save_for_backward(slopes, *inputs)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(chosen, rejected, accuracy, value_accuracy)
        return *terms, chosen, rejected, accuracy, value_accuracy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *_backward(ctx, grads[:5], ctx.needs_input_grad[2:5]), *(None,) * 8


def _backward(ctx: Any, upstream: tuple[Tensor | None, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of step_logps, ref_step_logps and values from the upstream of the loss and of each term."""
    slopes, *tensors = ctx.saved_tensors
    options = ctx.options
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _differentiable_backward(Inputs(*tensors), options, upstream, needs)
    args = (slopes, *upstream, options.preference_weight, options.value_weight, options.rank_weight,
            options.sft_weight, *needs)
    found = dispatch.call("svpo_loss_bwd", ctx.backend, slopes, args)
    return tuple([
        None if not need else grad if grad.dtype is x.dtype else grad.to(x.dtype)
        for grad, x, need in zip(found, tensors[:3], needs, strict=True)
    ])


def _differentiable_backward(inputs: Inputs, options: Options, upstream: tuple[Tensor | None, ...],
                             needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The gradients as a graph of their own (create_graph=True): the formula again, differentiated by autograd."""
    terms = svpo_loss_terms(inputs, options)
    outputs = (weighted_sum(terms, options), *terms)
    pairs = [(out, grad) for out, grad in zip(outputs, upstream, strict=True) if grad is not None and out.requires_grad]
    wanted = [x for x, need in zip(inputs[:3], needs, strict=True) if need]
    if not pairs:
        return tuple(torch.zeros_like(x) if need else None for x, need in zip(inputs[:3], needs, strict=True))
    found = iter(torch.autograd.grad([out for out, _ in pairs], wanted, [grad for _, grad in pairs],
                                     create_graph=True, materialize_grads=True))
    return tuple(next(found) if need else None for need in needs)


# -- public functions -------------------------------------------------------------------------------------------------


def svpo_loss(
    step_logps: Tensor | None,
    pairs: Tensor,
    ref_step_logps: Tensor | None = None,
    *,
    reference_free: bool = False,
    values: Tensor | None = None,
    value_targets: Tensor | None = None,
    beta: float = 0.1,
    preference: str = "sigmoid",
    preference_weight: float = 1.0,
    label_smoothing: float | Tensor = 0.0,
    margin: float | Tensor = 0.0,
    pair_weights: Tensor | None = None,
    value_weight: float = 1.0,
    rank: str = "hinge",
    rank_margin: float | Tensor = 0.0,
    rank_scale: float = 1.0,
    rank_weight: float = 1.0,
    sft_steps: Tensor | None = None,
    sft_weight: float = 0.0,
    counts: tuple[float, float, float] | Tensor | None = None,
    backend: str = "auto",
) -> SVPOLoss:
    """Step-level preference, value, ranking and SFT loss over sibling steps, with metrics, in one pass.

    Equivalent to, with preference="sigmoid" and rank="hinge":

        w, l = pairs.unbind(1)
        reward = beta * (step_logps - ref_step_logps)                    # 0 for the reference when reference_free
        x = reward[w] - reward[l] - margin
        preference = (-(1 - e) * logsigmoid(x) - e * logsigmoid(-x)).mul(pair_weights).sum() / P
        value = (values - value_targets)[~value_targets.isnan()].square().mean()
        rank = relu(rank_margin - (values[w] - values[l])).mul(pair_weights).sum() / P
        sft = -step_logps[sft_steps].mean()
        loss = preference_weight * preference + value_weight * value + rank_weight * rank + sft_weight * sft

    Args:
        step_logps: (S,) log-probs of the steps; None only when preference_weight = sft_weight = 0.
        pairs: (P, 2) integers, (chosen w, rejected l), indices into S.
        ref_step_logps: (S,) log-probs under the reference model. Unused without step_logps. A forgotten one would give
            a finite loss and wrong training, so None is refused where a term reads it, unless reference_free.
        reference_free: the reference is 0 (uniform up to a constant, as ORPO and SimPO have it); then none is given.
        values: (S,) value of each step; None: no value and no rank term.
        value_targets: (S,), NaN = unlabelled. None: no value term. Unused without values.
        beta: scale of the rewards, > 0. D = (lp - ref)[w] - (lp - ref)[l], x = beta D - margin.
        preference: "sigmoid": -(1 - e) logsigmoid(x) - e logsigmoid(-x) · "ipo": (D - 1 / (2 beta))^2, without margin ·
            "hinge": max(0, 1 - x).
        label_smoothing: e in [0, 1], a float or (P,); only with "sigmoid".
        margin: a float or (P,); not with "ipo".
        pair_weights: (P,), multiply the preference and the rank term of a pair; the count stays the number of pairs.
        rank: "hinge": max(0, rank_margin - (v_w - v_l)) · "logistic": -logsigmoid(v_w - v_l) · "implicit":
            ((v_w - v_l) - rank_scale * stopgrad(beta D))^2. rank_margin: a float or (P,).
        sft_steps: (K,) integers, steps whose likelihood the SFT term -lp raises.
        counts: the denominators (pairs, labelled steps, SFT steps), numbers or a (3,) tensor; None: this call's own.
            With the totals of an optimizer step, neither loss nor gradient depends on how it was cut into calls. Under
            torch.compile floats that change make a graph each; ints and a tensor do not.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        SVPOLoss. loss, preference, value, rank, sft (), before their weights except loss, fp32 (fp64 when an input is);
        a term without members is 0 with zero gradient, a term of weight 0 is reported and left out of the loss. chosen
        and rejected rewards (P,), accuracy and value_accuracy (): detached; ties are wrong, NaN for P = 0.

    Differentiable, twice in eager mode, in step_logps, ref_step_logps and values; exact for an upstream on the loss and
    on each term. Hinges pass the gradient at their kink. Run-to-run bitwise equal.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: a shape, device or option that does not fit, a count of 0 for a term with members, another tensor
            that requires grad, no reference for a term that reads it (or one beside reference_free).
        IndexError: a step out of [0, S) (on a device: NaN).

    Source: DPO (arXiv 2305.18290, eq. 7) on steps (Step-DPO, arXiv 2406.18629) with an explicit value head (SVPO, arXiv
    2406.10858); label smoothing is cDPO's, "ipo" arXiv 2310.12036, "hinge" SLiC (arXiv 2305.10425) on DPO's rewards.
    """
    op = "svpo_loss"
    require_choice(op, "preference", preference, PREFERENCES)
    require_choice(op, "rank", rank, RANKS)
    require_positive(op, "beta", beta)
    for name, number in (("preference_weight", preference_weight), ("value_weight", value_weight),
                         ("rank_scale", rank_scale), ("rank_weight", rank_weight), ("sft_weight", sft_weight)):
        require_number(op, name, number)
    like = _check_steps(op, step_logps, values, rank, preference_weight, rank_weight, sft_weight)
    S, double = like.shape[0], like.dtype == torch.float64
    pairs = _check_index(op, "pairs", pairs, like, 2)
    reads_reference = preference_weight or (rank == "implicit" and rank_weight and values is not None)
    if step_logps is None:
        ref_step_logps = sft_steps = None
    elif reference_free and ref_step_logps is not None:
        fail(op, "ref_step_logps", "None with reference_free=True", ref_step_logps)
    elif reads_reference and not reference_free and ref_step_logps is None and pairs.shape[0] > 0:
        fail(op, "ref_step_logps", "the (S,) log-probs of the reference model, or reference_free=True for none", None)
    if ref_step_logps is not None:
        require_vector(op, "ref_step_logps", ref_step_logps, like, S, "(S,)")
        double = double or ref_step_logps.dtype == torch.float64
    if sft_steps is not None:
        sft_steps = _check_index(op, "sft_steps", sft_steps, like, 1)
    if values is None:
        value_targets = None
    elif values is not like:
        require_vector(op, "values", values, like, S, "(S,)")
        double = double or values.dtype == torch.float64
    if value_targets is not None:
        require_vector(op, "value_targets", value_targets, like, S, "(S,)")
        require_no_grad(op, value_targets=value_targets)
    if pair_weights is not None:
        _check_pair_tensor(op, "pair_weights", pair_weights, like, pairs)
    smoothings, smoothing = _per_pair(op, "label_smoothing", label_smoothing, like, pairs)
    margins, margin_of_all = _per_pair(op, "margin", margin, like, pairs)
    rank_margins, rank_margin_of_all = _per_pair(op, "rank_margin", rank_margin, like, pairs)
    if not 0.0 <= smoothing <= 1.0:
        fail(op, "label_smoothing", "in [0, 1]", label_smoothing)
    if preference != "sigmoid":
        if smoothing or smoothings is not None:
            fail(op, "label_smoothing", f"0 with preference={preference!r} (only 'sigmoid' has it)", label_smoothing)
        if preference == "ipo" and (margin_of_all or margins is not None):
            fail(op, "margin", "0 with preference='ipo', which has none", margin)
    counts, numbers = denominators(op, "counts", counts, like, COUNTS)
    if double and like.dtype != torch.float64:  # The dtype of the first tensor decides which backends can run.
        step_logps, values = (x if x is None else x.double() for x in (step_logps, values))
        like = values if step_logps is None else step_logps
    options = Options(beta, preference, preference_weight, smoothing, margin_of_all, value_weight, rank,
                      rank_margin_of_all, rank_scale, rank_weight, sft_weight, *numbers)
    inputs = (step_logps, ref_step_logps, values, value_targets, pairs, sft_steps, pair_weights, smoothings, margins,
              rank_margins, counts)
    if torch.compiler.is_compiling():
        return SVPOLoss(*_TracedSvpoLoss.apply(options, backend, *inputs))
    *terms, accuracy, value_accuracy, chosen, rejected, slopes = dispatch.call(
        "svpo_loss_fwd", backend, like, (*inputs, *options))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:3]):
        terms = _SvpoLoss.apply(step_logps, ref_step_logps, values, tuple(terms), (slopes, *inputs), options, backend)
    return SVPOLoss._make((*terms, chosen, rejected, accuracy, value_accuracy))


def dvo_loss(step_logps: Tensor, ref_step_logps: Tensor | None, value_gains: Tensor, *, beta: float,
             backend: str = "auto") -> Tensor:
    """Direct value optimization: the mean of (beta (lp - ref) - gain)^2 over the labelled steps.

    step_logps, ref_step_logps (S,) (None: 0), value_gains (S,) with NaN = unlabelled. Returns () fp32 (fp64 for fp64);
    0 with zero gradient when nothing is labelled. Differentiable, twice in eager mode, in both log-probs. Raises like
    `svpo_loss`.

    Source: Zhang et al., Direct Value Optimization, arXiv 2502.13723: the implicit value beta log(pi / ref) of a step
    is fitted to the gain in value by squared error.
    """
    op = "dvo_loss"
    require_positive(op, "beta", beta)
    require_vector(op, "step_logps", step_logps, step_logps, None, "(S,)")
    dispatch.check_backend(op, backend, step_logps)
    S = step_logps.shape[0]
    if ref_step_logps is not None:
        require_vector(op, "ref_step_logps", ref_step_logps, step_logps, S, "(S,)")
    require_vector(op, "value_gains", value_gains, step_logps, S, "(S,)")
    require_no_grad(op, value_gains=value_gains)
    # In fp32 like every op here: bf16 log-probs of a long step have a step of 0.5.
    dtype = torch.promote_types(step_logps.dtype, torch.float32)
    ratio = step_logps.to(dtype) if ref_step_logps is None else step_logps.to(dtype) - ref_step_logps
    no_pairs = torch.empty((0, 2), dtype=torch.int64, device=step_logps.device)
    return svpo_loss(None, no_pairs, values=beta * ratio, value_targets=value_gains, preference_weight=0.0,
                     backend=backend).value


# -- checks -----------------------------------------------------------------------------------------------------------


def _check_steps(op: str, step_logps: Tensor | None, values: Tensor | None, rank: str, preference_weight: float,
                 rank_weight: float, sft_weight: float) -> Tensor:
    """step_logps or values: the tensor that the others are compared with."""
    if step_logps is not None:
        require_vector(op, "step_logps", step_logps, step_logps, None, "(S,)")
        return step_logps
    if preference_weight or sft_weight:
        fail(op, "step_logps", "given unless preference_weight = sft_weight = 0", step_logps)
    if values is None:
        fail(op, "step_logps", "given when values is None", step_logps)
    if rank == "implicit" and rank_weight:
        fail(op, "step_logps", "given with rank='implicit', which fits the implicit reward", step_logps)
    require_vector(op, "values", values, values, None, "(S,)")
    return values


def _check_index(op: str, name: str, x: Any, like: Tensor, dim: int) -> Tensor:
    """x as int64 or int32."""
    require_integer(op, name, x)
    if x.dim() != dim or (dim == 2 and x.shape[1] != 2) or x.device != like.device:
        fail(op, name, f"{'(P, 2)' if dim == 2 else '(K,)'} on {like.device}", x)
    if like.shape[0] == 0 and x.shape[0] > 0:  # compared: torch.compile of 2.6 fixes a size that it sees as a bool
        fail(op, name, "empty when there are no steps (S = 0)", x, IndexError)
    return x if x.dtype in (torch.int64, torch.int32) else x.long()


def _check_pair_tensor(op: str, name: str, x: Any, like: Tensor, pairs: Tensor) -> None:
    require_vector(op, name, x, like, pairs.shape[0], "(P,)")
    require_no_grad(op, **{name: x})


def _per_pair(op: str, name: str, x: Any, like: Tensor, pairs: Tensor) -> tuple[Tensor | None, Any]:
    """A number for all pairs, or one per pair."""
    if isinstance(x, NUMBERS):
        return None, x
    if not isinstance(x, Tensor):
        fail(op, name, "a number or a (P,) tensor", describe(x), TypeError)
    _check_pair_tensor(op, name, x, like, pairs)
    return x, 0.0
