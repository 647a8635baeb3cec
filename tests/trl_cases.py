"""TRL's trainers on tiny random models, and one batch of each: what the tests of integrations.trl share."""

from __future__ import annotations

import copy

import datasets
import tokenizers_
import torch
import transformers as hf
import trl

TEXTS = [("What is 3 + 4?", "3 + 4 = 7. The answer is 7.", "3 + 4 = 8."), ("Take 2 from 9.", "9 - 2 = 7.", "It is 6."),
         ("Double 12.", "2 * 12 = 24", "12 * 12 = 144, so the answer is 144."), ("Halve 8.", "4", "2")]
SIZES = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
             eos_token_id=2)
CONFIGS = {
    "llama": hf.LlamaConfig(**SIZES),
    "gemma2": hf.Gemma2Config(**SIZES, final_logit_softcapping=2.0),
    "cohere": hf.CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.25),
    "granite": hf.GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=4.0),
    "phi": hf.PhiConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}),  # a head with a bias
}
KINDS = {"sft": (trl.SFTTrainer, trl.SFTConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig),
         "kto": (trl.KTOTrainer, trl.KTOConfig), "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
         "rloo": (trl.RLOOTrainer, trl.RLOOConfig)}


def model(name="llama", seed=0):
    """Weights large enough that softcaps, scales and statistics matter."""
    torch.manual_seed(seed)
    lm = hf.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="eager")
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
        if lm.lm_head.bias is not None:
            lm.lm_head.bias.normal_()
    return lm


def tokenizer():
    made = tokenizers_.gpt2([text for row in TEXTS for text in row], vocab_size=300)
    made.pad_token = made.eos_token
    return made


def rows(kind):
    if kind == "sft":
        return [dict(prompt=prompt, completion=chosen) for prompt, chosen, _ in TEXTS]
    if kind == "dpo":
        return [dict(prompt=prompt, chosen=chosen, rejected=rejected) for prompt, chosen, rejected in TEXTS]
    if kind == "kto":
        return [dict(prompt=prompt, completion=text, label=text == chosen)
                for prompt, chosen, rejected in TEXTS for text in (chosen, rejected)]
    return [dict(prompt=prompt) for prompt, *_ in TEXTS]


def trainer(kind, folder, lm=None, make=None, reference=True, batch=4, **settings):
    """A trainer of TRL's (or make(model, **arguments)) on the CPU, its reference another random model."""
    cls, config = KINDS[kind]
    more = {"reward_funcs": lambda completions, **_: [float(len(text) % 7) for text in completions]} \
        if kind in ("grpo", "rloo") else {"ref_model": model(seed=1)} if kind in ("dpo", "kto") and reference else {}
    lm = lm if lm is not None else model()
    if kind in ("grpo", "rloo"):
        settings = dict(num_generations=2, max_completion_length=8) | settings
        model(seed=1).save_pretrained(folder / "reference")
        lm.config._name_or_path = str(folder / "reference")  # where TRL reads the reference from
    arguments = config(output_dir=str(folder), per_device_train_batch_size=batch, **dict(
        report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, seed=5) | settings)
    return (make or cls)(lm, args=arguments, processing_class=tokenizer(),
                         train_dataset=datasets.Dataset.from_list(rows(kind)), **more)


def batch_of(made):
    """The inputs of a first training step; the policy has moved a little since."""
    made.model.train()
    made.current_gradient_accumulation_steps = 1  # as train() sets it
    inputs = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    with torch.no_grad():
        torch.manual_seed(11)
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return inputs


def step(made, inputs):
    """(loss, gradients, metrics) of compute_loss on these inputs."""
    made.model.zero_grad()
    made._metrics["train"].clear()
    made._total_train_tokens = 0
    loss = made.compute_loss(made.model, dict(inputs))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, {name: values[-1] for name, values in made._metrics["train"].items()}
