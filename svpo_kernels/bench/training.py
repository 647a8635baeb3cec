"""Whole training steps on step trees: TRL's DPOTrainer, and our trainer on pairs, distinct sequences, packed trees.

Pairs and distinct sequences are padded under SDPA; packed trees, and distinct sequences once more, run without padding
under tree attention. All train the same pairs with the same loss, optimizer and starting weights, all pairs a step, so
that their loss curves lie on each other; `run` raises when they do not. They take their steps in turn, so that a slow
moment of the machine falls on all of them. TRL is at its best setting: reference log-probs computed once beforehand, as
ours are, and its fused head. It gets token ids, so that every way trains the same sequences.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import svpo_kernels as sk

from ..trees.flops import model_cost
from .machine import Rates, installed
from .prm import make_model
from .race import Result, Weigh
from .trees import TreeShape, build

FAMILY = "training"
TRL, PAIRS, ONCE, PACKED = "TRL DPOTrainer", "ours, pairs", "ours, distinct", "ours, packed trees"
CHAINS = "ours, distinct without padding"
WAYS = {PAIRS: "pairs", ONCE: "distinct", CHAINS: "distinct", PACKED: "tree"}
BATCH = 8  # pairs of a padded batch, TRL's default
SETTINGS = dict(learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0, seed=0,
                save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1, use_cpu=True, bf16=False)
AGREE = 1e-4  # of the loss, absolute: 1e-6 is seen after four steps


@dataclass(frozen=True)
class TrainingCase:
    """Trees with their pairs, trained for some optimizer steps over all of the pairs."""

    name: str
    trees: list[sk.StepTree]
    pairs: list[Any]
    steps: int = 4
    headline: bool = False
    hidden: int = 128
    vocab: int = 2000

    def __str__(self) -> str:
        return self.name


@dataclass
class Ran:
    """What one way left: loss of every step, seconds of every step, and what it ran, padding counted."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    flops: int = 0
    mebibytes: float = 0.0


@dataclass
class Way:
    """A trainer that is ready to train, what it leaves, and what completes that afterwards."""

    trainer: Any
    ran: Ran
    conclude: Callable[[Ran], None]


def cases(scale: str) -> list[TrainingCase]:
    if scale == "tiny":
        return [whole(TrainingCase("a tree of depth 2, 2 children", *build(TreeShape(2, 2, (4, 8), 10)), steps=2,
                                   hidden=32))]
    shapes = [TreeShape(3, 4, (8, 24), 50), TreeShape(4, 2, (20, 40), 50), TreeShape(1, 8, (60, 120), 100)]
    return [whole(TrainingCase(str(shape), *build(shape), steps=6)) for shape in shapes]


def whole(case: TrainingCase) -> TrainingCase:
    """The case with as many of its pairs as fill TRL's batches: it averages over batches, whatever is in them."""
    P = sum(map(len, case.pairs))
    rest = P % BATCH if P > BATCH else 0
    pairs = [np.asarray(own).reshape(-1, 2) for own in case.pairs]
    for t in sorted(range(len(pairs)), key=lambda t: -len(pairs[t])):
        drop = min(rest, len(pairs[t]))
        pairs[t], rest = pairs[t][: len(pairs[t]) - drop], rest - drop
    return TrainingCase(case.name, case.trees, pairs, case.steps, case.headline, case.hidden,
                        case.vocab)


def run(case: TrainingCase, rates: Rates, **_: Any) -> Iterator[Result]:
    """Seconds and memory of an optimizer step, then tokens and FLOPs, of every way."""
    ways: dict[str, Way] = {}
    skipped = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL's use of transformers, none of ours
        if installed("trl") and installed("datasets"):
            ways[TRL] = trl_way(case, Path(folder))
        else:
            skipped[TRL] = "trl or datasets is not installed"
        for name, packing in WAYS.items():
            ways[name] = our_way(case, packing, Path(folder), tree_attention=name in (CHAINS, PACKED))
        found = train_in_turn(ways)
    curves = {name: ran.losses for name, ran in found.items()}
    apart = max(abs(a - b) for own in curves.values() for a, b in zip(own, curves[PACKED], strict=True))
    if not apart <= AGREE:
        raise AssertionError(f"{FAMILY}: {case}: the losses differ by {apart:.2e}: {curves}")
    P = sum(map(len, case.pairs))
    about = dict(family=FAMILY, skipped=skipped, note=f"{P} pairs a step, Llama {case.hidden} x 2, V {case.vocab}; "
                 f"losses of {case.steps} steps differ by {apart:.1e} at most")
    names = list(found)
    medians = {name: 1e3 * statistics.median(found[name].seconds) for name in names}
    spread = {name: float(np.subtract(*np.percentile(found[name].seconds, [75, 25]))) * 1e3 / medians[name]
              for name in names}
    step = f"training step, {case}"
    yield Result(step, PACKED, "ms", medians, spread, curves=curves, headline=case.headline,
                 memory={name: found[name].mebibytes for name in names}, **about)
    for unit, counted in (("tokens", "tokens with padding"), ("FLOPs", "FLOPs as run")):
        counts = {name: getattr(found[name], unit.lower()) for name in names}
        saved = ", ".join(f"{100 * (1 - counts[PACKED] / counts[name]):.1f} % against {name}" for name in names[:-1])
        yield Result(f"{step}, {counted}", PACKED, unit, counts, **{**about, "note": f"packed saves {saved}"})


