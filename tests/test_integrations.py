"""One file a trainer, against the package where it is installed, else against the names and signatures that it has.

The stand-ins below hold what each file imports, as ANCHORS' table and the packages' own code of November 2026 state it.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import importlib
import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import trl_cases as cases
import yaml
from tiny_models import one_thread  # noqa: F401
from training_ import relative_error

import svpo_kernels as sk
from svpo_kernels.integrations.causal_lm import use_fused_loss


@pytest.fixture
def stand_in(monkeypatch):
    """(package, {module: {name: value}}) -> whether the real package is used; its modules are gone afterwards."""

    def put(package, modules):
        monkeypatch.delitem(sys.modules, f"svpo_kernels.integrations.{package}", raising=False)
        try:
            if importlib.util.find_spec(next(iter(modules)).split(".")[0]):
                for name in modules:
                    importlib.import_module(name)
                return True
        except ImportError:
            for name in [name for name in sys.modules if name.split(".")[0] == next(iter(modules)).split(".")[0]]:
                monkeypatch.delitem(sys.modules, name)
        for path, names in modules.items():
            parts = path.split(".")
            for n in range(1, len(parts) + 1):
                module = types.ModuleType(".".join(parts[:n]))
                monkeypatch.setitem(sys.modules, module.__name__, sys.modules.get(module.__name__, module))
                if n > 1:
                    setattr(sys.modules[".".join(parts[:n - 1])], parts[n - 1], sys.modules[module.__name__])
            vars(sys.modules[path]).update(names)
        return False

    return put


def batch(seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(3, 300, (3, 11))
    labels = ids.clone()
    labels[0, :6] = labels[1, 7:] = labels[2, :2] = -100
    return ids, labels, (torch.arange(11) < torch.tensor([[11], [8], [11]])).long()


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# -- losses of a causal LM --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(cases.CONFIGS))
@pytest.mark.parametrize("count", [None, 20])
def test_a_models_own_loss(name, count):
    model, (ids, labels, mask) = cases.model(name), batch()
    inputs = dict(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=count)
    expected = model(**inputs)
    expected.loss.backward()
    truth = gradients(model)
    undo = use_fused_loss(model)
    found = model(**inputs)
    found.loss.backward()
    assert found.logits is None and found.loss.item() == pytest.approx(expected.loss.item(), rel=2e-6)
    assert relative_error(gradients(model), truth) <= 1e-5
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    again = model(input_ids=ids, attention_mask=mask, shift_labels=shifted, num_items_in_batch=count)
    assert again.loss.item() == pytest.approx(found.loss.item(), rel=1e-6)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected.logits)
    undo()
    assert model(**inputs).logits is not None and "forward" not in vars(model)


def test_router_losses_are_refused():
    import transformers as hf

    mixtral = hf.MixtralForCausalLM(hf.MixtralConfig(**cases.SIZES, num_local_experts=2, output_router_logits=True))
    with pytest.raises(ValueError, match="one without a router loss .*, got MixtralForCausalLM"):
        use_fused_loss(mixtral)


def test_axolotl(stand_in, tmp_path):
    hooks = {name: lambda self, *args, **options: None for name in ("post_model_load", "post_trainer_create")}
    real = stand_in("axolotl", {"axolotl.integrations.base": {"BasePlugin": type("BasePlugin", (), hooks)}})
    from axolotl.integrations.base import BasePlugin

    from svpo_kernels.integrations.axolotl import SVPOPlugin

    assert issubclass(SVPOPlugin, BasePlugin)
    if real:
        from axolotl.integrations.base import load_plugin

        assert type(load_plugin("svpo_kernels.integrations.axolotl.SVPOPlugin")).__name__ == "SVPOPlugin"
    model, (ids, labels, _) = cases.model(), batch()
    expected = model(input_ids=ids, labels=labels).loss
    SVPOPlugin().post_model_load(types.SimpleNamespace(rl=None), model)
    out = model(input_ids=ids, labels=labels)
    assert out.logits is None and out.loss.item() == pytest.approx(expected.item(), rel=2e-6)
    trainer = cases.trainer("dpo", tmp_path)
    inputs = cases.batch_of(trainer)
    before, forward = cases.step(trainer, inputs)[0], trainer.model.forward
    SVPOPlugin().post_trainer_create(types.SimpleNamespace(rl="dpo"), trainer)
    assert trainer.model.forward != forward and cases.step(trainer, inputs)[0] == pytest.approx(before, rel=1e-6)


class Registry:
    """LLaMA-Factory's BasePlugin: a name, functions under it."""

    functions: dict = {}

    def __init__(self, name):
        self.name = name

    def register(self, method="__call__"):
        return lambda fn: self.functions.setdefault((self.name, method), fn)

    def __call__(self, **options):
        return self.functions[self.name, "__call__"](**options)


