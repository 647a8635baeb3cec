"""The model as the trainer sees it: step log-probs and step values of a pack, full logits never made.

Hidden states, `linear_step_logps` and the value head run inside one `forward`, so that FSDP and ZeRO-3 gather the
vocabulary head there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from svpo_kernels.linear_step_logps import linear_step_logps
from svpo_kernels.models import decoder, head, is_peft, output_layer
from svpo_kernels.trees.packing import StepBatch

from . import attention, head_files, start
from .heads import NO_SOFTCAP, TokenHead, ValueHead, make_head
from .streaming import StreamedPack


class Sealed:
    """A call that no wrapper looks into: FSDP would cast floating inputs, and make a plain dict of a StepBatch."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call


class StepModel(nn.Module):
    """A causal language model, with or without adapters, and an optional head at the step ends.

    lm: a Hugging Face causal LM or a PEFT model of one. value_head: add a fresh one; or a head of `heads.py`. backend
    and logits_budget_mb go to the ops. Raises ValueError for a vocabulary head that `linear_step_logps` cannot take
    over.
    """

    def __init__(self, lm: nn.Module, value_head: bool | nn.Module = True, *, backend: str = "auto",
                 logits_budget_mb: int = 512):
        super().__init__()
        self.lm = lm
        self.starts_adapted = False  # whether the adapters belong to the starting model: base + adapter is it
        self.backend, self.logits_budget_mb = backend, logits_budget_mb
        if value_head is True:
            value_head = ValueHead(self.config.get_text_config().hidden_size, head_dtype(lm))
        self.v_head = value_head or None
        parts = head(self.causal_lm)  # refused here, before anything is read or trained
        if isinstance(self.v_head, TokenHead) and parts["softcap"]:
            raise ValueError(NO_SOFTCAP)

    @property
    def causal_lm(self) -> nn.Module:
        """The Hugging Face model itself, below PEFT."""
        return self.lm.get_base_model() if is_peft(self.lm) else self.lm

    @property
    def config(self) -> Any:
        return self.causal_lm.config

    @property
    def generation_config(self) -> Any:
        return getattr(self.causal_lm, "generation_config", None)

    @property
    def _no_split_modules(self) -> Any:  # FSDP's automatic wrapping asks for it
        return [*self.layer_classes(), *self.head_classes()]

    def layer_classes(self) -> list[str]:
        """Classes of the model's layers, each a group of sharded parameters."""
        return list(self.causal_lm._no_split_modules or ())

    def head_classes(self) -> list[str]:
        """The class of a head with weights, a group of its own: its dtype is another than the model's."""
        return [type(self.v_head).__name__] if self.v_head is not None and self.v_head.state_dict() else []

    @property
    def _keys_to_ignore_on_save(self) -> Any:
        return getattr(self.causal_lm, "_keys_to_ignore_on_save", None)

    @property
    def is_tied(self) -> bool:
        """Whether the vocabulary head is the embedding itself."""
        embedding, layer = self.causal_lm.get_input_embeddings(), self.causal_lm.get_output_embeddings()
        return embedding is not None and layer is not None and embedding.weight is layer.weight

    def get_input_embeddings(self) -> nn.Module | None:
        """What FSDP may shard apart: not an embedding that the head, which no module's forward reads, is tied to."""
        return None if self.is_tied else self.causal_lm.get_input_embeddings()

    def tie_weights(self, *args: Any, **options: Any) -> None:
        """FSDP ties again what it moved."""
        self.causal_lm.tie_weights(*args, **options)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return super().__call__(Sealed(lambda: type(self).forward(self, *args, **options)))

    def inside(self, act: Callable[[], Any]) -> Any:
        """act() inside the forward, where sharded weights of the head, the norm and the embedding are whole."""
        return super().__call__(Sealed(act))

    def activation_checkpointing_enable(self, **options: Any) -> None:
        self.causal_lm.activation_checkpointing_enable(**options)
        self._let_checkpoints_see_gradients()

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.causal_lm.gradient_checkpointing_enable(**options)
        self._let_checkpoints_see_gradients()

    def _let_checkpoints_see_gradients(self) -> None:
        if is_peft(self.lm):  # frozen embeddings would cut the graph of reentrant checkpointing
            self.causal_lm.enable_input_require_grads()

    def hidden_states(self, batch: StepBatch) -> Tensor:
        """(1, T, D) or (B, L, D): the last hidden states, as the vocabulary head takes them."""
        inputs = batch.model_inputs(self.causal_lm)
        return decoder(self.causal_lm)(**inputs, use_cache=False).last_hidden_state

    def step_logps(self, hidden: Tensor, batch: StepBatch, **asked: Any) -> Any:
        """(S,); asked: reduction and stats of `linear_step_logps`."""
        return linear_step_logps(
            hidden,
            labels=batch.plan,
            backend=self.backend,
            logits_budget_mb=self.logits_budget_mb,
            **head(self.causal_lm),
            **asked,
        )

    def forward(self, batch: StepBatch | Sealed, want_logps: bool = True, labels: Tensor | None = None,
                reduction: str = "sum", stats: tuple[str, ...] = ()) -> Any:
        """step_logps (S,) if wanted, or (N,) with reduction "none"; entropy (N,) if in stats; values (S,) of the head,
        and with labels (S,) its step_losses (S,); else None.

        A batch that is streamed is run so, without gradients; with them it is `StreamingMixin.stream_step`'s.
        """
        if isinstance(batch, Sealed):
            return batch.call()
        if batch.get("streamed"):
            return StreamedPack(self, batch, want_logps, labels, reduction, stats).forward()
        hidden = self.hidden_states(batch)
        logps = self.step_logps(hidden, batch, reduction=reduction, stats=stats) if want_logps else None
        logps, found = logps if stats and want_logps else (logps, {})
        values = losses = None
        if self.v_head is not None:
            own = {}
            if isinstance(self.v_head, TokenHead):
                own = {"lm_head": head(self.causal_lm)}
            values, losses = self.v_head(hidden, batch.value_positions, labels, backend=self.backend, **own)
        return {"step_logps": logps, "values": values, "step_losses": losses, "entropy": found.get("entropy")}

    @property
    def holds_its_start(self) -> bool:
        """Whether the starting model is there at any time: the model with its fresh adapters off."""
        return is_peft(self.lm) and not self.starts_adapted

    @contextlib.contextmanager
    def adapters_off(self) -> Iterator[None]:
        """The starting model: fresh adapters disabled. Without any it is the model itself, before training only."""
        with self.lm.disable_adapter() if self.holds_its_start else contextlib.nullcontext():
            yield