class Turns:
    """One thread works, the others wait: `give` hands on to the next and returns when the turn is back."""

    def __init__(self, names: list[str]) -> None:
        self.queue, self.changed = list(names), threading.Condition()

    def take(self, name: str) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.queue[0] == name)

    def give(self, name: str, leave: bool = False) -> None:
        with self.changed:
            self.queue.pop(0)
            if not leave:
                self.queue.append(name)
            self.changed.notify_all()
        if not leave:
            self.take(name)


def train_in_turn(ways: dict[str, Way]) -> dict[str, Ran]:
    """Train every way, a step of each after the other. A trainer's loop is its own, so each has a thread."""
    turns, failures = Turns(list(ways)), []

    def train(name: str, way: Way) -> None:
        turns.take(name)
        try:
            with closing(steps_of(way.ran, lambda: turns.give(name))) as steps:
                way.trainer.add_callback(steps)
                way.trainer.train()
            way.conclude(way.ran)
        except BaseException as error:  # it is raised below: what ends a thread is only printed
            failures.append(error)
        finally:
            turns.give(name, leave=True)

    threads = [threading.Thread(target=train, args=item, daemon=True) for item in ways.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return {name: way.ran for name, way in ways.items()}


def steps_of(ran: Ran, wait: Callable[[], None]) -> Any:
    """A callback that waits before every optimizer step, keeps its seconds and loss, and the first one's memory."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        weigh: Weigh | None = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            wait()
            # The first step makes gradients and optimizer state too; emptying the pool later would slow ours down.
            if not ran.seconds:
                self.weigh = Weigh().__enter__()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ran.seconds.append(time.perf_counter() - self.began)
            self.close()

        def close(self) -> None:
            """Stop weighing; also when a step raised, or the sampler's thread would run on into every later race."""
            if self.weigh is not None:
                self.weigh.__exit__()
                ran.mebibytes, self.weigh = self.weigh.mebibytes, None

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                ran.losses.append(float(logs["loss"]))

    return Steps()


def our_way(case: TrainingCase, packing: str, folder: Path, tree_attention: bool = False) -> Way:
    """Our trainer. Padded batches hold what TRL's do: eight pairs of the longest sequences; chains as many tokens."""
    from ..trainer import StepModel, SVPOTrainer, TrainData, load_config
    from ..trainer.run import quiet

    quiet()
    longest = max(tree.length[i] for tree, own in zip(case.trees, case.pairs, strict=True) for i in np.unique(own))
    P = sum(map(len, case.pairs))
    config = load_config(None, output_dir=str(folder / f"{packing}{tree_attention}"), preset="step_dpo", beta=0.1,
                         packing=packing, max_tokens="auto" if packing == "tree" else str(2 * BATCH * longest),
                         pairs_per_step=P, max_steps=case.steps, **SETTINGS)
    lm = make_model(case.vocab, case.hidden)
    model = StepModel(sk.use_tree_attention(lm) if tree_attention else lm, value_head=False)
    trainer = SVPOTrainer(model, config, TrainData(list(case.trees), list(case.pairs)))
    _quieten(trainer)

    def conclude(ran: Ran) -> None:
        cost = model_cost(model.config)
        for pack in trainer.planner.packs(0, 0):
            batch = pack["batch"]
            B, L = batch.input_ids.shape
            ran.tokens += B * L
            if tree_attention:
                ran.flops += sk.count_flops(model.config, batch, "exact").packed
            else:
                ran.flops += cost.training(B * L, batch.plan.rows.shape[0], {None: B * L * L})

    return Way(trainer, Ran(), conclude)


def trl_way(case: TrainingCase, folder: Path) -> Way:
    """TRL's own trainer on pairs, handed token ids: no tokenizer stands between the two."""
    import trl
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()

    class OnIds(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    rows = []
    for tree, own in zip(case.trees, case.pairs, strict=True):
        for chosen, rejected in own.tolist():
            start = min(tree.start[chosen], tree.start[rejected])
            c, r = (list(map(int, tree.path(i))) for i in (chosen, rejected))
            rows.append({"prompt_ids": c[:start], "chosen_ids": c[start:], "rejected_ids": r[start:]})
    batch = min(BATCH, len(rows))
    arguments = trl.DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=batch, max_length=None, beta=0.1,
        gradient_accumulation_steps=len(rows) // batch, max_steps=case.steps, precompute_ref_log_probs=True,
        gradient_checkpointing=False, **SETTINGS)
    ran = Ran()
    model = make_model(case.vocab, case.hidden)
    trainer = OnIds(model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer())
    _quieten(trainer)
    cost = model_cost(model.config)

    def count(module: Any, args: Any, kwargs: Any) -> None:
        B, L = kwargs["input_ids"].shape
        ran.tokens += B * L
        ran.flops += cost.training(B * L, B * (L - 1), {None: B * L * L})  # without Triton its head runs over all rows

    hook = model.model.register_forward_pre_hook(count, with_kwargs=True)

    def conclude(ran: Ran) -> None:
        hook.remove()
        ran.tokens, ran.flops = ran.tokens // case.steps, ran.flops // case.steps

    return Way(trainer, ran, conclude)


def _quieten(trainer: Any) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _tokenizer() -> Any:
    """TRL asks for one; the ids are there already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, "<pad>")),
                                   pad_token="<pad>", eos_token="<eos>")