def compute_log_probs(self, model, batch):
    logits = model(**{name: value for name, value in batch.items()}).logits.float()
    labels = batch["labels"][..., 1:]
    return -F.cross_entropy(logits[:, :-1].reshape(-1, 300), labels.reshape(-1), reduction="none").view(labels.shape)


def test_llamafactory(stand_in, monkeypatch):
    stand_in("llamafactory", {
        "llamafactory.v1.core.base_trainer": {
            "BaseTrainer": type("BaseTrainer", (), {"compute_log_probs": compute_log_probs})},
        "llamafactory.v1.plugins.model_plugins.kernels.interface": {"KernelPlugin": Registry}})
    from llamafactory.v1.core.base_trainer import BaseTrainer
    from llamafactory.v1.plugins.model_plugins.kernels.interface import KernelPlugin

    theirs = BaseTrainer.compute_log_probs
    monkeypatch.setattr(BaseTrainer, "compute_log_probs", theirs)
    importlib.import_module("svpo_kernels.integrations.llamafactory")
    model, (ids, labels, mask) = cases.model("gemma2"), batch()
    trainer = types.SimpleNamespace(device=torch.device("cpu"))
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    expected = BaseTrainer.compute_log_probs(trainer, model, given)
    (expected * 0.1).sum().backward()
    truth = gradients(model)
    assert KernelPlugin("svpo")(model=model, include_kernels=None) is model
    found = BaseTrainer.compute_log_probs(trainer, model, given)
    (found * 0.1).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert relative_error(gradients(model), truth) <= 1e-5


def selective(self, logits, labels, label_pad_token_id=-100, reduction="mean"):
    mask = labels != label_pad_token_id
    logps = logits.log_softmax(-1).gather(-1, labels.masked_fill(~mask, 0)[..., None])[..., 0]
    return logps * mask, getattr(logits, reduction)(-1) * mask, mask


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ms_swift(stand_in, monkeypatch, reduction):
    stand_in("ms_swift", {"swift.rlhf_trainers.rlhf_mixin": {
        "RLHFTrainerMixin": type("RLHFTrainerMixin", (), {"get_per_token_logps": selective})}})
    from swift.rlhf_trainers.rlhf_mixin import RLHFTrainerMixin

    theirs = RLHFTrainerMixin.get_per_token_logps
    monkeypatch.setattr(RLHFTrainerMixin, "get_per_token_logps", theirs)
    importlib.import_module("svpo_kernels.integrations.ms_swift")
    trainer = types.SimpleNamespace(template=types.SimpleNamespace(sequence_parallel_size=1))
    labels = batch()[1]
    logits = torch.randn(3, 11, 300, requires_grad=True)
    expected = theirs(trainer, logits, labels, reduction=reduction)
    found = RLHFTrainerMixin.get_per_token_logps(trainer, logits, labels, reduction=reduction)
    for ours, other in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(3, 11)
    one, two = (torch.autograd.grad((upstream * logps[0]).sum(), logits)[0] for logps in (found, expected))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_openrlhf(stand_in):
    before = object()
    stand_in("openrlhf", {"openrlhf.models.actor": {"log_probs_from_logits": before}})
    actor = sys.modules["openrlhf.models.actor"]
    before = actor.log_probs_from_logits
    from svpo_kernels.integrations.openrlhf import PRMLoss, log_probs_from_logits, use_step_logps

    with use_step_logps():
        assert actor.log_probs_from_logits is log_probs_from_logits
    assert actor.log_probs_from_logits is before
    logits, labels = torch.randn(2, 5, 97, requires_grad=True), torch.randint(0, 97, (2, 5))
    kept = logits.detach().clone()
    expected = (logits / 0.7).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(log_probs_from_logits(logits, labels, 0.7), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, kept)  # not divided in place
    hidden, weight = torch.randn(2, 5, 16, requires_grad=True), torch.randn(97, 16, requires_grad=True)
    ids = torch.tensor([[1, 9, 2, 9, 3], [9, 4, 5, 6, 9]])
    soft = torch.rand(2, 5)
    loss = PRMLoss(9, 50, 60)(hidden, weight, ids, soft)
    z = (hidden[ids == 9] @ weight[[50, 60]].T).log_softmax(-1)
    truth = -(soft[ids == 9] * z[:, 0] + (1 - soft[ids == 9]) * z[:, 1]).mean()
    torch.testing.assert_close(loss, truth)
    for ours, other in zip(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(truth, (hidden, weight)),
                           strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)


