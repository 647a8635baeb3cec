"""The public names of `svpo_kernels`, which loads this file when the first of them is used."""

from .dispatch import backends
from .linear_step_logps import linear_step_logps, linear_top_k
from .models import head
from .plan import StepPlan
from .prm import aggregate_scores, prm_loss, prm_scores, prm_scores_from_lm_head
from .step_logps import step_logps
from .step_loss import PRESETS, SVPOLoss, dvo_loss, svpo_loss
from .step_policy import POLICY_PRESETS, StepPolicyLoss, policy_weights, step_advantages, step_policy_loss
from .tree_attention import tree_attention
from .trees.advantages import tree_advantages
from .trees.attention import PackingError
from .trees.check import check_packing
from .trees.flops import choose_max_tokens, count_flops
from .trees.layers import use_tree_attention
from .trees.masks import tree_attention_mask
from .trees.packing import StepBatch, distinct_batch, pack_trees
from .trees.stream import StreamOutputs, stream_backward
from .trees.text import tree_from_text
from .trees.tree import StepNode, StepTree, select_pairs

__all__ = [
    "POLICY_PRESETS",
    "PRESETS",
    "PackingError",
    "SVPOLoss",
    "StepBatch",
    "StepNode",
    "StepPlan",
    "StepPolicyLoss",
    "StepTree",
    "StreamOutputs",
    "aggregate_scores",
    "backends",
    "check_packing",
    "choose_max_tokens",
    "count_flops",
    "distinct_batch",
    "dvo_loss",
    "head",
    "linear_step_logps",
    "linear_top_k",
    "pack_trees",
    "policy_weights",
    "prm_loss",
    "prm_scores",
    "prm_scores_from_lm_head",
    "select_pairs",
    "step_advantages",
    "step_logps",
    "step_policy_loss",
    "stream_backward",
    "svpo_loss",
    "tree_advantages",
    "tree_attention",
    "tree_attention_mask",
    "tree_from_text",
    "use_tree_attention",
]
