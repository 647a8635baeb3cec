"""svpo_kernels: fused ops, packed step trees and a trainer for step-level preference and process-reward training."""

from .dispatch import backends
from .plan import StepPlan
from .step_logps import step_logps
from .version import __version__

__all__ = ["StepPlan", "__version__", "backends", "step_logps"]
