"""OpenRLHF's training entry with its log-probs from `step_logps`: python openrlhf.py openrlhf.cli.train_rlhf ...
Under Ray, in the worker's own process: call use_step_logps() there."""

import runpy
import sys

from svpo_kernels.integrations.openrlhf import use_step_logps

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    with use_step_logps():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
