"""One process of a TRL run with our head: trl_worker.py OUT PROCESSES JSON ..., a run each, into OUT0.pt, OUT1.pt ...

JSON: kind, ours (the switch on), fsdp, lora, and settings of TRL's configuration.
"""

from __future__ import annotations

import json
import sys

import torch
import trl_cases as cases
from fsdp_on_gloo import shard_on_gloo
from peft import LoraConfig
from training_ import Gradients

from svpo_kernels.integrations.trl import use_fused_head, with_lora_on_head
from svpo_kernels.trainer.run import leave_group


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


class WholeGradients(Gradients):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters()
                           if p.grad is not None})


def run(out, processes, kind, ours=True, fsdp=False, lora=False, **settings):
    if fsdp and processes > 1:
        shard_on_gloo()
        settings |= dict(fsdp=True, fsdp_config=dict(
            version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", transformer_layer_cls_to_wrap=["LlamaDecoderLayer"],
            reshard_after_forward=True))
    make = cases.KINDS[kind][0]
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = cases.trainer(kind, out + "-run", make=(
        lambda lm, **rest: with_lora_on_head(make, lm, peft_config=config, **rest)) if lora else make,
        reference=not lora, batch=4 // processes, max_steps=2, logging_steps=1, save_strategy="no", optim="sgd",
        learning_rate=1e-3, max_grad_norm=0.0, gradient_checkpointing=False, **settings)
    if ours and not lora:
        use_fused_head(trainer)
    gradients = WholeGradients()
    trainer.add_callback(gradients)
    trainer.train()
    local = [tuple((p.to_local() if hasattr(p, "to_local") else p).shape) for p in trainer.model.parameters()]
    weights = {name: whole(p) for name, p in trainer.model.named_parameters() if p.requires_grad}
    if trainer.args.process_index == 0:
        torch.save({"gradients": gradients.steps, "weights": weights, "logs": trainer.state.log_history,
                    "world_size": trainer.args.world_size, "local": sum(map(lambda s: torch.Size(s).numel(), local))},
                   out + ".pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for place, text in enumerate(sys.argv[3:]):
        run(sys.argv[1] + str(place), int(sys.argv[2]), **json.loads(text))
    leave_group()
