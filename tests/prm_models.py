"""Tiny random models of public process reward models, saved with their own key names and tokenizers that have their
tags, and the snippets of their model cards, re-stated: what each is usually scored with."""

from __future__ import annotations

import json

import tokenizers_
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tiny_models import SMALL

from svpo_kernels.reasoning.scorers import QWEN_SYSTEM

PROBLEM = "What is 2 + 3 * 4 - 1?"
SOLUTIONS = [["First 3 * 4 = 12.", "Then 2 + 12 = 14.", "Then 14 - 1 = 13."], ["So it is 2 + 3 = 5.", "It is 20."],
             ["First 3 * 4 = 12.", "Then 2 + 12 = 15.", "Then 15 - 1 = 14.", "It is 14.", "Done."]]
TEXTS = [PROBLEM, *(step for steps in SOLUTIONS for step in steps), QWEN_SYSTEM, "+ - Yes No ки"] * 3
LLAMA3 = ("{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
          "+ m['content'] | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
          "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}")


def randomise(model, seed=0):
    """Weights large enough that scores differ from each other and from a half."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def _save(model, tokenizer, folder, **extra):
    """A model's directory, with more tensors in its weights."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if extra:
        path = folder / "model.safetensors"
        save_file(load_file(path) | {name.replace("__", "."): tensor for name, tensor in extra.items()}, path,
                  metadata={"format": "pt"})
    return folder


class QwenPRM(torch.nn.Module):
    """What the card's remote code holds: the decoder and a head of two layers."""

    def __init__(self, config):
        super().__init__()
        self.model = hf.Qwen2Model(config)
        self.score = torch.nn.Sequential(torch.nn.Linear(config.hidden_size, config.hidden_size), torch.nn.ReLU(),
                                         torch.nn.Linear(config.hidden_size, 2))

    def forward(self, input_ids, attention_mask=None):
        return (self.score(self.model(input_ids, attention_mask=attention_mask).last_hidden_state),)


def qwen(folder):
    tokenizer = tokenizers_.qwen(TEXTS, vocab_size=500)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    config = hf.Qwen2Config(**SMALL | {"vocab_size": len(tokenizer)})
    model = randomise(QwenPRM(config))
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(
        config.to_dict() | {"architectures": ["Qwen2ForProcessRewardModel"], "num_labels": 2}))
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def qwen_snippet(model, tokenizer, problem, solutions, pad):
    """Softmax of the class logits times the mask of `<extra_0>`, class 1; the card then drops zeros, scores of 0 too:
    here they are kept. `pad`: a batch padded on the right, as a server runs it."""
    texts = [tokenizer.apply_chat_template(
        [{"role": "system", "content": "Please reason step by step, and put your final answer within \\boxed{}."},
         {"role": "user", "content": problem}, {"role": "assistant", "content": "<extra_0>".join(steps) + "<extra_0>"}],
        tokenize=False, add_generation_prompt=False) for steps in solutions]
    separator = tokenizer.encode("<extra_0>")[0]
    return _over(model, [tokenizer.encode(text) for text in texts], pad,
                 lambda logits, ids: logits[0].softmax(-1)[ids == separator][:, 1])


def _over(model, rows, pad, read):
    """read(outputs of a row, its ids) for every row, alone or in one padded batch."""
    with torch.no_grad():
        if not pad:
            return [read([each[0] for each in model(torch.tensor([ids]))], torch.tensor(ids)) for ids in rows]
        length = max(map(len, rows)) + 3
        batch = torch.tensor([ids + [0] * (length - len(ids)) for ids in rows])
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in rows])
        outputs = model(batch, attention_mask=mask)
        return [read([each[i, :len(ids)] for each in outputs], torch.tensor(ids)) for i, ids in enumerate(rows)]