@torch.no_grad()
def check_head(model: StepModel) -> None:
    """Compare the log-probs of our head with the model's own logits on a few tokens.

    Raises ValueError with the difference if the model does something to its logits that the head does not repeat.
    """
    lm = model.causal_lm
    layer, parts = output_layer(lm), head(lm)
    vocabulary = min(layer.weight.shape[0], lm.get_input_embeddings().weight.shape[0])
    tokens = torch.arange(1, 9, device=layer.weight.device)[None] * 7 % vocabulary
    training, caching = model.training, getattr(lm.config, "use_cache", None)
    model.eval()
    theirs = lm(input_ids=tokens, use_cache=False).logits.double().log_softmax(-1)
    logits = layer(decoder(lm)(input_ids=tokens, use_cache=False).last_hidden_state).double()
    softcap, logits = parts["softcap"], logits * parts["logit_scale"]
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    ours = (logits / parts["temperature"]).log_softmax(-1)
    model.train(training)
    lm.config.use_cache = caching
    error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    if not error <= 8 * torch.finfo(layer.weight.dtype).eps * max(scale, 1.0):
        raise ValueError(
            f"StepModel: the vocabulary head of {type(lm).__name__} cannot be repeated: log-probs differ by "
            f"{error:.3g} from the model's own; it changes its logits by more than a softcap or a constant factor"
        )


def disable_dropout(model: nn.Module) -> int:
    """Set every dropout of a model to 0, adapters' and attention's included. Returns how many were on."""
    count = 0
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)) and module.p > 0:
            module.p = 0.0
            count += 1
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float) and value > 0:
                setattr(module, name, 0.0)
                count += 1
    return count


def add_adapters(config: Any, lm: nn.Module) -> nn.Module:
    """The model with fresh LoRA adapters, everything else frozen."""
    from peft import LoraConfig, get_peft_model

    targets: str | list[str] = config.lora_target_modules
    if targets != "all-linear":
        targets = [name.strip() for name in targets.split(",") if name.strip()]
    options = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0 if config.disable_dropout else config.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(lm, options)


def head_dtype(lm: nn.Module) -> torch.dtype:
    """fp32 beside any model but one in fp64."""
    return torch.promote_types(next(p.dtype for p in lm.parameters() if p.is_floating_point()), torch.float32)


def build_model(config: Any, lm: nn.Module | None = None, tokenizer: Any = None, say: Any = print) -> StepModel:
    """The model of a run: loaded (unless given), with adapters and head as asked and found, dropout off, head checked.

    say: is told in a line what was taken up from disk.
    """
    given = lm is not None
    lm = start.load_lm(config, config.model_name_or_path, train=True) if lm is None else lm
    start.check_quantised(config, lm)
    start.keep_training_layout(lm)
    goes_on = is_peft(lm) and not given
    if config.peft == "lora" and not is_peft(lm):
        lm = add_adapters(config, lm)
    if config.disable_dropout:
        disable_dropout(lm)
    say(attention.settle(config, lm))
    size = lm.config.get_text_config().hidden_size
    model = StepModel(lm, make_head(config, size, head_dtype(lm), tokenizer) or False, backend=config.backend,
                      logits_budget_mb=config.logits_budget_mb)
    model.starts_adapted = goes_on
    if goes_on:
        say(f"{config.model_name_or_path} holds an adapter: it trains on; base + adapter is the reference")
    if not given:
        take_up_head(config, model, say)
    if not any(hasattr(parameter, "ds_id") for parameter in lm.parameters()):  # ZeRO-3 has cut the weights already
        check_head(model)
    return model


def take_up_head(config: Any, model: StepModel, say: Any) -> None:
    """Load the head that lies beside the starting model, where the run has one; say what was or was not taken up."""
    found = head_files.read(config.model_name_or_path)
    if found is None:
        return
    if model.v_head is None or not model.v_head.state_dict():
        say(f"the head in {found.where} is not trained by this run and will not be saved")
        return
    head_files.load_into(model.v_head, found)
    said = "" if found.activation else f"; its activation is not said: {model.v_head.activation} is taken"
    say(f"the {model.v_head.kind} head starts from {found.where}{said}")
