"""svpo_kernels: fused ops, packed step trees and a trainer for step-level preference and process-reward training."""

from .dispatch import backends
from .linear_step_logps import linear_step_logps
from .plan import StepPlan
from .prm import aggregate_scores, prm_loss, prm_scores, prm_scores_from_lm_head
from .step_loss import PRESETS, SVPOLoss, dvo_loss, svpo_loss
from .step_logps import step_logps
from .version import __version__

__all__ = [
    "PRESETS",
    "SVPOLoss",
    "StepPlan",
    "__version__",
    "aggregate_scores",
    "backends",
    "dvo_loss",
    "linear_step_logps",
    "prm_loss",
    "prm_scores",
    "prm_scores_from_lm_head",
    "step_logps",
    "svpo_loss",
]
