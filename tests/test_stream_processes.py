"""Streaming under DDP: two gloo processes with unequal numbers of segments equal one; sharded models are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from streams import build, pack, taken_gradients
from test_distributed import launch
from tiny_models import one_thread  # noqa: F401

import svpo_kernels as sk


def test_two_processes_equal_one(tmp_path):
    launch(2, "stream_worker.py", tmp_path / "out.pt")
    for found in torch.load(tmp_path / "out.pt", weights_only=True):
        assert found["segments"][0] > 3 * found["segments"][1]
        assert found["once"] <= 1e-12 and found["twice"] <= 1e-12 and found["heads only"] <= 1e-12
        assert found["local"] > 0.1  # inside no_sync() nothing meets
        assert "without a communication hook" in found["hook"]


def test_sharded_parameters_are_refused_by_name():
    _, batch = pack()
    model = build("llama")
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.ds_status = SimpleNamespace(name="NOT_AVAILABLE")
    with pytest.raises(ValueError, match="whole on every process.*q_proj.weight, partitioned by ZeRO-3"):
        sk.stream_backward(model, batch, lambda out: out.logps.sum())
    weight.ds_status = SimpleNamespace(name="AVAILABLE")  # gathered
    sk.stream_backward(model, batch, lambda out: out.logps.sum())
    assert taken_gradients(model)


def test_fsdp_is_refused_by_name(tmp_path):
    """Both FSDPs gather in every forward, and processes run different numbers of them."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    _, batch = pack()
    model = build("llama")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model.model.layers[0], mesh=dist.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="whole on every process.*model.layers.0"):
            sk.stream_backward(model, batch, lambda out: out.logps.sum())
    finally:
        dist.destroy_process_group()
