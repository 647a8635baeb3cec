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
from .trees.passes import StreamOutputs
from .trees.stream import stream_backward
from .trees.text import tree_from_text
from .trees.tree import StepNode, StepTree, select_pairs

# In the order in which the API reference shows them.
__all__ = [
    # log-probs of steps, from logits and from hidden states
    "linear_step_logps",
    "linear_top_k",
    "step_logps",
    "StepPlan",
    "head",
    # losses on steps
    "svpo_loss",
    "SVPOLoss",
    "PRESETS",
    "dvo_loss",
    "step_policy_loss",
    "StepPolicyLoss",
    "POLICY_PRESETS",
    "policy_weights",
    "step_advantages",
    # process reward models
    "prm_scores",
    "prm_scores_from_lm_head",
    "prm_loss",
    "aggregate_scores",
    # step trees and packs of them
    "tree_from_text",
    "StepTree",
    "StepNode",
    "select_pairs",
    "tree_advantages",
    "pack_trees",
    "StepBatch",
    "distinct_batch",
    "stream_backward",
    "StreamOutputs",
    "choose_max_tokens",
    "count_flops",
    # attention over packs
    "use_tree_attention",
    "tree_attention",
    "tree_attention_mask",
    "check_packing",
    "PackingError",
    # what runs here
    "backends",
]
