"""What is trained: each objective says what it needs, what one item is, its loss over a pack, and its metrics.

| objective    | items                     | model                            | loss over a pack                  |
| ------------ | ------------------------- | -------------------------------- | --------------------------------- |
| preference   | pairs of steps, or trees  | step log-probs, a value head     | `svpo_loss`                       |
| prm          | trees with labelled steps | a head at the step ends          | `prm_loss`, binary cross-entropy  |
| implicit_prm | trees with labelled steps | log-probs of the paths to a step | cross-entropy of beta * log-ratio |
| dvo          | trees with labelled steps | step log-probs                   | `dvo_loss` to gains in value      |
| policy       | trees of rollouts         | token log-probs                  | `step_policy_loss`                |

Every loss is a sum over its members divided by the optimizer step's totals, so that packs, micro-batches and processes
change neither loss nor gradient. The implicit reward's loss is one on (S,) scores that exist already: it is torch's own
`binary_cross_entropy_with_logits` here and no kernel of ours (implicit PRM: arXiv 2412.01981, eq. 3 and 5).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from svpo_kernels.step_loss import dvo_loss, svpo_loss
from svpo_kernels.step_policy import step_policy_loss

from . import policy, prm_metrics
from .config import SVPOConfig
from .metrics import Sums, add_pack, add_policy
from .solution_metrics import StepScores


class Preference:
    """`svpo_loss` over pairs of sibling steps, values of steps and SFT steps."""

    name = "preference"
    evaluates = None  # the steps that evaluation runs: those of training, or of another rule for values
    asked: dict[str, Any] = {}  # of the model's log-probs, beside sums per step

    def __init__(self, config: SVPOConfig) -> None:
        self.config, self.arguments = config, config.loss_arguments()

    @property
    def _implicit_rank(self) -> bool:
        return self.arguments.get("rank") == "implicit" and self.arguments.get("rank_weight", 1.0) > 0

    @property
    def wants_logps(self) -> bool:
        """Whether any term needs step log-probs."""
        loss = self.arguments
        return (loss.get("preference_weight", 1.0) > 0 or loss.get("sft_weight", 0.0) > 0 or self._implicit_rank)

    @property
    def wants_reference(self) -> bool:
        asked = self.arguments.get("preference_weight", 1.0) > 0 or self._implicit_rank
        return self.config.reference != "none" and asked

    def labels(self, batch: Any) -> Tensor | None:
        """What the head's own loss is taken against: None, for the value term is `svpo_loss`'s."""
        return None

    def loss(self, outputs: dict[str, Tensor | None], pack: dict[str, Any], references: Tensor | None,
             counts: tuple | None, sums: Sums) -> Any:
        """SVPOLoss of one pack over the counts of its step; its metrics are added to sums."""
        batch, logps = pack["batch"], outputs["step_logps"]
        scored, references = reduced(self.config, batch, logps, references)
        arguments = dict(self.arguments)
        if "smoothing" in pack:
            arguments["label_smoothing"] = pack["smoothing"]
        out = svpo_loss(
            scored, batch.pairs, references, reference_free=self.config.reference == "none",
            values=outputs["values"], value_targets=batch.value_targets, pair_weights=pack["weights"],
            sft_steps=batch.sft_steps, counts=counts, **arguments,
        )
        with torch.no_grad():
            add_pack(sums, pack, out, logps, outputs["values"])
        return out


def reduced(config: SVPOConfig, batch: Any, logps: Tensor | None,
            references: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Step log-probs and their references as the loss takes them: sums over tokens, or means by `logp_reduction`."""
    if config.logp_reduction == "sum" or logps is None:
        return logps, references
    lengths = batch.plan.counts.clamp_min(1)
    return logps / lengths, None if references is None else references / lengths


IMPLICIT_BETA = 0.05  # the source's


class Loss(NamedTuple):
    loss: Tensor


class ProcessReward:
    """Binary cross-entropy of a head at the labelled steps' ends; labels are (q_value + 1) / 2."""

    name = "prm"
    asked: dict[str, Any] = {}
    wants_logps = wants_reference = False
    evaluates = "all"  # in evaluation steps without a label are scored too: solutions are judged whole

    def __init__(self, config: SVPOConfig) -> None:
        self.config = config
        self.scores: StepScores | None = None  # where evaluation keeps those of every step

    def labels(self, batch: Any) -> Tensor:
        """(S,) in [0, 1], NaN where a step has none; hard ones above label_threshold, if that is set."""
        labels = (batch.value_targets + 1) / 2
        threshold = self.config.label_threshold
        if threshold is None:
            return labels
        return torch.where(labels.isnan(), labels, (labels > threshold).to(labels.dtype))

    def loss(self, outputs: dict[str, Tensor | None], pack: dict[str, Any], references: Tensor | None,
             counts: tuple | None, sums: Sums) -> Loss:
        labels = self.labels(pack["batch"])
        return self._over_step(outputs["step_losses"], labels, outputs["values"], pack, counts, sums)

    def _over_step(self, each: Tensor, labels: Tensor, scores: Tensor, pack: dict[str, Any], counts: tuple | None,
                   sums: Sums) -> Loss:
        """each (S,): the steps' own losses, 0 where unlabelled; over all labelled steps, or trials, of the step."""
        known = torch.nan_to_num(labels)
        if self.config.good_weight != 1.0:
            each = each * (1.0 + (self.config.good_weight - 1.0) * known)
        if "trials" in pack:
            each = each * pack["trials"]
        total = pack["counts"][1] if counts is None else counts[1]
        loss = each.sum() / max(total, 1)
        with torch.no_grad():
            sums.add(loss=loss)
            sums.add(**prm_metrics.step_sums(scores, labels))
            if self.scores is not None:
                self.scores.add(pack["batch"].node_of_step, scores)
        return Loss(loss)


