"""One of two processes that stream trees of unequal size under DDP: stream_worker.py OUT; the first writes what it has.

Each is compared with a process that runs both batches on its own, and DDP's no_sync() with two calls in place of one.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from streams import build, difference, pack, taken_gradients
from torch.nn.parallel import DistributedDataParallel

import svpo_kernels as sk
from svpo_kernels.trees.segments import segments

SIZES = [((3, 2), (1, 3)), ((1, 2),)]  # a process with many segments, and one with few


def loss(out):
    return out.logps.sum().square() / 1e3 + (out.heads["v"].square().sum() if "v" in out.heads else 0.0)


def run():
    rank = dist.get_rank()
    batches = [pack(sizes)[1] for sizes in SIZES]
    torch.manual_seed(3)
    head = torch.nn.Linear(32, 1).double()
    none = torch.zeros(0, dtype=torch.int64)

    def heads(of, module):  # only the first process reads values
        return {"v": (module, batches[of].value_positions if of == 0 else none)}

    alone = build("gpt2")
    for of in (0, 1):
        sk.stream_backward(alone, batches[of], loss, heads=heads(of, head), loss_scale=0.5)
    expected = taken_gradients(alone, head)
    model = DistributedDataParallel(build("gpt2"))
    wrapped = DistributedDataParallel(head)
    sk.stream_backward(model, batches[rank], loss, heads=heads(rank, wrapped))
    once = taken_gradients(model.module, head)
    with model.no_sync():
        sk.stream_backward(model, batches[rank], loss, heads=heads(rank, wrapped))
    local = {name: grad.clone() for name, grad in taken_gradients(model.module, head).items()}
    with model.no_sync():
        sk.stream_backward(model, batches[rank], loss, heads=heads(rank, wrapped), loss_scale=0.25)
    sk.stream_backward(model, batches[rank], loss, heads=heads(rank, wrapped), loss_scale=0.75)
    twice = taken_gradients(model.module, head)
    frozen = build("gpt2").requires_grad_(False)  # DDP takes no model without gradients: the head brings it
    sk.stream_backward(frozen, batches[rank], loss, heads=heads(rank, wrapped))
    heads_only = taken_gradients(frozen, head)
    model.register_comm_hook(None, lambda state, bucket: None)
    try:
        sk.stream_backward(model, batches[rank], loss)
        hook = "accepted"
    except ValueError as error:
        hook = str(error)
    return {"once": difference(once, expected), "twice": difference(twice, expected), "hook": hook,
            "heads only": difference(heads_only, {name: expected[name] for name in heads_only}),
            "local": difference({name: local.get(name, torch.zeros_like(x)) for name, x in expected.items()}, expected),
            "segments": [len(segments("test", batch)) for batch in batches]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = [None, None]
    dist.all_gather_object(found, run())
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
