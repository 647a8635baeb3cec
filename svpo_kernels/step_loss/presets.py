"""Published step-level losses as arguments of `svpo_loss`."""

from __future__ import annotations

from typing import Any


class Preset(dict[str, Any]):
    """Arguments of `svpo_loss` (`svpo_loss(lp, pairs, ref, **PRESETS["step_dpo"])`) and where they come from.

    source: paper and arXiv number. theirs: the constants that the source states. ours: the constants that it leaves
    open or that could not be confirmed, chosen here.
    """

    source: str
    theirs: str
    ours: str

    def __init__(self, source: str, theirs: str, ours: str, **arguments: Any) -> None:
        super().__init__(arguments)
        self.source, self.theirs, self.ours = source, theirs, ours


_PREFERENCE_ONLY = {"preference": "sigmoid", "preference_weight": 1.0, "value_weight": 0.0, "rank_weight": 0.0,
                    "sft_weight": 0.0}

PRESETS: dict[str, Preset] = {
    "svpo": Preset(
        source="Chen, Liao, Li, Fan: Step-level Value Preference Optimization for Mathematical Reasoning, "
               "arXiv 2406.10858 (Findings of EMNLP 2024)",
        theirs="the terms: DPO on sibling steps of a search tree, and an explicit value head trained by squared error "
               "to the Q values and by a margin ranking loss over the same pairs",
        ours="beta = 0.1, all weights = 1, no SFT term, rank_margin = 0.1 (below any gap in Q worth a pair, so that it "
             "never pulls against the squared error)",
        beta=0.1, preference="sigmoid", preference_weight=1.0, value_weight=1.0, rank="hinge", rank_margin=0.1,
        rank_weight=1.0, sft_weight=0.0,
    ),
    "step_dpo": Preset(
        source="Lai, Tian, Chen, Yang, Peng, Jia: Step-DPO: Step-wise Preference Optimization for Long-chain Reasoning "
               "of LLMs, arXiv 2406.18629",
        theirs="the loss, and beta = 0.5 (their 7B runs; 0.4 for 72B)",
        ours="nothing",
        beta=0.5, **_PREFERENCE_ONLY,
    ),
    "mcts_dpo": Preset(
        source="Xie, Goyal, Zheng, Kan, Lillicrap, Kawaguchi, Shieh: Monte Carlo Tree Search Boosts Reasoning via "
               "Iterative Preference Learning, arXiv 2405.00451",
        theirs="the loss, beta = 0.1 (their scripts), and label smoothing by visit counts: pass "
               "label_smoothing = N_l / (N_w + N_l) per pair, (P,)",
        ours="label_smoothing = 0 where no visit counts are passed",
        beta=0.1, label_smoothing=0.0, **_PREFERENCE_ONLY,
    ),
    "rstar": Preset(
        source="Guan, Zhang, Liu et al.: rStar-Math: Small LLMs Can Master Math Reasoning with Self-Evolved Deep "
               "Thinking, arXiv 2501.04519",
        theirs="the loss of its process preference model: -logsigmoid(v_w - v_l), mean over the two best against the "
               "two worst siblings (select_pairs rule \"top_bottom\"); no policy term, step_logps may be None",
        ours="nothing",
        preference_weight=0.0, value_weight=0.0, rank="logistic", rank_weight=1.0, sft_weight=0.0,
    ),
    "alphamath": Preset(
        source="Chen, Liao, Li, Fan: AlphaMath Almost Zero: Process Supervision without Process, arXiv 2405.03553 "
               "(NeurIPS 2024)",
        theirs="log-likelihood of the correct solutions plus 0.01 times the squared error of the value to the Q values "
               "(0.0005 for Llama-3)",
        ours="the SFT term is averaged over steps, the source's over tokens: step log-probs with reduction=\"mean\" "
             "come nearest",
        preference_weight=0.0, value_weight=0.01, rank_weight=0.0, sft_weight=1.0,
    ),
}
