"""One process of a data-parallel run: distributed_worker.py OUT JSON ..., a training each, into OUT0.pt, OUT1.pt ..."""

from __future__ import annotations

import json
import sys

import torch
from accelerate.utils import gather_object
from training_ import make_trainer, policy_data, unequal_data

from svpo_kernels.trainer.run import leave_group


def run(out, settings):
    if settings.get("objective") == "policy":  # old log-probs and references by token, both computed
        sizes = ((2, 3), (1, 2), (3, 2), (1, 4)), ((2, 2),)
        data, held_out = (policy_data(out, each, **settings) for each in sizes)
    else:
        data, held_out = unequal_data(references=False), unequal_data(((2, 2), (1, 3)), references=False)
    trainer = make_trainer(out + "-run", data=data, eval_data=held_out, **settings)
    share = trainer.planner.share(0, 0, trainer.args.process_index)
    trainer.train()
    evaluated = trainer.evaluate()
    packs = gather_object([[pack["batch"].input_ids.numel() for pack in share["packs"]]])
    if trainer.args.process_index == 0:
        if data.rollouts is None:
            references = [node.ref_logp for tree in data.trees for node in tree.nodes if node.ref_logp is not None]
        else:
            old = data.rollouts.old
            references = [x for t, nodes in enumerate(old.referenced()) for i in nodes.tolist()
                          for x in old.reference(t, i).tolist()]
        torch.save({"logs": trainer.state.log_history, "gradients": trainer.gradients.steps, "eval": evaluated,
                    "packs": packs, "world_size": trainer.args.world_size, "references": references}, out + ".pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for place, text in enumerate(sys.argv[2:]):
        run(sys.argv[1] + str(place), json.loads(text))
    leave_group()
