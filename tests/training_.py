"""What the trainer's tests share: a tiny Llama, trees of unequal size, and a trainer whose gradients are kept."""

from __future__ import annotations

import json
import random

import torch
import transformers as hf
from tiny_models import SMALL
from tiny_trees import random_tree

from svpo_kernels import select_pairs
from svpo_kernels.trainer import StepModel, SVPOTrainer, TrainData, load_config, report
from svpo_kernels.trainer.run import make_data
from svpo_kernels.trainer.train_data import pair_weights


def small_lm(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL | changes)).to(dtype)


def unequal_data(sizes=((2, 3), (1, 2), (3, 2), (1, 4), (2, 2)), weigh="pair", sft=False, references=True):
    """Trees of (depth, children) each, all pairs with a gap above 0.2."""
    trees = [random_tree(seed, depth=depth, children=children) for seed, (depth, children) in enumerate(sizes)]
    rng = random.Random(7)
    for tree in trees:
        for node in tree.nodes:  # far from the model's own, so that no reward is a rounding error
            node.ref_logp = -rng.uniform(10, 60) if references else None
    pairs = [select_pairs(tree, "all", 0.2).numpy() for tree in trees]
    chosen = [sorted(set(rows[:, 0].tolist())) for rows in pairs] if sft else []
    return TrainData(trees, pairs, chosen, pair_weights(trees, pairs, weigh))


def policy_data(folder, sizes, **settings):
    """Trees of (depth, children) each whose leaves end a solution, as objective policy takes them."""
    trees = [random_tree(seed, depth=depth, children=children) for seed, (depth, children) in enumerate(sizes)]
    for tree in trees:
        for index, node in enumerate(tree.nodes):
            node.terminal = not tree.children[index]
    return make_data(make_config(folder, **settings), trees, [()] * len(trees))


class Gradients(hf.TrainerCallback):
    """Keeps the gradients of every optimizer step, by parameter name."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def make_config(output_dir, **settings):
    settings = {"max_steps": 1, "pairs_per_step": 1000, "max_tokens": 4096, "learning_rate": 1e-3, "max_grad_norm": 0.0,
                "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "preset": "svpo", "packing": "tree",
                **settings}
    return load_config(None, output_dir=str(output_dir), **settings)


def make_trainer(output_dir, data=None, lm=None, eval_data=None, **settings):
    """A trainer on the CPU with a Gradients callback as trainer.gradients."""
    config = make_config(output_dir, **settings)
    lm = small_lm() if lm is None else lm
    head = config.head == "value"
    model = StepModel(lm, value_head=head)
    if head:
        torch.manual_seed(1)
        torch.nn.init.normal_(model.v_head.summary.weight, std=0.1)
        torch.nn.init.constant_(model.v_head.summary.bias, 0.1)
    gradients = Gradients()
    trainer = SVPOTrainer(model, config, unequal_data() if data is None else data, eval_data, callbacks=[gradients])
    trainer.remove_callback(hf.PrinterCallback)
    trainer.gradients = gradients
    return trainer


def history_of(folder):
    """The lines of metrics.jsonl without what a clock says."""
    lines = [json.loads(line) for line in (folder / report.METRICS).read_text().splitlines()]
    timed = ("runtime", "per_second")
    return [json.dumps({name: value for name, value in entry.items() if not name.endswith(timed)}) for entry in lines]


def run_once(output_dir, **settings):
    """(logged metrics of the first step, gradients of the first step)."""
    trainer = make_trainer(output_dir, **settings)
    trainer.train()
    return trainer.state.log_history[0], trainer.gradients.steps[0]


def relative_error(ours, theirs):
    """Largest difference of any gradient element, relative to that gradient's largest element, over all parameters."""
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for name, expected in theirs.items():
        assert torch.isfinite(ours[name]).all(), name
        scale = expected.abs().max().item()
        assert scale > 0, f"{name} has no gradient"
        worst = max(worst, ((ours[name].double() - expected.double()).abs().max().item()) / scale)
    return worst
