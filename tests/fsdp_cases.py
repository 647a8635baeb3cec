"""Runs of the trainer that are the same on one process and sharded over two: fsdp_cases.py OUT JSON ... runs them.

JSON: tied, weights (dtype), exact (computed in fp32, of such weights), lora, second (a reference model of its own),
evaluate (before training), resume (a directory to go on from), fsdp (FSDP2's settings; absent: DDP, or one process),
and settings.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import transformers as hf
from fsdp_on_gloo import shard_on_gloo
from peft import LoraConfig, get_peft_model
from training_ import make_config, small_lm, unequal_data

from svpo_kernels.trainer import StepModel, SVPOTrainer
from svpo_kernels.trainer.heads import make_head
from svpo_kernels.trainer.model import head_dtype
from svpo_kernels.trainer.run import leave_group
from svpo_kernels.trainer.sharding import parameters, whole

LAYERS = dict(version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", reshard_after_forward=True)


class Gradients(hf.TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        model = getattr(model, "module", model)
        self.steps.append({name: whole(p.grad).clone() for name, p in parameters(model) if p.grad is not None})


def build(config, tied=False, weights="float32", lora=False, exact=False):
    lm = small_lm(getattr(torch, weights), tie_word_embeddings=tied).to(torch.float32 if exact else None)
    if lora:
        torch.manual_seed(2)
        lm = get_peft_model(lm, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False,
                                           task_type="CAUSAL_LM"))
        with torch.no_grad():  # peft's random ones are as large as the weights, and rounding is then 1.4e-6
            for name, parameter in lm.named_parameters():
                parameter.mul_(0.1 if "lora_B" in name else 1.0)
    torch.manual_seed(1)
    head = make_head(config, 32, head_dtype(lm))
    if head is not None:
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return StepModel(lm, head or False)


def run(out, tied=False, weights="float32", lora=False, second=False, evaluate=False, resume=None, fsdp=None,
        exact=False, **settings):
    """What rank 0 has at the end: logs, gradients and weights, whole; what is on this process alone."""
    torch.manual_seed(0)
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate leaves it behind, and would shard the next run
    if fsdp is not None:
        shard_on_gloo()
        settings |= {"fsdp": True, "fsdp_config": LAYERS | fsdp}
    config = make_config(out + "-run", **{"max_steps": 2, "max_tokens": 150, "adam_epsilon": 1e-3,
                                          "learning_rate": 1e-3, **settings})
    reference = None
    if second:
        lm = small_lm(getattr(torch, weights), initializer_range=0.05).to(torch.float32 if exact else None)
        reference = StepModel(lm, value_head=False)
    data = unequal_data(references=False)
    gradients = Gradients()
    trainer = SVPOTrainer(build(config, tied, weights, lora, exact), config, data,
                          unequal_data(((2, 2), (1, 3)), references=False), ref_model=reference, callbacks=[gradients])
    trainer.remove_callback(hf.PrinterCallback)
    before = trainer.evaluate() if evaluate else {}
    trainer.train(resume_from_checkpoint=resume)
    after = trainer.evaluate()
    trainer.save_model()
    state = {name: whole(parameter.detach()).clone() for name, parameter in parameters(trainer.model)}
    local = sum(getattr(p, "_local_tensor", p).numel() for p in trainer.model.parameters())
    second_local = reference and sum(getattr(p, "_local_tensor", p).numel() for p in reference.parameters())
    names = sorted(type(part).__name__ for part in trainer.model.modules() if type(part).__name__.startswith("FSDP"))
    return {"logs": trainer.state.log_history, "gradients": gradients.steps, "weights": state, "before": before,
            "after": after, "world_size": trainer.args.world_size, "local": local, "second": second_local,
            "groups": names}


def main(out, *cases):
    torch.set_num_threads(1)
    for place, text in enumerate(cases):
        found = run(f"{out}{place}", **json.loads(text))
        if int(found["world_size"]) == 1 or torch.distributed.get_rank() == 0:
            torch.save(found, f"{out}{place}.pt")
    leave_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