class Logits(torch.nn.Module):
    """A causal LM that gives (logits,), as `model(ids)[0]` of the cards."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, input_ids, attention_mask=None):
        return (self.lm(input_ids, attention_mask=attention_mask).logits,)


def math_shepherd(folder):
    tokenizer = tokenizers_.words(["+", "-", "ки", *" ".join(TEXTS).split()])
    config = hf.MistralConfig(**SMALL | {"vocab_size": len(tokenizer)}, sliding_window=None)
    lm = randomise(hf.MistralForCausalLM(config))
    _save(lm, tokenizer, folder)
    return Logits(lm), tokenizer


def math_shepherd_snippet(model, tokenizer, problem, solutions, pad):
    candidates = tokenizer.encode("+ -")[1:]
    tag = tokenizer.encode("ки")[-1]
    outputs = ["\n".join(f"{step} ки" for step in steps) for steps in solutions]
    return _over(model, [tokenizer.encode(f"{problem} {output}") for output in outputs], pad,
                 lambda logits, ids: logits[0][:, candidates].softmax(-1)[:, 0][ids == tag])


def rlhflow(folder):
    tokenizer = tokenizers_.llama3(TEXTS, LLAMA3)
    lm = randomise(hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL | {"vocab_size": len(tokenizer)})))
    _save(lm, tokenizer, folder)
    return Logits(lm), tokenizer


def rlhflow_snippet(model, tokenizer, problem, solutions, pad):
    """The chat so far, answered with `+` each time, once a step: the third logits from the end."""
    candidates = [tokenizer.encode("+")[-1], tokenizer.encode("-")[-1]]
    found = []
    for steps in solutions:
        chat, rows = [], []
        for k, step in enumerate(steps):
            chat.append({"role": "user", "content": f"{problem} {step}" if k == 0 else step})
            chat.append({"role": "assistant", "content": "+"})
            text = tokenizer.apply_chat_template(chat, tokenize=False)
            rows.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        scores = _over(model, rows, pad, lambda logits, ids: logits[0][-3, candidates].softmax(-1)[0])
        found.append(torch.stack(scores))
    return found


class WithValues(torch.nn.Module):
    def __init__(self, lm):
        super().__init__()
        self.lm, self.v_head = lm, torch.nn.Linear(lm.config.hidden_size, 1)

    def forward(self, input_ids, attention_mask=None):
        return (self.v_head(self.lm.model(input_ids, attention_mask=attention_mask).last_hidden_state)[..., 0],)


def skywork(folder):
    tokenizer = tokenizers_.qwen(TEXTS, vocab_size=500)
    tokenizer.bos_token = "<|endoftext|>"
    lm = hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL | {"vocab_size": len(tokenizer)}))
    model = randomise(WithValues(lm))
    _save(lm, tokenizer, folder, v_head__summary__weight=model.v_head.weight.detach().clone(),
          v_head__summary__bias=model.v_head.bias.detach().clone())
    return model, tokenizer


def skywork_snippet(model, tokenizer, problem, solutions, pad):
    """Each step alone, then the last id of the step token's encoding."""
    rows, flags = [], []
    for steps in solutions:
        ids = tokenizer.encode(tokenizer.bos_token + problem + "\n")
        flag = [0] * len(ids)
        for step in "\n".join(steps).split("\n"):
            own = tokenizer.encode(step) if step != "" else []
            own += [tokenizer.encode("\n")[-1]]
            ids = ids + own
            flag += [0] * (len(own) - 1) + [1]
        rows.append(ids)
        flags.append(torch.tensor(flag) == 1)
    each = _over(model, rows, pad, lambda values, ids: values[0].sigmoid())
    return [scores[flag] for scores, flag in zip(each, flags, strict=True)]


PUBLIC = {"qwen": (qwen, qwen_snippet), "math_shepherd": (math_shepherd, math_shepherd_snippet),
          "rlhflow": (rlhflow, rlhflow_snippet), "skywork": (skywork, skywork_snippet)}
