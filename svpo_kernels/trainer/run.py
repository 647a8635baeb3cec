"""One training run from a configuration: read the data, build the model, train, save, report."""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from svpo_kernels import dispatch
from svpo_kernels.data import encoded
from svpo_kernels.data.encoded import Encoded
from svpo_kernels.data.formats import FORMATS, Format, tables
from svpo_kernels.data.load import read_trees
from svpo_kernels.trees.tree import StepTree

from . import attention, packages, policy, reference, report, start
from .config import ConfigError, SVPOConfig
from .head_files import FOLDER
from .model import StepModel, build_model
from .resume import begun_on, finished, owned, sources, where_to_resume, write_finished
from .saving import writing
from .train_data import TrainData, pair_weights
from .trainer import SVPOTrainer


@dataclass
class RunResult:
    """What a run gives back. metrics: of the last evaluation; history: every log entry, resumed ones included.
    trainer: None where the run had finished before."""

    trainer: SVPOTrainer | None
    history: list[dict[str, float]]
    metrics: dict[str, float]
    curves: Path | None


def quiet() -> None:
    """Keep transformers' own messages and bars away from ours; errors still show."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def make_data(config: SVPOConfig, trees: list[StepTree], pairs: list[Any]) -> TrainData:
    """Trees and their pairs with the weights and SFT nodes that the configuration asks for."""
    pairs = [np.asarray(rows, np.int64).reshape(-1, 2) for rows in pairs]
    if config.objective == "policy":
        trees, rollouts = policy.make_rollouts(config, trees)
        return TrainData(trees, [rows[:0] for rows in pairs], rollouts=rollouts)
    if not config.reads_pairs():
        pairs = [rows[:0] for rows in pairs]  # no term reads them: whole trees are the unit instead
    sft: list[np.ndarray] = []
    if config.weight("sft") > 0:
        sft = [_sft_nodes(config, tree, rows) for tree, rows in zip(trees, pairs, strict=True)]
    return TrainData(trees, pairs, sft, pair_weights(trees, pairs, config.pair_weight),
                     paths=config.objective == "implicit_prm", alone_too=config.objective == "dvo")


def _sft_nodes(config: SVPOConfig, tree: StepTree, pairs: np.ndarray) -> np.ndarray:
    if config.sft_nodes == "chosen":
        return np.unique(pairs[:, 0])
    good = [index for index, node in enumerate(tree.nodes) if node.q_value is not None and node.q_value > 0]
    return np.array(good, np.int64)


def load_data(config: SVPOConfig, path: str, tokenizer: PreTrainedTokenizerBase, say: Any = print) -> TrainData:
    """Read a file as `svpo data` shows it. Rows that were dropped or truncated are named in one line."""
    found = encoded_trees(config, path, tokenizer, say)
    pairs, dropped = found.counted_pairs(config.pair_rule, config.min_gap, config.max_pairs, dedup=config.dedup,
                                           same_kind=config.same_kind)
    data = make_data(config, found.trees, pairs)
    data.correct = found.correct
    say(found.summary)
    for line in dropped if config.reads_pairs() else ():
        say(f"{path}: {line}")
    targets, sft = data.num_targets(config.values), sum(map(len, data.sft))
    say(f"{path}: {len(data.trees)} trees, {sum(len(tree) for tree in data.trees)} steps, {data.num_pairs} pairs, "
        f"{targets} value targets, {sft} SFT steps")
    say_references(config, path, data, say)
    for line in policy.facts(config, found.trees, data):
        say(f"{path}: {line}")
    check_members(config, path, data.num_pairs, targets, sft, say, FORMATS[found.format])
    return data


def encoded_trees(config: SVPOConfig, path: str, tokenizer: PreTrainedTokenizerBase, say: Any = print) -> Encoded:
    """The token trees of a file: mapped from data_cache where a run or another process of this machine left them."""
    options = dict(format=config.data_format, value_range=config.value_range, on_bad=config.on_bad,
                   max_path_tokens=config.max_path_tokens, **config.text_options())
    name = None if config.data_cache == "none" else encoded.fingerprint(path, tokenizer, options)
    if name is None:
        return Encoded.of(read_trees(path, tokenizer, **options))
    folder = Path(config.data_cache or Path(config.output_dir) / FOLDER) / f"{encoded.PREFIX}{name}"
    with config.main_process_first(local=True, desc="encoding"):
        found = encoded.read(folder)
        if isinstance(found, Encoded):
            say(f"{path}: its {len(found.trees):,} trees were encoded before and are mapped from {folder}")
            return found
        if folder.is_dir():
            say(f"{path}: what lies in {folder} is encoded anew: {found}")
        made = Encoded.of(read_trees(path, tokenizer, **options))
        try:
            encoded.write(folder, made)
        except OSError as error:
            say(f"{path}: its encoded trees are not kept for the next run: {error}")
            return made
    found = encoded.read(folder)
    return found if isinstance(found, Encoded) else made


def say_references(config: SVPOConfig, path: str, data: TrainData, say: Any) -> None:
    """Log-probs of a reference that stand in the file take the place of a reference model: never without a word."""
    places = reference.places(data) if config.reference == "cache" and data.rollouts is None else []
    held = sum(data.reference(*place) is not None for place in places)
    if held:
        what = "they are the reference, no model is run for it" if held == len(places) else "all are computed anew"
        say(f"{path}: {held:,} of {len(places):,} referenced steps bring a ref_logp of their own: {what}")


def check_members(config: SVPOConfig, path: str, pairs: int, targets: int, sft: int, say: Any = print,
                  found: Format | None = None) -> None:
    """A term with a weight and no member is said; without pairs for a term over pairs, or with nothing to train at all,
    the run ends in a ConfigError that names the keys, and the objective that the file's format is made for."""
    made_for = ""
    if found is not None and found.labels and config.objective in ("preference", "policy"):
        made_for = f"; {found.title} holds labels of steps: objective: prm trains on them"
    elif found is not None and found.scale is None and config.objective != "preference":
        made_for = f"; {found.title} holds pairs: objective: preference trains on them"
    if config.reads_pairs() and not pairs:
        raise ConfigError(f"config: {path} has no pair of steps with a gap above min_gap = {config.min_gap:g} by "
                          f"pair_rule {config.pair_rule}; `svpo data` shows the gaps{made_for}")
    idle, members = [], pairs
    none = f"no step with an advantage by advantage = {config.advantage}" if config.objective == "policy" else (
        f"no step with a value by values = {config.values}")
    for term, count, lack in (("value", targets, none),
                              ("sft", sft, f"no SFT step by sft_nodes = {config.sft_nodes}")):
        if config.weight(term):
            members += count
            if not count:
                what = "objective policy" if config.objective == "policy" else (
                    f"{term}_weight = {config.weight(term):g}")
                idle.append(f"{what} trains nothing: {path} has {lack}")
    if not members:
        raise ConfigError(f"config: nothing would be trained: {'; '.join(idle)}{made_for}")
    for line in idle:
        say(line)


