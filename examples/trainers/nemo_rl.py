"""NeMo-RL's GRPO with a step-level loss: the object in the place of ClippedPGLossFn that its setup() returns."""

from svpo_kernels.integrations.nemo_rl import StepPolicyLossFn


def with_step_loss(parts: tuple, place: int) -> tuple:
    """What nemo_rl.algorithms.grpo.setup returned, its loss function at index `place`."""
    return *parts[:place], StepPolicyLossFn(ratio="step_mean", clip=(0.2, 0.28)), *parts[place + 1:]