# -- policy losses ----------------------------------------------------------------------------------------------------


def sequences():
    """Three sequences of tokens with two steps each: log-probs, old, advantages, masks."""
    generator = torch.Generator().manual_seed(1)
    lengths = (7, 4, 9)
    logps = [(-torch.rand(n, generator=generator)).requires_grad_() for n in lengths]
    old = [x.detach() + 0.3 * torch.randn(len(x), generator=generator) for x in logps]
    advantages = [torch.cat([torch.full((2,), 1.0 + n), torch.full((n - 2,), -0.5)]) for n in lengths]
    masks = [torch.ones(n) for n in lengths]
    masks[0][-1] = 0
    return logps, old, advantages, masks


def step_mean(logps, old, advantages, masks, weights, lo=0.2, hi=0.28):
    """By hand: each run of one advantage, its geometric mean ratio, clipped; tokens' weights added up."""
    total = 0
    for lp, o, A, mask, w in zip(logps, old, advantages, masks, weights, strict=True):
        for part in (slice(0, 2), slice(2, None)):
            kept = mask[part].bool()
            rho = (lp[part][kept] - o[part][kept]).mean().exp()
            bounded = torch.max(-rho * A[part][0], -rho.clamp(1 - lo, 1 + hi) * A[part][0])
            total = total + w[part][kept].sum() * bounded
    return total


def assert_same(loss, truth, logps):
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-6)
    for ours, other in zip(torch.autograd.grad(loss, logps), torch.autograd.grad(truth, logps), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)


def test_slime(stand_in):
    logps, old, advantages, masks = sequences()
    stand_in("slime", {"slime.backends.megatron_utils.loss": {
        "get_log_probs_and_entropy": lambda logits, *, args, unconcat_tokens, total_lengths, response_lengths,
        with_entropy=False: (logits.new_zeros(0), {"log_probs": logps})}})
    from svpo_kernels.integrations.slime import step_loss

    def sum_of_sample_mean(x):
        return sum((part * mask).sum() / mask.sum() for part, mask in zip(x.split([7, 4, 9]), masks, strict=True))

    given = {"log_probs": old, "advantages": advantages, "loss_masks": masks, "unconcat_tokens": None,
             "total_lengths": None, "response_lengths": None}
    args = types.SimpleNamespace(eps_clip=0.2, eps_clip_high=0.28)
    loss, said = step_loss(args, given, torch.zeros(1, 20, 5), sum_of_sample_mean)
    assert_same(loss, step_mean(logps, old, advantages, masks, [mask / mask.sum() for mask in masks]), logps)
    assert {"loss", "pg_loss", "clip_fraction", "ratio_max"} <= said.keys()


@dataclasses.dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict


def test_prime_rl(stand_in):
    stand_in("prime_rl", {"prime_rl.trainer.rl.loss": {"LossOutputs": LossOutputs}})
    from svpo_kernels.integrations.prime_rl import step_loss

    logps, old, advantages, masks = sequences()
    for place in range(3):
        weights = None if place == 0 else torch.rand(len(logps[place]))
        inputs = types.SimpleNamespace(trainer_logprobs=logps[place], inference_logprobs=old[place], ref_logprobs=None,
                                       advantages=advantages[place], loss_mask=masks[place].bool(),
                                       loss_weights=weights)
        out = step_loss(inputs, clip_high=0.28)
        own = torch.ones(len(logps[place])) if weights is None else weights
        truth = step_mean(*([x[place]] for x in (logps, old, advantages, masks)), [own])
        assert_same(out.loss, truth, [logps[place]])
        assert set(out.metrics) == {"clip_fraction", "approx_kl", "ratio_mean", "ratio_max"}


