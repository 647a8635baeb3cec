"""One of two processes: StepModel under FSDP2, the vocabulary head sharded, against the unsharded model."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from training_ import relative_error, small_lm, unequal_data

from svpo_kernels import pack_trees, svpo_loss
from svpo_kernels.trainer import StepModel


def gradients(model, batch):
    """By name, whole: of the loss summed over both processes, each of which runs the same batch."""
    out = model(batch)
    svpo_loss(out["step_logps"], batch.pairs, batch.ref_step_logps, values=out["values"],
              value_targets=batch.value_targets).loss.backward()
    return {name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            for name, p in model.named_parameters()}


def build():
    model = StepModel(small_lm())
    torch.manual_seed(1)
    torch.nn.init.normal_(model.v_head.summary.weight, std=0.1)
    return model


def main(out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    data = unequal_data()
    batch = pack_trees(data.trees, data.pairs, max_tokens=4096)[0]
    expected = gradients(build(), batch)
    sharded = build()
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in sharded.lm.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    head = sharded.lm.lm_head.weight
    found = gradients(sharded, batch)
    if dist.get_rank() == 0:
        torch.save({"error": relative_error(found, expected), "local": tuple(head.to_local().shape),
                    "whole": tuple(head.shape)}, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
