"""Runs of one, two and three processes are killed at any moment, 25 times in all, and end where the others end."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import runs_
import safetensors.torch
import torch
from processes import TESTS, environment
from training_ import history_of

from svpo_kernels.trainer import checkpoint, head_files

KILLS = {1: 9, 2: 8, 3: 8}
STEPS = 60


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(config, output_dir, processes, log):
    """All processes of a run; each is ours to kill."""
    group = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
             "LOCAL_WORLD_SIZE": processes} if processes > 1 else {}
    command = [sys.executable, "-m", "svpo_kernels.cli.main", "train", str(config), f"output_dir={output_dir}"]
    found = []
    for rank in range(processes):
        own = {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
        env = environment(OMP_NUM_THREADS="1", **{name: str(value) for name, value in (group | own).items()})
        found.append(subprocess.Popen(command, cwd=TESTS, env=env, stdout=log, stderr=subprocess.STDOUT))
    return found


def newest(folder):
    return next((int(path.name.split("-")[1]) for path in checkpoint.checkpoints(folder)), 0)


def finish(run, log):
    codes = [process.wait(timeout=280) for process in run]
    log.flush()
    assert codes == [0] * len(run), open(log.name).read()[-4000:]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    model = runs_.tiny(folder / "model")
    trees = runs_.write_rows(folder / "trees.jsonl", runs_.tree_rows(7))
    return runs_.write_config(folder / "run.yaml", model, trees, folder / "none", preset="svpo", pairs_per_step=3,
                              max_steps=STEPS, save_strategy="steps", save_steps=1, save_total_limit=3, logging_steps=7,
                              gradient_accumulation_steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_killed_runs_end_where_the_others_end(tmp_path, config, processes):
    rng = random.Random(processes)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with open(tmp_path / "log", "w+") as log:
        finish(start(config, whole, processes, log), log)
        kills = passed = 0
        while kills < KILLS[processes]:
            before = newest(killed)
            run = start(config, killed, processes, log)
            until = before + rng.randint(1, max(1, (STEPS - 4 - before) // (KILLS[processes] - kills)))
            deadline = time.monotonic() + 200
            while newest(killed) < until:
                assert time.monotonic() < deadline and all(process.poll() is None for process in run), (
                    log.flush(), open(log.name).read()[-4000:])
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.08))  # in the middle of a step, of a save, of a rotation
            for process in run:
                process.send_signal(signal.SIGKILL)
            assert [process.wait() for process in run] == [-signal.SIGKILL] * processes
            kills += 1
            passed += "is passed over" in checkpoint_notes(killed)
        assert not (killed / "model.safetensors").exists()
        finish(start(config, killed, processes, log), log)
    for name in ("model.safetensors", head_files.VALUE_HEAD):
        ours, theirs = (safetensors.torch.load_file(folder / name) for folder in (killed, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    assert history_of(killed) == history_of(whole)
    assert [path.name for path in checkpoint.checkpoints(killed)] == [
        path.name for path in checkpoint.checkpoints(whole)] == [f"checkpoint-{STEPS - back}" for back in range(3)]
    print(f"{processes} processes: {kills} kills, {passed} of them in the middle of a checkpoint")


def checkpoint_notes(folder):
    return " ".join(checkpoint.newest_complete(folder)[1])
