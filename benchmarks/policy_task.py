"""Step-level against sequence-level policy gradients on the task of `svpo demo`, at equal sampled tokens.

    python -m benchmarks.policy_task --results benchmarks/results/policy.json

A tiny Llama is taught the language by a few right solutions. Then, round by round, it samples, `verify` rewards, and
the trainer of `svpo train` takes some passes over what was sampled. sequence: eight independent responses a problem,
`preset: grpo` (one advantage a response). step: a tree of up to eight leaves a problem, a step's value the mean reward
of the leaves under it, `preset: treerpo` (one advantage a step, within its siblings). Shared prefixes are sampled once,
so a tree costs fewer tokens and the step run sees more problems: equal is the number of sampled tokens of every round.
No KL, the same learning rate, clip and passes. Measured: held-out problems solved greedily. What the runs rest on is
checked: loss and gradient of a packed step equal those of one run a path.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import random
import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PrinterCallback

from svpo_kernels.data import demo_data
from svpo_kernels.trainer import StepModel, SVPOTrainer, load_config
from svpo_kernels.trainer.run import make_data, quiet
from svpo_kernels.trees.tree import StepNode, StepTree

RUNS = {"sequence": {"preset": "grpo", "kl_weight": 0.0}, "step": {"preset": "treerpo"}}
LEAVES, LONGEST = 8, 64  # responses a problem; tokens of one


class Task:
    """Problems, tokenizer and what a response is."""

    def __init__(self, held_out: int) -> None:
        problems = demo_data.make_problems(2048 + held_out, 0)
        self.held_out, self.problems = problems[:held_out], problems[held_out:]
        self.tokenizer = demo_data.make_tokenizer()
        self.eos = self.tokenizer.eos_token_id

    def prompt(self, problem: demo_data.Problem) -> list[int]:
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": problem.question}], tokenize=False,
                                                  add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def solution(self, problem: demo_data.Problem) -> list[int]:
        value, steps = problem.start, []
        for depth, (sign, number) in enumerate(problem.operations):
            text, value = demo_data._step(problem, depth, value, sign, number)
            steps.append(text)
        return [*self.tokenizer("\n\n".join(steps), add_special_tokens=False).input_ids, self.eos]

    def reward(self, problem: demo_data.Problem, ids: list[int]) -> float:
        """1 or -1; a response that does not end is wrong."""
        right = ids[-1] == self.eos and demo_data.verify(problem, self.tokenizer.decode(ids[:-1]))
        return 1.0 if right else -1.0

    def steps(self, ids: list[int]) -> list[list[int]]:
        """The ids of a response, cut behind every separator."""
        found: list[list[int]] = [[]]
        for i in ids:
            found[-1].append(i)
            if self.tokenizer.decode(found[-1][-2:]).endswith("\n\n"):  # one token or two
                found.append([])
        return [step for step in found if step]


@torch.no_grad()
def sample(lm: Any, task: Task, prefixes: list[list[int]], greedy: bool = False) -> list[list[int]]:
    """A continuation of every prefix, up to its end of text, at temperature 1."""
    width = max(map(len, prefixes), default=0)
    if not width:
        return []
    ids = torch.tensor([[task.tokenizer.pad_token_id] * (width - len(prefix)) + prefix for prefix in prefixes])
    mask = torch.tensor([[0] * (width - len(prefix)) + [1] * len(prefix) for prefix in prefixes])
    lm.eval()
    more = {} if greedy else {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
    out = lm.generate(input_ids=ids, attention_mask=mask, do_sample=not greedy, max_new_tokens=LONGEST, **more)
    found = [row.tolist() for row in out[:, width:]]
    return [row[:row.index(task.eos) + 1] if task.eos in row else row for row in found]


def accuracy(lm: Any, task: Task) -> float:
    answers = sample(lm, task, [task.prompt(problem) for problem in task.held_out], greedy=True)
    return statistics.mean(task.reward(p, ids) > 0 for p, ids in zip(task.held_out, answers, strict=True))


def responses(lm: Any, task: Task, problems: list[demo_data.Problem]) -> list[tuple[StepTree, int]]:
    """A tree of LEAVES responses a problem, each a step of its own, and the tokens that were sampled for it."""
    prompts = [task.prompt(problem) for problem in problems]
    drawn = sample(lm, task, [prompt for prompt in prompts for _ in range(LEAVES)])
    found = []
    for at, (problem, prompt) in enumerate(zip(problems, prompts, strict=True)):
        own = drawn[at * LEAVES:(at + 1) * LEAVES]
        nodes = [StepNode(-1, ids, task.reward(problem, ids), terminal=True) for ids in own]
        found.append((StepTree(prompt, nodes), sum(map(len, own))))
    return found


class Growing:
    """A tree that grows by whole continuations, cut into steps."""

    def __init__(self, task: Task, problem: demo_data.Problem) -> None:
        self.task, self.problem, self.prompt = task, problem, task.prompt(problem)
        self.ids: list[list[int]] = []
        self.parent: list[int] = []
        self.depth: list[int] = []
        self.rewards: dict[int, float] = {}
        self.tokens = 0

    def prefix(self, node: int) -> list[int]:
        ids: list[int] = []
        while node != -1:
            ids, node = self.ids[node] + ids, self.parent[node]
        return self.prompt + ids

    def add(self, node: int, drawn: list[int]) -> None:
        self.tokens += len(drawn)
        reward = self.task.reward(self.problem, drawn)
        for step in self.task.steps(drawn):
            self.ids.append(step)
            self.depth.append(self.depth[node] + 1 if node >= 0 else 0)
            self.parent.append(node)
            node = len(self.ids) - 1
        self.rewards[node] = reward

    def tree(self) -> StepTree:
        """q_value of a node: the mean reward of the leaves under it."""
        under: list[list[float]] = [[] for _ in self.ids]
        for leaf, reward in self.rewards.items():
            node = leaf
            while node != -1:
                under[node].append(reward)
                node = self.parent[node]
        return StepTree(self.prompt, [
            StepNode(parent, ids, statistics.mean(below), terminal=i in self.rewards)
            for i, (parent, ids, below) in enumerate(zip(self.parent, self.ids, under, strict=True))])


def trees(lm: Any, task: Task, problems: list[demo_data.Problem]) -> list[tuple[StepTree, int]]:
    """A tree of up to LEAVES leaves a problem: two first steps, and a second continuation behind each first and second
    step (2 + 2 + 4), and the tokens that were sampled for it."""
    grown = [Growing(task, problem) for problem in problems]
    for depth in (-1, 0, 1):
        wanted = [(tree, node) for tree in grown for node in (
            [-1, -1] if depth < 0 else [i for i, d in enumerate(tree.depth) if d == depth and i not in tree.rewards])]
        for (tree, node), drawn in zip(wanted, sample(lm, task, [t.prefix(n) for t, n in wanted]), strict=True):
            tree.add(node, drawn)
    return [(tree.tree(), tree.tokens) for tree in grown]


def sampled(lm: Any, task: Task, grow: Any, rng: random.Random, budget: int) -> tuple[list[StepTree], int]:
    """Trees of new problems until their sampled tokens reach the budget, without the last where it goes beyond."""
    kept, spent = [], 0
    while True:
        for tree, tokens in grow(lm, task, rng.sample(task.problems, 16)):
            if spent + tokens > budget:
                return kept, spent
            kept.append(tree)
            spent += tokens


def teach(lm: Any, task: Task, steps: int, seed: int) -> None:
    """The language of the task: right solutions of `steps` batches of 32 problems."""
    rng, optimizer = random.Random(seed), torch.optim.AdamW(lm.parameters(), lr=3e-3)
    lm.train()
    for _ in range(steps):
        rows = [(task.prompt(p), task.solution(p)) for p in rng.sample(task.problems, 32)]
        width = max(len(a) + len(b) for a, b in rows)
        ids = torch.tensor([a + b + [task.eos] * (width - len(a) - len(b)) for a, b in rows])
        labels = torch.tensor([[-100] * len(a) + b + [-100] * (width - len(a) - len(b)) for a, b in rows])
        loss = lm(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train(lm: Any, made: list[StepTree], settings: dict[str, Any], **more: Any) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(None, output_dir=folder, save_strategy="no", disable_tqdm=True, use_cpu=True,
                             lr_scheduler_type="constant", max_tokens=4096, **settings, **more)
        data = make_data(config, made, [()] * len(made))
        trainer = SVPOTrainer(StepModel(lm, False), config, data)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]


def check(lm: Any, made: list[StepTree], settings: dict[str, Any]) -> None:
    """One step over these trees, packed and one run a path: the same loss and norm of the gradient."""
    state = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    found = {}
    for packing in ("tree", "distinct"):
        (logs,) = train(lm, made, settings, packing=packing, max_steps=1, learning_rate=1e-9, pairs_per_step=len(made))
        found[packing] = torch.tensor([logs["loss"], logs["grad_norm"]], dtype=torch.float64)
        lm.load_state_dict(state)
    torch.testing.assert_close(found["tree"], found["distinct"], rtol=1e-4, atol=1e-6)


def run(seed: int, size: SimpleNamespace) -> list[dict[str, Any]]:
    """Both runs from one starting model."""
    quiet()
    torch.set_num_threads(1)
    task = Task(size.held_out)
    start = demo_data.make_model(task.tokenizer, seed)
    teach(start, task, size.taught, seed)
    return [_run(task, copy.deepcopy(start), name, seed, size) for name in RUNS]


def _run(task: Task, lm: Any, name: str, seed: int, size: SimpleNamespace) -> dict[str, Any]:
    torch.manual_seed(1000 + seed)
    rng, grow = random.Random(seed), {"sequence": responses, "step": trees}[name]
    curve, spent, problems, saved = [accuracy(lm, task)], [], [], []
    for at in range(size.rounds):
        made, tokens = sampled(lm, task, grow, rng, size.budget)
        if at == 0:
            check(lm, made, RUNS[name])
        logs = train(lm, made, RUNS[name], num_train_epochs=size.passes, learning_rate=size.rate, seed=seed,
                     pairs_per_step=-(-len(made) // 2))
        spent.append(tokens)
        problems.append(len(made))
        saved.append(statistics.mean(entry["compute/saved"] for entry in logs))
        curve.append(accuracy(lm, task))
        print(f"{name}, seed {seed}, round {at + 1}: {tokens} tokens, {len(made)} problems, solved {curve[-1]:.1%}, "
              f"ratio {logs[-1]['policy/ratio']:.3f}, clipped {logs[-1]['policy/clip_fraction']:.1%}", flush=True)
    return {"run": name, "seed": seed, "solved": curve, "sampled_tokens": spent, "problems": problems,
            "tokens_saved_by_packing": statistics.mean(saved)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    for key, default in (("seeds", 3), ("rounds", 4), ("budget", 2500), ("taught", 300), ("passes", 2),
                         ("held-out", 96)):
        parser.add_argument(f"--{key}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=1e-4)
    size = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(size.processes) as pool:
        rows = [row for found in pool.starmap(run, [(seed, size) for seed in range(size.seeds)], chunksize=1)
                for row in found]
    ends = {name: [row["solved"][-1] for row in rows if row["run"] == name] for name in RUNS}
    print(f"solved before {statistics.mean(row['solved'][0] for row in rows):.1%}; after: " + "; ".join(
        f"{name} {statistics.mean(each):.1%} ({', '.join(f'{x:.1%}' for x in each)})" for name, each in ends.items()))
    if size.results:
        said = {key: value for key, value in vars(size).items() if key not in ("results", "processes")}
        size.results.write_text(json.dumps({"command": "python -m benchmarks.policy_task", "settings": said,
                                            "torch": torch.__version__, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
