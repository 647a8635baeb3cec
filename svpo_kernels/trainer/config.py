"""Configuration of a training run: a dataclass on `transformers.TrainingArguments`, read from YAML and `key=value`.

Every argument of `svpo_loss` and every field of `TrainingArguments` is a key. A key of the loss that is left out
takes the preset's value, and if the preset does not set it, `svpo_loss`'s own default.
"""

import datetime
import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from . import keys, packages, policy
from .presets import DEFAULTS, PRESETS, SETTINGS
from .settings import ConfigError, Settings, read_settings

LOGIT_STEP = 0.2  # by how much a fresh class head's logits move in a step, see head_learning_rate
LOSS_KEYS = (
    "beta",
    "preference",
    "preference_weight",
    "label_smoothing",
    "margin",
    "value_weight",
    "rank",
    "rank_margin",
    "rank_scale",
    "rank_weight",
    "sft_weight",
)

CHOICES = {
    "pair_rule": ("best_worst", "top_bottom", "all"),
    "pair_weight": ("pair", "parent", "tree"),
    "packing": ("auto", "tree", "distinct", "pairs", "stream"),
    "packing_fallback": ("none", "distinct"),
    "values": (None, "pairs", "path", "labelled"),
    "turn_start": ("auto", "generation"),
    "objective": (None, "preference", "prm", "implicit_prm", "policy"),
    **policy.CHOICES,
    "head": ("auto", "none", "value", "class", "token"),
    "sft_nodes": (None, "chosen", "good"),
    "reference": (None, "cache", "online", "none"),
    "logp_reduction": (None, "sum", "mean"),
    "peft": ("none", "lora"),
    "dtype": ("auto", "float32", "bfloat16", "float16", "float64"),
    "on_bad": ("skip", "error"),
    "backend": ("auto", "cuda", "triton", "cpu", "reference"),
}


