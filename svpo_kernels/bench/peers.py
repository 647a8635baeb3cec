"""The vocabulary head of a trainer, by everyone who offers one: hidden states and lm_head in, step log-probs out.

Peers are the installed packages, each on its best setting and on two inputs: all rows, masked by labels, as a trainer
calls it, and the scored rows gathered beforehand. A peer that is absent or cannot run here is skipped with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import svpo_kernels as sk
from svpo_kernels.linear_step_logps.cost import call_cost

from .machine import Work, installed

IGNORE = -100
Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (n, D), weight (V, D), labels (n,) -> log-probs (n,)


@dataclass(frozen=True)
class HeadShape:
    """T rows of D against V words, a share f of them scored, in S steps. trainable: lm_head takes a gradient too."""

    T: int
    D: int
    V: int
    f: float
    trainable: bool = True
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    S: int = 32

    def __str__(self) -> str:
        head = "trainable" if self.trainable else "frozen"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{head} head, T {self.T}, D {self.D}, V {self.V}, f {self.f}, {dtype}"

    @property
    def work(self) -> Work:
        """Two products of the scored rows, three with a trainable head: nobody can do with less."""
        rows, size = int(self.T * self.f), self.dtype.itemsize
        weights = self.V * self.D * size
        least = call_cost(rows, self.D, self.V, "store" if self.trainable else "frozen", needs_weight=self.trainable,
                          itemsize=size, logits_budget_mb=2**40)
        return Work(weights, weights if self.trainable else 0, least.flops)


class HeadInputs:
    """Random tensors of a shape: hidden, weight, the labels of all rows (-100 = not scored) and of the scored ones."""

    def __init__(self, shape: HeadShape) -> None:
        T, D, V, S, device = shape.T, shape.D, shape.V, shape.S, shape.device
        torch.manual_seed(0)
        self.shape = shape
        self.hidden = torch.randn(T, D, device=device).to(shape.dtype).requires_grad_()
        self.weight = torch.randn(V, D, device=device).div_(D**0.5).to(shape.dtype).requires_grad_(shape.trainable)
        self.rows = torch.sort(torch.randperm(T)[: int(T * shape.f)]).values.to(device)
        N = self.rows.numel()
        self.labels = torch.randint(0, V, (N,), device=device)
        self.step_ids = torch.arange(N, device=device) * S // max(1, N)
        self.all_labels = torch.full((T,), IGNORE, device=device).index_copy(0, self.rows, self.labels)
        self.plan = sk.StepPlan.from_predictions(self.rows.cpu(), self.labels.cpu(), self.step_ids.cpu(), S).to(device)
        self.upstream = torch.randn(S, device=device)

    @property
    def wanted(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight) if x.requires_grad]

    def all_rows(self, head: Head) -> Callable[[], Tensor]:
        """A head over every row, its log-probs summed per step."""
        return lambda: self._sum(head(self.hidden, self.weight, self.all_labels)[self.rows])

    def gathered(self, head: Head) -> Callable[[], Tensor]:
        return lambda: self._sum(head(self.hidden[self.rows], self.weight, self.labels))

    def ours(self, **options: object) -> Callable[[], Tensor]:
        return lambda: sk.linear_step_logps(self.hidden, self.weight, self.plan, **options)

    def backward(self, function: Callable[[], Tensor]) -> list[Tensor]:
        """Value and gradients."""
        out = function()
        return [out.detach(), *torch.autograd.grad(out, self.wanted, self.upstream)]

    def exact(self) -> list[Tensor]:
        """The same in fp64 by the formula, 512 rows at a time: at V = 152064 that is 0.6 GB a temporary."""
        hidden, weight = self.hidden.detach().double(), self.weight.detach().double()
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        upstream, logps = self.upstream.double()[self.step_ids], []
        for part in torch.arange(self.rows.numel(), device=hidden.device).split(512):
            h, g, labels = hidden[self.rows[part]], upstream[part].unsqueeze(1), self.labels[part].unsqueeze(1)
            logp = torch.log_softmax(F.linear(h, weight), -1)
            logps.append(logp.gather(1, labels).squeeze(1))
            u = logp.exp_().mul_(-g).scatter_add_(1, labels, g)
            grad_hidden[self.rows[part]] = u @ weight
            if self.weight.requires_grad:
                grad_weight.addmm_(u.t(), h)
        out = self._sum(torch.cat(logps)) if logps else self.upstream.double() * 0
        return [out, grad_hidden, grad_weight][: 1 + len(self.wanted)]

    def _sum(self, logp: Tensor) -> Tensor:
        logp = logp.float() if logp.dtype != torch.float64 else logp
        return logp.new_zeros(self.shape.S).index_add(0, self.step_ids, logp)


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What a trainer writes: products in the input dtype, fp32 log-softmax, gather, mask."""
    logp = torch.log_softmax(F.linear(hidden, weight).float(), -1)
    return logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(labels == IGNORE, 0.0)


