"""FSDP2 through accelerate: how a StepModel is cut, gathered, filled and kept exact.

Every function that gathers or distributes is called by every process, in the order of the parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # parts of a parameter's name that wrappers add


def _is_fsdp_module(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def keep_exact(accelerator: Any) -> None:
    """Before accelerate cuts anything: outputs and reduced gradients stay in fp32.

    accelerate's policy for bf16 casts outputs too: a step's log-prob of -300 would be known to 2.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None,
                                                            reduce_dtype=torch.float32)


def shard(accelerator: Any, model: Any, trained: bool = True) -> None:
    """Cut a StepModel in place as `accelerator.prepare` does, without an optimizer: it is cut before references are
    taken, and the optimizer is made later, of the sharded parameters. The head is a group of its own."""
    from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    if _is_fsdp_module(model):
        return
    plugin = accelerator.state.fsdp_plugin
    asked = plugin.transformer_cls_names_to_wrap
    if plugin.auto_wrap_policy is None:  # no wrapping of layers
        plugin.auto_wrap_policy, names = transformer_auto_wrap_policy, []
    else:
        names = asked or model.layer_classes()
    if not trained:  # a reference of another architecture has other layers
        names = [name for name in names if name in model.layer_classes()] or model.layer_classes()
    plugin.transformer_cls_names_to_wrap = [*names, *model.head_classes()]
    plugin.set_auto_wrap_policy(model)
    if plugin.activation_checkpointing and trained:
        fsdp2_apply_ac(accelerator, model)
        plugin.activation_checkpointing = False  # `prepare` would wrap the wrapped layers again
    fsdp2_prepare_model(accelerator, model)
    plugin.transformer_cls_names_to_wrap = asked


def reshard(model: nn.Module) -> None:
    """Give back what a forward without a backward left whole: the root's group stays so until then."""
    for module in model.modules():
        if _is_fsdp_module(module):
            module.reshard()


# -- names and whole tensors ------------------------------------------------------------------------------------------


def parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """named_parameters by the names that they have without wrappers."""
    for name, parameter in module.named_parameters():
        yield _plain(name), parameter


def _plain(name: str) -> str:
    for part in WRAPPERS:
        name = name.replace(part, "")
    return name


def whole(tensor: Any) -> Any:
    """A sharded tensor gathered; anything else as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_state(model: nn.Module, keep: bool, wanted: Callable[[str], bool] = bool) -> dict[str, Tensor]:
    """The state dict of a sharded model, gathered tensor by tensor, on the CPU of the processes that keep it.

    wanted: which names; tied names share one tensor. The same names on every process.
    """
    gathered: dict[int, Tensor | None] = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not wanted(_plain(name)):
            continue
        if id(tensor) not in gathered:
            full = whole(tensor.detach())
            gathered[id(tensor)] = full.to("cpu", copy=True) if keep else None
        if keep:
            state[_plain(name)] = gathered[id(tensor)]
    return state


@torch.no_grad()
def fill(module: nn.Module, state: dict[str, Tensor] | None) -> None:
    """Copy whole tensors, which the first process holds (None elsewhere), into all sharded parameters named in them.

    Raises ValueError on every process for a name that is missing or strange.
    """
    from accelerate.utils import broadcast_object_list
    from torch.distributed.tensor import distribute_tensor

    reshard(module)
    own = dict(parameters(module))
    told = [None if state is None else [sorted(state.keys() - own.keys()), sorted(state.keys() & own.keys())]]
    broadcast_object_list(told)
    strange, names = told[0]
    if strange:
        raise ValueError(f"svpo train: the checkpoint holds weights that this model has not: {', '.join(strange[:5])}")
    for name in names:
        parameter = own[name]
        full = (torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device) if state is None
                else state[name].to(parameter.device, parameter.dtype))
        parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements))


# -- the optimizer ----------------------------------------------------------------------------------------------------


def whole_optimizer(optimizer: Any, keep: bool) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors, as a run without shards writes it."""
    state = optimizer.state_dict()
    entries = {}
    for index, entry in state["state"].items():
        full = {name: whole(value) if isinstance(value, Tensor) else value for name, value in entry.items()}
        if keep:
            entries[index] = {name: value.to("cpu", copy=True) if isinstance(value, Tensor) else value
                              for name, value in full.items()}
    return {"state": entries, "param_groups": state["param_groups"]}


def cut_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load what a run without shards (or `whole_optimizer`) wrote: each process cuts its part out of the file."""
    from torch.distributed.tensor import distribute_tensor

    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = [index for group in state["param_groups"] for index in group["params"]]
    if len(own) != len(order):
        raise ValueError(f"svpo train: the checkpoint's optimizer has {len(order)} parameters, this run's {len(own)}")
    parameter_of = dict(zip(order, own, strict=True))
    entries = {}
    for index, entry in state["state"].items():
        like = parameter_of[index]
        entries[index] = {
            name: distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
            if isinstance(value, Tensor) and value.shape == like.shape and value.dim() else value
            for name, value in entry.items()}
    optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})


def read_parts(model: nn.Module, optimizer: Any, directory: str) -> None:
    """Load what torch.distributed.checkpoint wrote, into an optimizer that is sharded or not: it cuts anew."""
    import torch.distributed.checkpoint as parts
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    parts.load(state, checkpoint_id=directory)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