class ImplicitReward(ProcessReward):
    """The score of a step is sigmoid(beta * (log-prob of the path to its end - the reference's)): no head at all."""

    name = "implicit_prm"
    wants_logps = wants_reference = True
    evaluates = None  # references are those of labelled steps

    def loss(self, outputs: dict[str, Tensor | None], pack: dict[str, Any], references: Tensor | None,
             counts: tuple | None, sums: Sums) -> Loss:
        labels = self.labels(pack["batch"])
        logps = outputs["step_logps"]
        beta = IMPLICIT_BETA if self.config.beta is None else self.config.beta
        z = beta * (logps if references is None else logps - references)
        each = F.binary_cross_entropy_with_logits(z, torch.nan_to_num(labels), reduction="none")
        return self._over_step(each.masked_fill(labels.isnan(), 0.0), labels, z.detach().sigmoid(), pack, counts, sums)


class ValueOptimization:
    """Direct value optimization: beta * log-ratio of a step, fitted to its gain in value (`dvo_loss`)."""

    name = "dvo"
    asked: dict[str, Any] = {}
    wants_logps = True
    evaluates = None

    def __init__(self, config: SVPOConfig) -> None:
        self.config, self.beta = config, config.loss_arguments()["beta"]

    @property
    def wants_reference(self) -> bool:
        return self.config.reference != "none"

    def labels(self, batch: Any) -> Tensor | None:
        return None

    def loss(self, outputs: dict[str, Tensor | None], pack: dict[str, Any], references: Tensor | None,
             counts: tuple | None, sums: Sums) -> Loss:
        batch, gains = pack["batch"], pack.get("gains", outputs["step_logps"].new_zeros(0))  # an empty pack has none
        logps, references = reduced(self.config, batch, outputs["step_logps"], references)
        members = int(pack["counts"][1])
        total = members if counts is None else counts[1]
        loss = dvo_loss(logps, references, gains, beta=self.beta, backend=self.config.backend)
        loss = loss * (members / max(total, 1))  # its mean is over the pack's members, the step's total counts
        with torch.no_grad():
            sums.add(loss=loss, labelled=members, **{"loss/value": loss, "value/mse": loss * max(total, 1)})
        return Loss(loss)


class StepPolicy:
    """`step_policy_loss` over steps with one advantage each, against the policy that sampled them."""

    name = "policy"
    wants_logps = True
    evaluates = None

    def __init__(self, config: SVPOConfig) -> None:
        self.config, self.arguments = config, policy.loss_arguments(config)
        self.wants_reference = config.kl_weight != 0
        self.asked = {"reduction": "none", "stats": ("entropy",) if config.entropy_weight else ()}

    def labels(self, batch: Any) -> Tensor | None:
        return None

    def loss(self, outputs: dict[str, Tensor | None], pack: dict[str, Any], references: Tensor | None,
             counts: tuple | None, sums: Sums) -> Any:
        """StepPolicyLoss of one pack over the totals of its step."""
        batch, logps = pack["batch"], outputs["step_logps"]
        totals = (pack["counts"] if counts is None else counts)[1:]
        old, advantages, weights = batch.get("old_logps"), pack.get("advantages"), pack.get("token_weights")
        if batch.plan.num_steps == 0:  # an empty pack has none of them
            old, advantages, weights = (logps.new_zeros(0, dtype=torch.float32) for _ in range(3))
            references = old if self.wants_reference else None
        if old is None:
            raise ValueError("SVPOTrainer: this batch has no old log-probs; call prepare_reference on its data")
        out = step_policy_loss(logps, old, advantages, batch.plan.step_ids, ref_logps=references,
                               entropy=outputs["entropy"], weights=weights, totals=totals,
                               backend=self.config.backend, **self.arguments)
        with torch.no_grad():
            add_policy(sums, out, advantages, batch.plan, self.config.ratio == "token", references is not None,
                       outputs["entropy"] is not None)
        return out


OBJECTIVES = {kind.name: kind for kind in (Preference, ProcessReward, ImplicitReward, ValueOptimization, StepPolicy)}


def make_objective(config: SVPOConfig) -> Any:
    return OBJECTIVES[config.objective](config)