def load_tokenizer(config: SVPOConfig) -> PreTrainedTokenizerBase:
    name = config.tokenizer_name_or_path or config.model_name_or_path
    return AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)


def reference_model(config: SVPOConfig, model: StepModel) -> StepModel | None:
    """The second model, where one is named or the starting model has to be kept beside the trained one."""
    online = config.reference == "online" and not model.holds_its_start
    path = config.ref_model_name_or_path or (config.model_name_or_path if online else None)
    if path is None or config.reference == "none":
        return None
    lm = start.load_lm(config, path)
    attention.settle(config, lm)
    return StepModel(lm, value_head=False, backend=config.backend,
                     logits_budget_mb=config.logits_budget_mb)


def check_paths(config: SVPOConfig) -> None:
    for key in ("model_name_or_path", "train_file"):
        if not getattr(config, key):
            raise ConfigError(f"config: {key} is missing")
    for key in ("train_file", "eval_file"):
        path = getattr(config, key)
        if path and not tables.exists(path):
            raise ConfigError(f"config: {key}: there is no file {path}")
    for key in ("model_name_or_path", "ref_model_name_or_path", "tokenizer_name_or_path"):
        path = getattr(config, key)
        if path and (path.startswith((".", os.sep, "~")) or path.count("/") > 1) and not os.path.isdir(path):
            raise ConfigError(f"config: {key}: there is no directory {path}")


def check_wishes(config: SVPOConfig) -> None:
    """Packages that are asked for, data for evaluations, an explicit backend (it never falls back): said before the
    data are read and the model is loaded."""
    lack = packages.missing(config)
    if lack is None and not config.eval_file and str(config.eval_strategy.value) != "no":
        lack = f"eval_strategy = {config.eval_strategy.value} needs eval_file"
    if lack is not None:
        raise ConfigError(f"config: {lack}")
    try:
        dispatch.resolve("linear_step_logps", config.backend, torch.device(config.device.type), torch.float32)
    except RuntimeError as error:
        raise ConfigError(f"config: backend: {error}") from None


