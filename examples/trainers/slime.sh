#!/usr/bin/env bash
# slime's own arguments follow; advantages of a step are equal over its tokens (--custom-advantage-function-path)
python train.py --loss-type custom_loss \
    --custom-loss-function-path svpo_kernels.integrations.slime.step_loss \
    --eps-clip 0.2 --eps-clip-high 0.28 "$@"
