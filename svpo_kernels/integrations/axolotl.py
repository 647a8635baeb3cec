"""Axolotl: plugins: [svpo_kernels.integrations.axolotl.SVPOPlugin]"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin


class SVPOPlugin(BasePlugin):
    """The losses of Axolotl's trainers without logits.

    Without `rl:` the model returns its loss from `use_fused_loss`; with `rl: dpo | kto | grpo ...` the trainer is TRL's
    and takes `use_fused_head`, which names the TRL versions that it knows (Axolotl pins its own).
    """

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """After adapters are on the model, before any wrapper."""
        if not cfg.rl:
            from .causal_lm import use_fused_loss

            use_fused_loss(model)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if cfg.rl:
            from .trl import use_fused_head

            use_fused_head(trainer)
