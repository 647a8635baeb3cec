"""svpo_kernels: fused ops, packed step trees and a trainer for step-level preference and process-reward training."""

from .dispatch import backends
from .linear_step_logps import linear_step_logps
from .plan import StepPlan
from .step_logps import step_logps
from .version import __version__

__all__ = ["StepPlan", "__version__", "backends", "linear_step_logps", "step_logps"]
