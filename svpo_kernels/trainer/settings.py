"""The keys of a run that are ours, and how a file of settings is read.

Neither torch nor transformers is imported here: a wrong key is answered at once.
"""

import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import yaml

from . import keys


class ConfigError(ValueError):
    """A key or a value of the configuration is wrong; the message names it."""


def key(default: Any, help_text: str) -> Any:
    """A field of a class of settings."""
    return field(default=default, metadata={"help": help_text})


@dataclass
class Settings:
    """The keys that are ours. Lengths are tokens, gaps and values are on the mapped scale [-1, 1]."""

    # Model
    model_name_or_path: str | None = key(None, "The model to train: a directory or a hub name.")
    ref_model_name_or_path: str | None = key(None, "The reference model; default: the starting model itself.")
    tokenizer_name_or_path: str | None = key(None, "The tokenizer, where it is not beside the model.")
    dtype: str = key("float32", "Dtype the weights are loaded in: auto, float32, bfloat16, float16, float64.")
    attn_implementation: str | None = key("auto", "svpo_tree (packs without T x T), sdpa, eager, flex_attention "
                                           "(CUDA) or flash_attention_2 (no trees); auto: svpo_tree where exact and "
                                           "faster, else the model's own; null: the model's own.")
    trust_remote_code: bool = key(False, "Let the model's repository run its own code. Off unless asked.")
    disable_dropout: bool = key(True, "Set every dropout to 0, LoRA's included; packing is exact only then.")
    peft: str = key("none", "none, or lora: train low-rank adapters and keep the model frozen.")
    lora_r: int = key(16, "Rank of the adapters.")
    lora_alpha: float = key(32, "Scale of the adapters (alpha / r multiplies them).")
    lora_dropout: float = key(0.0, "Dropout of the adapters; set to 0 while disable_dropout is on.")
    lora_target_modules: str = key("all-linear", "Modules to adapt: all-linear, or names with commas between.")

    # Data
    train_file: str | None = key(None, "Step trees, pairs or process labels: a file, a folder or a hub dataset; `svpo "
                                  "data` shows it.")
    eval_file: str | None = key(None, "The same, for evaluation.")
    data_format: str | None = key(None, "Name of the file's format; default: detected from its keys.")
    value_range: list[float] | None = key(None, "Least and greatest value in the file, if not the format's own.")
    on_bad: str = key("skip", "A bad row is reported and skipped (skip) or ends the run (error).")
    step_separator: str = key("\n\n", "Text after every step.")
    step_end: str = key("", "Text that ends a step, before the separator; it is scored.")
    turn_end: str = key("auto", "What ends a terminal step: the chat template's own end (auto), eos, none, or a text.")
    turn_start: str = key("auto", "auto: the chat template's opening of an answer, scored with the first step; "
                           "generation: begin behind the generation prompt as it stands.")
    prompt_is_rendered: bool | None = key(None, "Text prompts have been through a chat template; null: looked for.")
    chat_template_kwargs: str | dict | None = key(None, "Arguments of the chat template, such as {enable_thinking: "
                                                   "false}; a row's own come on top.")
    template_date: str | None = key(None, "What the chat template's strftime_now says, YYYY-MM-DD; default: the day "
                                     "the run began, also when it is resumed.")
    max_path_tokens: int | None = key(None, "Longest path; what is longer is cut by a counted rule, see `svpo data`.")

    data_cache: str | None = key(None, "Folder in which encoded trees are kept for the next run and shared by the "
                                  "processes of a machine; default: svpo/ in output_dir; none: nowhere.")

    # Pairs
    pair_rule: str = key("all", "Pairs of siblings: best_worst, top_bottom or all.")
    min_gap: float = key(0.0, "A pair's values differ by more than this (values lie in [-1, 1]).")
    max_pairs: int | None = key(None, "At most this many pairs a tree, widest gaps first.")
    dedup: bool = key(True, "Siblings with equal texts count once.")
    same_kind: bool = key(True, "Never pair a step that ends the solution with one that does not.")
    pair_weight: str = key("pair", "What counts once: every pair, every parent, or every tree.")
    pairs_per_step: int = key(64, "Pairs of one optimizer step (trees, where no term is over pairs), over all "
                               "processes and micro-batches.")

    # Packing
    packing: str = key("auto", "auto: tree, distinct or stream, by the fewest FLOPs, counted and said; tree: shared "
                         "prefixes once; distinct: each sequence once; pairs: two a pair; stream: trees segment by "
                         "segment, for any architecture, in the memory of one path.")
    packing_fallback: str = key("none", "distinct: use packing=distinct if the model cannot be packed exactly.")
    max_tokens: str = key("auto", "Most tokens of a pack (one micro-batch); auto takes the cut with the fewest FLOPs "
                           "that the device's memory holds by count.")
    values: str | None = key(None, "Steps whose value is trained: those in pairs (pairs), their ancestors too (path), "
                              "or every labelled one (labelled); default: pairs, and labelled where no term is over "
                              "pairs.")

    # What is trained
    objective: str | None = key(None, "preference: svpo_loss on pairs and values; prm: a process reward model, a head "
                                 "at the step ends; implicit_prm: log-ratios to the reference as step rewards; policy: "
                                 "step_policy_loss on trees of rollouts. Default: preference; with preset dvo "
                                 "log-ratios are fitted to gains in value, with one of policy it is policy.")
    head: str = key("auto", "Head at the step ends: value (tanh), class (1 or 2 outputs), token (two rows of lm_head) "
                     "or none; auto: value where the loss reads values, class for prm.")
    head_outputs: int = key(2, "Outputs of a class head: 1 (sigmoid) or 2 (softmax, class 1 is good).")
    head_hidden_layer: bool = key(False, "A class head of Linear-ReLU-Linear instead of one layer.")
    good_token: str = key("+", "Token head: the token that says good.")
    bad_token: str = key("-", "Token head: the token that says bad.")
    label_threshold: float | None = key(None, "prm: labels in [0, 1] above this become 1, others 0; null: soft ones.")
    label_trials: bool = key(False, "prm: a label is k of n rollouts; n, the step's visits, weighs it.")
    good_weight: float = key(1.0, "prm: weight of good steps' losses against bad ones'.")

    # Loss: None takes the preset's value
    preset: str | None = key(None, "Named settings: svpo, step_dpo, mcts_dpo, rstar, alphamath, ipo, simpo or dvo; of "
                              "policy ppo, grpo, dr_grpo, dapo, gspo, gspo_token, cispo, sapo, spo, turn_ppo, treerpo, "
                              "vineppo or pav. Default: svpo, and treerpo with objective policy.")
    beta: float | None = key(None, "Strength of the preference against the reference.")
    preference: str | None = key(None, "sigmoid, ipo or hinge.")
    preference_weight: float | None = key(None, "Weight of the preference term.")
    label_smoothing: float | None = key(None, "Share of pairs taken to be labelled wrongly (sigmoid only).")
    visit_smoothing: bool = key(
        False, "Label smoothing of each pair by its visit counts, rejected / both: the source of mcts_dpo does so."
    )
    margin: float | None = key(None, "Margin subtracted from the scaled reward difference.")
    value_weight: float | None = key(None, "Weight of the squared error of the value head.")
    rank: str | None = key(None, "Ranking term on values: hinge, logistic or implicit.")
    rank_margin: float | None = key(None, "Margin of the ranking hinge.")
    rank_scale: float | None = key(None, "Scale of the implicit reward in rank=implicit.")
    rank_weight: float | None = key(None, "Weight of the ranking term.")
    sft_weight: float | None = key(None, "Weight of the log-likelihood of the SFT steps.")
    sft_nodes: str | None = key(None, "SFT steps: the chosen step of every pair (chosen), or every step with a value "
                                 "above 0 (good); default: chosen, and good where no term of the loss is over pairs.")
    # Policy gradients: None takes the preset's value
    policy_steps: str | None = key(None, "policy: a step is a node of the tree (nodes), or the whole path to a leaf "
                                    "(paths), as in GRPO.")
    advantage: str | None = key(None, "policy: advantage of a step, from values: group_mean, group_norm, rloo, gain "
                                 "or gae.")
    advantage_groups: str | None = key(None, "policy: what group_mean, group_norm and rloo compare: siblings, depth "
                                        "or tree.")
    gamma: float | None = key(None, "policy: discount of gae.")
    lam: float | None = key(None, "policy: decay of gae.")
    ratio: str | None = key(None, "policy: the ratio to the old policy, per token, per step (sum) or as a step's "
                             "geometric mean (step_mean).")
    kind: str | None = key(None, "policy: ppo, cispo or sapo.")
    clip: list[float] | None = key(None, "policy: bounds of the ratio below and above 1, [lo, hi].")
    dual_clip: float | None = key(None, "policy: largest loss of a negative advantage, over its size (above 1).")
    tau: list[float] | None = key(None, "policy: temperatures of sapo's gate, for positive and other advantages.")
    kl: str | None = key(None, "policy: estimate of the KL to the reference, k1, k2 or k3.")
    kl_weight: float | None = key(None, "policy: weight of the KL; 0: no reference is run.")
    entropy_weight: float | None = key(None, "policy: weight of the entropy bonus.")
    average: str | None = key(None, "policy: token_mean (every token of a tree once), sequence_mean, sequence_sum or "
                               "dr_grpo (means over paths).")
    longest: int | None = key(None, "policy: the constant length of dr_grpo; default: the longest path of the data.")
    reference: str | None = key(None, "Reference log-probs: computed once and cached (cache), per batch (online), or "
                                 "none. Default: the preset's, else cache.")
    logp_reduction: str | None = key(None, "A step's log-prob in the loss: the sum of its tokens', or their mean "
                                      "(length-normalised). Default: the preset's, else sum.")
    backend: str = key("auto", "Backend of the ops: auto, cuda, triton, cpu or reference.")
    logits_budget_mb: int = key(512, "MiB that the vocabulary head may use.")
    value_head_learning_rate: float | None = key(None, "Learning rate of the value head, if not the model's own.")

    # TrainingArguments with other defaults
    output_dir: str | None = key("svpo-output", "Where checkpoints, metrics and the report go.")
    learning_rate: float | None = key(None, "Learning rate at its peak. Default: 1e-6; for process rewards 1e-5 (1e-4 "
                                       "with adapters), and 0.2 / hidden size for a class head.")
    per_device_train_batch_size: int = key(1, "Always 1: a micro-batch is one pack; see pairs_per_step, max_tokens.")
    gradient_accumulation_steps: int = key(1, "Least number of packs each process makes of one optimizer step.")
    remove_unused_columns: bool = key(False, "Always false: a pack has no columns.")
    report_to: None | str | list[str] = key("none", "Trackers to log to; none by default, nothing leaves the machine.")
    logging_steps: float = key(1, "Log every so many optimizer steps.")
    logging_nan_inf_filter: bool = key(False, "Hide NaN losses from the log; off, so that they are seen.")
    disable_tqdm: bool | None = key(False, "No progress bar.")
    log_level: str = key("error", "Verbosity of transformers.")
    resume_from_checkpoint: str | None = key(
        "auto", "auto: the newest complete checkpoint of output_dir, if any; true: there must be one; false; or a path."
    )


