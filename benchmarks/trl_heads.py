"""TRL's DPO and GRPO with its own head and with ours: time, peak memory, equality -> benchmarks/results/trl.json

    python benchmarks/trl_heads.py          # about a minute on 2 cores

A process, trainer, model and batch a case (nothing is cached from another); the switch goes on and off between runs,
so that both take the same steps in turn.
Medians of loss + backward; the peak is resident memory above that before the first step.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers as hf
import trl

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]
import trl_cases as cases  # noqa: E402

from svpo_kernels.bench.machine import describe  # noqa: E402
from svpo_kernels.integrations.trl import use_fused_head  # noqa: E402

B, L, D, RUNS = 4, 64, 256, 2


def model(V: int) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(
        **cases.SIZES | dict(vocab_size=V, hidden_size=D, intermediate_size=512, head_dim=64)))


def inputs(kind: str, V: int, f: float) -> dict:
    """B sequences of L tokens, the last f of them scored."""
    torch.manual_seed(1)
    ids, start = torch.randint(3, V, (B, L)), max(1, round(L * (1 - f)))
    ones = torch.ones_like(ids)
    if kind == "dpo":
        mask = ones.clone()
        mask[:, :start] = 0
        return {"input_ids": ids, "attention_mask": ones, "completion_mask": mask}
    return {"prompt_ids": ids[:, :start], "prompt_mask": ones[:, :start], "completion_ids": ids[:, start:],
            "completion_mask": ones[:, start:], "advantages": torch.randn(B),
            "num_items_in_batch": torch.tensor(float(B * (L - start)))}


def status(name: str) -> float:
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name + ":"))


def step(trainer: hf.Trainer, given: dict) -> tuple[float, float, list[torch.Tensor]]:
    """(seconds, MiB above what was there, gradients)."""
    trainer.model.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident
    before, start = status("VmRSS"), time.perf_counter()
    trainer.compute_loss(trainer.model, dict(given)).backward()
    return time.perf_counter() - start, status("VmHWM") - before, [p.grad for p in trainer.model.parameters()]


def case(kind: str, V: int, f: float) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        trainer = cases.trainer(kind, Path(folder), model(V), gradient_checkpointing=False, **(
            {"precompute_ref_log_probs": True, "loss_type": ["ipo"]} if kind == "dpo" else {}), reference=False)
        given = inputs(kind, V, f)
        if kind == "dpo":
            given |= {"ref_chosen_logps": torch.zeros(B // 2), "ref_rejected_logps": torch.zeros(B // 2)}
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        found = {False: [], True: []}
        for _ in range(RUNS + 1):
            for ours in (False, True):
                switch = use_fused_head(trainer) if ours else None
                found[ours].append(step(trainer, given))
                if switch:
                    switch.restore()
        theirs, ours = (found[which] for which in (False, True))
        both = {"theirs": theirs, "ours": ours}
        difference = sum((a - b).double().square().sum() for a, b in zip(ours[0][2], theirs[0][2], strict=True))
        scale = sum(b.double().square().sum() for b in theirs[0][2])
        return {"trainer": kind, "V": V, "f": f, "gradients": float((difference / scale).sqrt()),
                **{f"{who}_s": statistics.median(run[0] for run in runs[1:]) for who, runs in both.items()},
                **{f"{who}_mib": runs[0][1] for who, runs in both.items()}}  # the first: nothing is cached yet


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(case(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))))
        sys.exit()
    runs = [subprocess.run([sys.executable, __file__, kind, str(V), str(f)], check=True, capture_output=True, text=True)
            for kind in ("dpo", "grpo") for V in (49152, 151936) for f in (0.25, 1.0)]
    rows = [json.loads(run.stdout.splitlines()[-1]) for run in runs]
    out = {**describe("python benchmarks/trl_heads.py"), "trl": trl.__version__,
           "shape": f"{B} x {L} tokens, D = {D}, 2 layers, fp32", "rows": rows}
    (ROOT / "benchmarks" / "results" / "trl.json").write_text(json.dumps(out, indent=1) + "\n")
