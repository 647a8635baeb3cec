"""One process of a data-parallel run, under torch.distributed.run: distributed_worker.py OUT.pt [key=value ...]."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from training_ import make_trainer, unequal_data


def main(out, *settings):
    torch.set_num_threads(1)
    data = unequal_data(references=False)
    held_out = unequal_data(((2, 2), (1, 3)), references=False)
    options = {key: json.loads(value) for key, value in (setting.split("=", 1) for setting in settings)}
    trainer = make_trainer(Path(out).parent / "run", data=data, eval_data=held_out, **options)
    share = trainer.planner.share(0, 0, trainer.args.process_index)
    trainer.train()
    evaluated = trainer.evaluate()
    packs = [pack["batch"].input_ids.numel() for pack in share["packs"]]
    all_packs = trainer._gather_objects(packs)
    if trainer.args.process_index == 0:
        references = [node.ref_logp for tree in data.trees for node in tree.nodes if node.ref_logp is not None]
        torch.save({"logs": trainer.state.log_history, "gradients": trainer.gradients.steps, "eval": evaluated,
                    "packs": all_packs, "world_size": trainer.args.world_size,
                    "references": references}, out)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