@dataclass
class SVPOConfig(Settings, TrainingArguments):
    """All settings of `svpo train`: our keys, and every field of TrainingArguments."""

    def __post_init__(self):
        plain = (str, int, float, bool, list, dict)
        self._given = {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if entry.init and entry.name != "hub_token" and isinstance(getattr(self, entry.name), plain)
            and (entry.default is not MISSING and getattr(self, entry.name) != entry.default)
        }
        self._check_keys()
        self._check_choices()
        self._check_trained()
        self._check_objective()
        self._check_text()
        self.max_tokens = _max_tokens(self.max_tokens)
        if self.value_range is not None and len(self.value_range) != 2:
            raise ConfigError(f"config: value_range must be [least, greatest], got {self.value_range}")
        if self.resume_from_checkpoint is None:
            self.resume_from_checkpoint = "false"
        self.resume_from_checkpoint = str(self.resume_from_checkpoint)
        if self.resume_from_checkpoint.lower() in ("auto", "true", "false"):
            self.resume_from_checkpoint = self.resume_from_checkpoint.lower()
        super().__post_init__()
        if self.fp16 and self.device.type == "cpu":
            raise ConfigError("config: fp16 needs a GPU; on a CPU set bf16=true or dtype")

    def _check_keys(self) -> None:
        """Keys of TrainingArguments that cannot do what they say here, before Hugging Face rewrites any of them."""
        objection = keys.objection(self)
        if objection is not None:
            raise ConfigError(f"config: {objection}")
        if self.deepspeed and not packages.installed("deepspeed"):  # imported already while settings are read
            raise ConfigError(f"config: {packages.missing(self)}")

    def _check_text(self) -> None:
        if isinstance(self.chat_template_kwargs, str):
            try:
                self.chat_template_kwargs = yaml.safe_load(self.chat_template_kwargs)
            except yaml.YAMLError as error:
                raise ConfigError(f"config: chat_template_kwargs is no mapping: {error}") from None
        if not isinstance(self.chat_template_kwargs, (dict, type(None))):
            raise ConfigError(f"config: chat_template_kwargs must be a mapping, got {self.chat_template_kwargs!r}")
        try:
            self.text_options()
        except ValueError:
            raise ConfigError(f"config: template_date must be YYYY-MM-DD, got {self.template_date!r}") from None

    def _check_choices(self) -> None:
        for key, allowed in CHOICES.items():
            if getattr(self, key) not in allowed:
                names = ", ".join(word for word in allowed if word is not None)
                raise ConfigError(f"config: {key} must be one of {names}, got {getattr(self, key)!r}")
        for key in ("pairs_per_step", "gradient_accumulation_steps", "logits_budget_mb", "max_path_tokens"):
            if getattr(self, key) is not None and int(getattr(self, key)) < 1:
                raise ConfigError(f"config: {key} must be at least 1, got {getattr(self, key)}")
        if not self.min_gap >= 0:
            raise ConfigError(f"config: min_gap must be at least 0, got {self.min_gap}")
        if self.max_pairs is not None and self.max_pairs < 0:
            raise ConfigError(f"config: max_pairs must be at least 0 or null, got {self.max_pairs}")
        self._check_preset()
        for key, default in DEFAULTS.items():
            if getattr(self, key) is None:
                setattr(self, key, SETTINGS.get(self.preset, {}).get(key, default))
        if self.preset == "dvo" and self.objective != "dvo":
            raise ConfigError(f"config: objective must be left out with preset dvo, got {self.objective!r}")
        self._check_policy()
        if self.logp_reduction == "mean" and self.objective in ("prm", "implicit_prm", "policy"):
            raise ConfigError(f"config: logp_reduction must be sum with objective {self.objective}, got 'mean'")
        self._check_loss()

    def _check_preset(self) -> None:
        """The preset is one of its objective's; without an objective it says which."""
        if self.preset is None:
            self.preset = policy.DEFAULT_PRESET if self.objective == "policy" else "svpo"
        if self.preset in policy.PRESETS and self.objective is None:
            self.objective = "policy"
        names = policy.PRESETS if self.objective == "policy" else PRESETS
        if self.preset in policy.PRESETS and names is PRESETS:
            raise ConfigError(f"config: objective must be policy with preset {self.preset}, got {self.objective!r}")
        if self.preset not in names:
            also = f" (objective policy: {', '.join(policy.PRESETS)})" if names is PRESETS else " with objective policy"
            raise ConfigError(f"config: preset must be one of {', '.join(names)}{also}, got {self.preset!r}")

    def _check_policy(self) -> None:
        """The policy's keys take their preset's values; keys of another objective's loss are refused."""
        policies = self.objective == "policy"
        for key in (LOSS_KEYS if policies else policy.KEYS):
            if getattr(self, key) is not None:
                other = "preference" if policies else "policy"
                raise ConfigError(f"config: {key} is read by objective {other} only, got {getattr(self, key)!r} with "
                                  f"objective {self.objective}")
        if policies:
            policy.fill_in(self)
            if self.reference == "none" and self.kl_weight:
                raise ConfigError(f"config: reference must be cache or online with kl_weight {self.kl_weight:g}, got "
                                  "'none'")

    def _check_loss(self) -> None:
        """One call on one pair: what svpo_loss refuses ends the run here, before model, data and references."""
        if self.objective == "policy":
            try:
                policy.check(self)
            except (ValueError, TypeError) as error:
                raise ConfigError(f"config: {str(error).partition(': ')[2]}") from None
            return
        import torch

        from svpo_kernels.step_loss import svpo_loss

        two = torch.zeros(2)
        try:
            svpo_loss(two, torch.tensor([[0, 1]]), reference_free=True, values=two, value_targets=two,
                      sft_steps=torch.tensor([0]), **self.loss_arguments())
        except (ValueError, TypeError) as error:
            raise ConfigError(f"config: {str(error).removeprefix('svpo_loss: ')}") from None

    def _check_trained(self) -> None:
        """Some term has a weight; where none is over pairs, values and SFT steps are those of whole trees."""
        if not any(self.weight(term) for term in ("preference", "rank", "value", "sft")):
            raise ConfigError("config: nothing would be trained: preference_weight, rank_weight, value_weight and "
                              f"sft_weight are all 0 with preset {self.preset}")
        for key, term, whole in (("values", "value", "labelled"), ("sft_nodes", "sft", "good")):
            pairless = self.weight(term) and not self.reads_pairs()
            if getattr(self, key) is None:
                setattr(self, key, whole if pairless else next(word for word in CHOICES[key] if word))
            elif pairless and getattr(self, key) != whole:
                raise ConfigError(f"config: {key} must be {whole}, got {getattr(self, key)!r}: with preset "
                                  f"{self.preset} no term is over pairs (preference_weight and rank_weight are 0)")

    def _check_objective(self) -> None:
        """The head that `auto` means; heads and keys that the objective has no use for are refused."""
        reads_values = self.weight("value") > 0 or self.weight("rank") > 0
        natural = {"prm": "class", "implicit_prm": "none", "dvo": "none", "policy": "none"}.get(
            self.objective, "value" if reads_values else "none")
        if self.head == "auto":
            self.head = natural
        fits = {"prm": ("class", "token")}.get(self.objective, (natural,))
        if self.head not in fits:
            raise ConfigError(f"config: head must be {' or '.join(fits)} with objective {self.objective}, got "
                              f"{self.head!r}")
        if self.head_outputs not in (1, 2):
            raise ConfigError(f"config: head_outputs must be 1 or 2, got {self.head_outputs}")
        if not 0 < self.good_weight < float("inf"):
            raise ConfigError(f"config: good_weight must be above 0, got {self.good_weight}")
        if self.label_threshold is not None and not 0 <= self.label_threshold < 1:
            raise ConfigError(f"config: label_threshold must be in [0, 1), got {self.label_threshold}")
        self._check_learning_rate()
        if self.objective == "implicit_prm" and self.reference == "none":
            raise ConfigError("config: reference must be cache or online with objective implicit_prm, got 'none'")

    def _check_learning_rate(self) -> None:
        """A preference moves a trained model a little; a process reward model learns something new, with a fresh head
        that starts from nothing: `head_learning_rate`."""
        self._head_by_size = self.learning_rate is None and self.head == "class"
        if self.learning_rate is None:
            rewards = self.objective in ("prm", "implicit_prm")
            self.learning_rate = 1e-6 if not rewards else 1e-4 if self.peft == "lora" else 1e-5

    def head_learning_rate(self, hidden_size: int) -> float | None:
        """The head's own learning rate, None where it has the model's. Where neither is set, a class head's logits move
        by about LOGIT_STEP a step: Adam moves each of hidden_size weights by the rate."""
        if self.value_head_learning_rate is not None or not self._head_by_size:
            return self.value_head_learning_rate
        return max(self.learning_rate, LOGIT_STEP / hidden_size)

    def weight(self, term: str) -> float:
        """The weight of a term of the loss: preference, value, rank or sft. A PRM has labels ("value") alone."""
        if self.objective != "preference":
            return float(term == "value")
        return self.loss_arguments().get(f"{term}_weight", 0.0 if term == "sft" else 1.0)

    def reads_pairs(self) -> bool:
        """Whether any term of the loss is over pairs."""
        return self.weight("preference") != 0 or self.weight("rank") != 0

    def loss_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `svpo_loss` (for a policy: of `step_policy_loss`): the preset's, with the keys that were
        set in this configuration on top."""
        if self.objective == "policy":
            return policy.loss_arguments(self)
        explicit = {key: getattr(self, key) for key in LOSS_KEYS if getattr(self, key) is not None}
        return {**PRESETS[self.preset], **explicit}

    def text_options(self) -> dict[str, Any]:
        """How text becomes ids: the fields of `trees.text.TextOptions`."""
        date = None if self.template_date is None else datetime.date.fromisoformat(self.template_date)
        return {"step_separator": self.step_separator, "step_end": self.step_end, "turn_end": self.turn_end,
                "turn_start": self.turn_start, "prompt_is_rendered": self.prompt_is_rendered,
                "chat_template_kwargs": self.chat_template_kwargs or {}, "template_date": date}

    def begin_on(self, date: str) -> None:
        """Fix the day that the chat template says, where the configuration does not name one."""
        if self.template_date is None:
            self.template_date = self._given["template_date"] = date

    def explicit(self) -> dict[str, Any]:
        """The keys that were set, as plain YAML values: what has to be kept to repeat the run. Never a token."""
        return dict(self._given)


def _max_tokens(value: int | str) -> int | str:
    """max_tokens as an int, or the word auto."""
    if value == "auto":
        return value
    try:
        tokens = int(value)
    except ValueError:
        raise ConfigError(f"config: max_tokens must be a number of tokens or auto, got {value!r}") from None
    if tokens < 1:
        raise ConfigError(f"config: max_tokens must be at least 1, got {tokens}")
    return tokens


class _Parser(HfArgumentParser):
    """HfArgumentParser for its typed conversions only; it raises instead of ending the process."""

    def error(self, message: str) -> None:
        raise ConfigError(message)


def load_config(path: str | os.PathLike | None, overrides: Sequence[str] = (), **values: Any) -> SVPOConfig:
    """Read `path` (YAML, may be None), apply `values`, then `overrides` ("key=value"), and check every key and value.

    Raises ConfigError that names the key and, for an unknown one, the nearest valid key.
    """
    return SVPOConfig(**_typed(read_settings(path, overrides, **values)))


def _typed(settings: dict[str, Any]) -> dict[str, Any]:
    """Values converted to their fields' types by HfArgumentParser; None and dicts pass through."""
    parser = _Parser(SVPOConfig)
    typed = {}
    for key, value in settings.items():
        if key == "fsdp" and str(value).lower() in ("true", "false"):  # a string field that holds a bool since 5.20
            value = str(value).lower() == "true"
        if key == "template_date" and isinstance(value, datetime.date):  # YAML makes a date of it
            value = value.isoformat()
        if value is None or isinstance(value, dict) or (key == "fsdp" and isinstance(value, bool)):
            typed[key] = value
            continue
        words = [f"--{key}={value}"]
        if isinstance(value, (list, tuple)):
            words = [f"--{key}", *map(str, value)]
        try:
            typed[key] = getattr(parser.parse_args(words), key)
        except ConfigError as error:
            what = str(error).partition(": ")[2] or str(error)  # argparse begins with the option's names
            raise ConfigError(f"config: {key}: {what}") from None
    return typed