def own_keys() -> list[tuple[str, str, str]]:
    """(key, default as YAML, help) of every key that is ours, in its order."""
    return [(entry.name, json.dumps(entry.default), entry.metadata["help"]) for entry in fields(Settings)]


def valid_keys() -> list[str]:
    """Every key that a configuration may hold."""
    return sorted({*(entry.name for entry in fields(Settings)), *keys.KNOWN})


def read_settings(path: str | os.PathLike | None, overrides: Sequence[str] = (), *, known: Sequence[str] | None = None,
                  **values: Any) -> dict[str, Any]:
    """What `path` (YAML, may be None) sets, then `values`, then `overrides` ("key=value"), in the types as written.

    known: the keys there are, None: those of a training run. Raises ConfigError that names the file, or for an unknown
    key the nearest valid one.
    """
    settings: dict[str, Any] = {}
    if path is not None:
        settings.update(_read_yaml(path))
    settings.update(values)
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign:
            raise ConfigError(f"config: an override must look like key=value, got {override!r}")
        settings[key.strip()] = _override_value(key.strip(), value)
    known = valid_keys() if known is None else known
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            where = f" in {path}" if path is not None else ""
            raise ConfigError(f"config: unknown key {key!r}{where}; did you mean {near[0]!r}?")
    return settings


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice in one mapping; YAML's own keeps the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise ConfigError(f"config: key {key.value!r} stands twice in {self.name}, on lines "
                                  f"{lines[key.value]} and {line}")
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def _read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, _UniqueKeys)
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config: {path} must hold `key: value` lines, got a {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _override_value(key: str, text: str) -> Any:
    """One value from the command line: null, {...} and [...] as in YAML, all else as text for the typed parser."""
    if text == "null":
        return None
    if text[:1] in "{[" and text:
        return yaml.safe_load(text)
    if key in ("step_separator", "step_end"):  # a shell hands over \n as two characters
        return text.replace("\\n", "\n").replace("\\t", "\t")
    return text