def run_training(config: SVPOConfig, *, lm: nn.Module | None = None,
                 tokenizer: PreTrainedTokenizerBase | None = None, console: Console | None = None,
                 summary: bool = True) -> RunResult:
    """Train as the configuration says. lm and tokenizer: given instead of loaded (then their names may be missing).
    summary: print the table of first and last metrics.

    Writes to output_dir: the model, checkpoints, metrics.jsonl, curves.png.
    """
    quiet()
    console = console or Console()
    main = config.process_index == 0

    def say(text: str) -> None:
        if main:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    if lm is None or tokenizer is None:
        check_paths(config)
    check_wishes(config)
    made_from = sources(config, lm)
    step = finished(config, made_from)
    if step is not None:
        say(f"finished: {config.output_dir} holds the model of this run after step {step}; nothing was touched")
        return RunResult(None, report.read_metrics(config.output_dir), {}, Path(config.output_dir) / report.CURVES)
    with owned(config.output_dir, main):
        result = _run(config, lm, tokenizer, console, say, summary)
        if main:
            write_finished(config, made_from, result.trainer.state.global_step)
    return result


def _run(config: SVPOConfig, lm: nn.Module | None, tokenizer: PreTrainedTokenizerBase | None, console: Console,
         say: Any, summary: bool) -> RunResult:
    start.check_quantised(config, lm)
    resume = where_to_resume(config, say)
    config.begin_on(begun_on(resume))
    transformers.set_seed(config.seed)
    tokenizer = load_tokenizer(config) if tokenizer is None else tokenizer
    train_data = load_data(config, config.train_file, tokenizer, say)
    eval_data = load_data(config, config.eval_file, tokenizer, say) if config.eval_file else None
    start.check_vocabulary(config, tokenizer, (train_data, eval_data), lm)
    model = build_model(config, lm, tokenizer, say)
    callbacks: list[Any] = [report.MetricsFile(config.output_dir)]
    bar = not config.disable_tqdm and sys.stderr.isatty()  # a log file would keep every redrawing of it
    trainer = SVPOTrainer(model, config, train_data, eval_data, tokenizer, reference_model(config, model),
                          callbacks + ([report.ProgressBar()] if bar else []), watch=report.watch if bar else None)
    for theirs in (transformers.ProgressCallback, transformers.PrinterCallback):
        trainer.remove_callback(theirs)
    say(describe(trainer))
    if resume:
        say(f"resuming from {resume}")
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate() if eval_data is not None else {}
    with writing(config.output_dir, config.output_dir):
        trainer.save_model()
    curves = None
    if config.process_index == 0:
        history = trainer.state.log_history
        curves = report.draw_curves(history, Path(config.output_dir) / report.CURVES, str(config.output_dir))
        if summary:
            console.print(report.summary_table(history, "svpo train"))
        say(f"model, {report.METRICS} and {report.CURVES} are in {config.output_dir}")
    return RunResult(trainer, trainer.state.log_history, metrics, curves)


def leave_group() -> None:
    """Leave the process group with nothing left that holds it: gloo else aborts a process at its exit, now and then."""
    gc.collect()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def describe(trainer: SVPOTrainer) -> str:
    """What a step is and how it is run, and what its packs save."""
    settings = trainer.settings
    unit = "pairs" if trainer.train_data.num_pairs else "trees"
    return (
        f"{len(trainer.planner)} optimizer steps an epoch, {settings.pairs_per_step} {unit} each, packing="
        f"{settings.packing}, max_tokens={settings.max_tokens}, preset={trainer.config.preset}, "
        f"{settings.world_size} process{'es' if settings.world_size > 1 else ''} on {trainer.args.device}\n"
        + savings(trainer)
    )


def savings(trainer: SVPOTrainer) -> str:
    """What the packs of the first optimizer step save, counted, and what bounds it."""
    batches = [pack["batch"] for pack in trainer.planner.packs(0, 0)]
    pairwise, distinct = (sum(batch[name] for batch in batches) for name in ("pairwise_tokens", "distinct_tokens"))
    padded = {"distinct": distinct, "pairs": pairwise} if trainer.settings.padded else {}
    tokens = padded.get(trainer.settings.packing, sum(batch.input_ids.numel() for batch in batches))
    data = trainer.train_data
    twice = " (forward twice: 4/3 of a pack's FLOPs a token)" if trainer.settings.packing == "stream" else ""
    trees = len({tree for batch in batches for tree in batch.node_of_step[:, 0].tolist()})
    what = f"{data.num_pairs / max(1, len(data.trees)):.1f} pairs" if data.num_pairs else "steps, no pairs,"
    return (f"the first step computes {tokens:,} tokens{twice}: {1 - tokens / max(1, pairwise):.1%} less than "
            f"pairwise, {1 - tokens / max(1, distinct):.1%} less than each distinct sequence once; sharing is within a "
            f"tree, and there are {what} a tree here ({trees} trees in this step)")