@pytest.mark.parametrize("token_level", [True, False])
def test_nemo_rl(stand_in, token_level):
    kinds = {"LossType": enum.Enum("LossType", {"TOKEN_LEVEL": "token_level", "SEQUENCE_LEVEL": "sequence_level"}),
             "LossInputType": enum.Enum("LossInputType", {"LOGIT": "logit", "LOGPROB": "logprob"})}
    stand_in("nemo_rl", {"nemo_rl.algorithms.loss.interfaces": kinds})
    from svpo_kernels.integrations.nemo_rl import StepPolicyLossFn

    logps, old, advantages, masks = sequences()

    def grid(rows, fill=0.0):  # (B, 1 + L): the first token is never predicted
        return torch.stack([F.pad(row, (1, 9 - len(row)), value=fill) for row in rows])

    loss_fn = StepPolicyLossFn(clip=(0.2, 0.28), token_level=token_level)
    assert loss_fn.input_type.value == "logprob"
    assert loss_fn.loss_type.value.startswith("token" if token_level else "seq")
    data = {"token_mask": grid(masks), "sample_mask": torch.tensor([1.0, 0.0, 1.0]), "prev_logprobs": grid(old),
            "advantages": grid(advantages)}
    loss, said = loss_fn(data, torch.tensor(4.0), torch.tensor(30.0), next_token_logprobs=grid(logps)[:, 1:])
    kept = [masks[0], masks[1] * 0, masks[2]]
    weights = [m / 30 if token_level else m / m.sum().clamp(min=1) / 4 for m in kept]
    first, last = ([x[place] for place in (0, 2)] for x in (logps, old)), ([x[place] for place in (0, 2)] for x in (
        advantages, masks, weights))
    assert_same(loss, step_mean(*first, *last), [logps[0], logps[2]])
    assert said["num_valid_samples"] == 2


def test_runs_end_at_a_gap_and_at_a_sequence():
    from svpo_kernels.integrations.runs import run_policy_loss

    logps, keep = torch.zeros(6), torch.tensor([1, 1, 0, 1, 1, 1])
    out = run_policy_loss(logps, torch.tensor([-0.1, -0.1, 0, -0.2, -0.4, -0.4]), torch.ones(6), keep,
                          torch.tensor([0, 0, 0, 0, 1, 1]), torch.ones(6), ratio="step", clip=(9.0, 9.0))
    rho = torch.tensor([0.2, 0.2, 0.8]).exp()
    assert out.loss.item() == pytest.approx(-(2 * rho[0] + rho[1] + 2 * rho[2]).item(), rel=1e-6)
    empty = run_policy_loss(*(torch.zeros(0) for _ in range(3)), torch.zeros(0), torch.zeros(0), torch.zeros(0),
                            ratio="step")
    assert empty.loss.item() == 0


def test_the_guides_trainer(tmp_path):
    """compute_loss of docs/guides/trainers.md, printed in under 20 lines, trains: the loss of the ops by hand."""
    import transformers as hf

    page = (Path(__file__).resolve().parents[1] / "docs" / "guides" / "trainers.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, flags=re.S) if "StepTrainer" in block)
    assert len(code.strip().splitlines()) < 20
    given = {"sk": sk, "torch": torch}
    exec(code, given)
    ids, labels, _ = batch()
    ids, labels = torch.cat([ids, ids[:1]]), torch.cat([labels, labels[:1]])
    rows = [dict(input_ids=ids[b], labels=labels[b], ref_logps=torch.tensor(-20.0 - b)) for b in range(4)]
    model = cases.model()
    with torch.no_grad():
        lp = torch.log_softmax(model(ids).logits[:, :-1], -1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    D = (lp * (labels[:, 1:] != -100)).sum(1) + torch.tensor([20.0, 21, 22, 23])
    beta = sk.PRESETS["step_dpo"]["beta"]
    expected = -F.logsigmoid(beta * (D[0::2] - D[1::2])).mean().item()
    arguments = hf.TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, per_device_train_batch_size=4,
                                     report_to="none", disable_tqdm=True, remove_unused_columns=False, logging_steps=1,
                                     save_strategy="no", train_sampling_strategy="sequential")
    trainer = given["StepTrainer"](model, arguments, train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


# -- example configurations -------------------------------------------------------------------------------------------

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples" / "trainers").glob("*"))


def test_every_trainer_has_an_example():
    named = {path.stem.removesuffix("_dpo") for path in EXAMPLES}
    files = {path.stem for path in Path(sk.__file__).parent.joinpath("integrations").glob("*.py")}
    assert named == files - {"__init__", "runs", "causal_lm", "hub"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_name_what_exists(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        assert isinstance(yaml.safe_load(text), dict)
    found = re.findall(r"(?:svpo_kernels\.)?integrations[./](\w+)(?:\.py| import (\w+)|\.(\w+))?", text)
    assert found
    for module, *names in found:
        file = Path(sk.__file__).parent / "integrations" / f"{module}.py"
        body = ast.parse(file.read_text(encoding="utf-8")).body
        there = {node.name for node in body if hasattr(node, "name")}
        assert not any(names) or next(filter(None, names)) in there, (module, names)
    for name in re.findall(r"svpo_(?!kernels)\w+", text):
        assert name in ("svpo_group_norm", "svpo_step_mean")