compiled = torch.compile(eager, dynamic=False)


def torch_fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -F.linear_cross_entropy(hidden, weight, labels, reduction="none", ignore_index=IGNORE)


def trl_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """TRL's selective_log_softmax; without its kernel it loops over the first dimension: one sequence is its best."""
    from trl.trainer.utils import selective_log_softmax

    logits = F.linear(hidden, weight).unsqueeze(0)
    logp = selective_log_softmax(logits, labels.clamp(min=0).unsqueeze(0)).squeeze(0)
    return logp.masked_fill(labels == IGNORE, 0.0)


def trl_fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """TRL's add_fused_lm_head, what its DPOTrainer runs: the logits in tiles."""
    return _TrlModel.over(weight)(hidden.unsqueeze(0), shift_labels=labels.unsqueeze(0),
                                  fused_lm_head=True).log_probs.squeeze(0)


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none", ignore_index=IGNORE)(weight, hidden, labels)


def cce(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    # filter_eps None: its gradient skips nothing, so that it answers the same question
    return -linear_cross_entropy(hidden, weight, labels, reduction="none", ignore_index=IGNORE, filter_eps=None,
                                 impl="cce" if hidden.is_cuda else "torch_compile")


def flash_attn(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """flash-attn's Triton cross entropy over the logits; its gradient takes the logits' place, which is its best."""
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    losses, _ = cross_entropy_loss(F.linear(hidden, weight), labels, ignore_index=IGNORE, inplace_backward=True)
    return -losses


def quack(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """quack's head with a loss per row; its chunked one has "mean" and "sum" only, so no upstream gradient per row."""
    from quack.linear_cross_entropy import linear_cross_entropy_func

    return -linear_cross_entropy_func(hidden, weight, None, labels, ignore_index=IGNORE, reduction="none",
                                      inplace_backward=True)


# Name, head, package: Triton or CuTe kernels
GPU_PEERS = (("Liger", liger, "liger_kernel"), ("flash-attn", flash_attn, "flash-attn"),
             ("quack", quack, "quack-kernels"))


class _TrlModel(torch.nn.Module):
    """The least model that add_fused_lm_head takes: its backbone hands the hidden states through."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(model_type="llama"))
        self.head = SimpleNamespace(weight=weight, bias=None)

    @staticmethod
    def over(weight: Tensor) -> _TrlModel:
        from trl.trainer.utils import add_fused_lm_head

        model = _TrlModel(weight)
        add_fused_lm_head(model)
        return model

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden

    def base_model(self, hidden: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=hidden)

    def get_output_embeddings(self) -> SimpleNamespace:
        return self.head


def peers(device: str) -> tuple[dict[str, Head], dict[str, str]]:
    """(name -> head) of every peer that can run here, (name -> why not) of the others."""
    torch.compiler.reset()  # a function compiled for 8 shapes runs eagerly, silently, from the ninth on
    found: dict[str, Head] = {"eager": eager, "torch.compile": compiled}
    skipped: dict[str, str] = {}

    def add(name: str, head: Head, why_not: str | None) -> None:
        if why_not is None:
            found[name] = head
        else:
            skipped[name] = why_not

    add("F.linear_cross_entropy", torch_fused,
        None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has none (2.13 does)")
    trl = None if installed("trl") else "trl is not installed"
    add("TRL selective_log_softmax", trl_logits, trl)
    add("TRL fused_lm_head", trl_fused, trl or _trl_has_no_fused_head())
    for name, head, package in GPU_PEERS:
        add(name, head, _gpu_reason(package, device))
    add("CCE", cce, None if installed("cut-cross-entropy") else "cut-cross-entropy is not installed")
    return found, skipped


def _trl_has_no_fused_head() -> str | None:
    import trl.trainer.utils

    known = hasattr(trl.trainer.utils, "add_fused_lm_head")
    return None if known else f"trl {installed('trl')} has no add_fused_lm_head"


def _gpu_reason(package: str, device: str) -> str | None:
    if not installed(package):
        return f"{package} is not installed"
    return None if device == "cuda" else "its operators are kernels that need a GPU"
