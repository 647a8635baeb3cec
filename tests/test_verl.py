"""integrations.verl: against verl itself where it is installed (0.9.1 here), else against its losses restated below."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import PACKAGE, TESTS, environment

REAL = importlib.util.find_spec("verl") is not None and importlib.util.find_spec("tensordict") is not None
B, L = 5, 12
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]


@pytest.fixture(scope="module")
def plugin():
    """The module, over verl's registries or, without verl, over dicts of the same two decorators."""
    if REAL:
        yield importlib.import_module("svpo_kernels.integrations.verl")
        return
    core = types.ModuleType("verl.trainer.ppo.core_algos")
    core.POLICY_LOSS_REGISTRY, core.ADV_ESTIMATOR_REGISTRY = {}, {}
    core.register_policy_loss = lambda name: lambda fn: core.POLICY_LOSS_REGISTRY.setdefault(name, fn)
    core.register_adv_est = lambda name: lambda fn: core.ADV_ESTIMATOR_REGISTRY.setdefault(name, fn)
    names = ["verl", "verl.trainer", "verl.trainer.ppo"]
    sys.modules.update({name: types.ModuleType(name) for name in names} | {core.__name__: core})
    yield importlib.import_module("svpo_kernels.integrations.verl")
    for name in [*names, core.__name__, "svpo_kernels.integrations.verl"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def core(plugin):
    return sys.modules["verl.trainer.ppo.core_algos"]


class Config(dict):
    """What the losses read of verl's ActorConfig."""

    def __init__(self, **info):
        super().__init__(clip_ratio_c=3.0)
        self.clip_ratio, self.clip_ratio_low, self.clip_ratio_high, self.global_batch_info = 0.2, None, 0.28, info


# -- verl's own, restated ---------------------------------------------------------------------------------------------


def aggregate(losses, mask, mode, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None):
    kept, lengths = losses * mask, mask.sum(-1)
    rows = global_batch_size or (lengths > 0).sum()
    if mode.startswith("token"):
        return kept.sum() * dp_size / (1 if mode == "token-sum" else batch_num_tokens or mask.sum())
    each = kept.sum(-1) / (lengths + 1e-8) if mode == "seq-mean-token-mean" else kept.sum(-1)
    return each.sum() * dp_size / rows / ((loss_scale_factor or mask.shape[-1]) if mode.endswith("norm") else 1)


def vanilla(old, new, A, mask, mode, config, weights):
    rho = (new - old).clamp(-20, 20).exp()
    bounded = torch.max(-A * rho, -A * rho.clamp(0.8, 1.28))
    losses = torch.where(A < 0, torch.min(-3.0 * A, bounded), bounded)
    return aggregate(losses * (1 if weights is None else weights), mask, mode, **config.global_batch_info)


def gspo(old, new, A, mask, mode, config, weights):
    mean = ((new - old) * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    rho = (new - new.detach() + mean.detach()[:, None]).exp()
    losses = torch.max(-A * rho, -A * rho.clamp(0.8, 1.28))
    return aggregate(losses * (1 if weights is None else weights), mask, mode, **config.global_batch_info)


# -- cases ------------------------------------------------------------------------------------------------------------


def case(one_advantage=False):
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(B, L)
    for b, length in enumerate((12, 7, 1, 0, 9)):
        mask[b, length:] = 0
    new = -torch.rand(B, L, generator=generator) * 3
    old = new + 0.4 * torch.randn(B, L, generator=generator)
    A = torch.randn(B, 1 if one_advantage else L, generator=generator).expand(B, L) * mask
    return old, new.requires_grad_(), A, mask, torch.rand(B, L, generator=generator) + 0.5


def same(ours, theirs, new):
    (one,) = torch.autograd.grad(ours, new)
    (two,) = torch.autograd.grad(theirs, new)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert one.any()


@pytest.mark.parametrize("info", [
    dict(), dict(dp_size=2, batch_num_tokens=50, global_batch_size=8, loss_scale_factor=20)], ids=["local", "global"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_policy_losses(core, mode, weighted, info):
    for name, restated, theirs in (("svpo_token", vanilla, "vanilla"), ("svpo_step_mean", gspo, "gspo")):
        old, new, A, mask, weights = case(one_advantage=name != "svpo_token")
        if name == "svpo_step_mean":
            weights = weights[:, :1].expand(B, L)  # of sequences: verl's gspo would give tokens of one step unlike ones
        weights, config = weights if weighted else None, Config(**info)
        loss, metrics = core.POLICY_LOSS_REGISTRY[name](old, new, A, mask, mode, config, weights)
        same(loss, restated(old, new, A, mask, mode, config, weights), new)
        assert set(metrics) == {"actor/pg_clipfrac", "actor/ppo_kl", "actor/ratio_mean", "actor/ratio_max"}
        assert metrics["actor/ppo_kl"] == pytest.approx(((old - new) * mask).sum().item() / mask.sum().item(), rel=1e-5)
        if REAL and name == "svpo_token":
            same(core.POLICY_LOSS_REGISTRY[name](old, new, A, mask, mode, config, weights)[0],
                 core.POLICY_LOSS_REGISTRY[theirs](old, new, A, mask, mode, config, weights)[0], new)


@pytest.mark.skipif(not REAL, reason="verl is not installed")
@pytest.mark.parametrize("mode", MODES)
def test_gspo_of_verl_with_its_own_configuration(core, mode):
    from verl.workers.config import ActorConfig

    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_high=0.28)
    for name, theirs in (("svpo_step_mean", "gspo"), ("svpo_token", "vanilla")):
        old, new, A, mask, weights = case(one_advantage=True)
        arguments = (old, new, A, mask.bool(), mode, config, weights[:, :1].expand(B, L))
        same(core.POLICY_LOSS_REGISTRY[name](*arguments)[0], core.POLICY_LOSS_REGISTRY[theirs](*arguments)[0], new)


def test_steps_are_runs_of_one_advantage(core):
    """Two steps in a row of six tokens: each has its own ratio."""
    new = torch.tensor([[-1.0, -2.0, -1.5, -0.5, -1.0, -2.0]], requires_grad=True)
    old, A = new.detach() - 0.05, torch.tensor([[1.0, 1.0, -2.0, -2.0, -2.0, 0.0]])
    mask = torch.tensor([[1.0, 1, 1, 1, 1, 0]])
    loss, _ = core.POLICY_LOSS_REGISTRY["svpo_step"](old, new, A, mask, "token-mean", Config(), None)
    rho = torch.tensor([0.10, 0.15]).exp()
    assert loss.item() == pytest.approx((-2 * rho[0] + 3 * 2.0 * rho[1]).item() / 5, rel=1e-5)


def test_dp_size_needs_the_totals(core):
    old, new, A, mask, _ = case()
    with pytest.raises(ValueError, match="batch_num_tokens and global_batch_size"):
        core.POLICY_LOSS_REGISTRY["svpo_token"](old, new, A, mask, "token-mean", Config(dp_size=2), None)
    with pytest.raises(ValueError, match="loss_agg_mode must be one of token-mean"):
        core.POLICY_LOSS_REGISTRY["svpo_token"](old, new, A, mask, "mean", Config(), None)


def test_step_rewards_and_advantages(plugin, core):
    mask = torch.tensor([[1.0] * 6, [1.0] * 4 + [0] * 2, [1.0] * 6])
    rewards = plugin.step_rewards([[0.5, 0.0], [1.0], [2.0]], [[1, 4], [3], [5]], mask)
    assert rewards.shape == (3, 6) and rewards.nonzero().tolist() == [[0, 1], [0, 4], [1, 3], [2, 5]]
    assert rewards.sum(1).tolist() == [0.5, 1.0, 2.0]
    index = np.array(["a", "a", "b"], dtype=object)
    mean = 1.5 / 3
    for how, first in (("group_mean", 0.5 - mean), ("rloo", (0.5 - mean) * 1.5), ("group_norm", 0.0)):
        advantages, returns = core.ADV_ESTIMATOR_REGISTRY[f"svpo_{how}"](
            token_level_rewards=rewards, response_mask=mask, index=index, config={})
        last = {"group_mean": 0.5, "rloo": 0.75, "group_norm": 1.0}[how]
        # the third is alone in its group: 0
        expected = torch.tensor([[first] * 2 + [-last] * 3 + [0], [last] * 4 + [0, 0], [0.0] * 6])
        torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-5)
        assert advantages is returns
    gain, _ = core.ADV_ESTIMATOR_REGISTRY["svpo_gain"](token_level_rewards=rewards, response_mask=mask)
    torch.testing.assert_close(gain[0], torch.tensor([0.5, 0.5, -0.5, -0.5, -0.5, 0]))


def test_bad_rewards_are_named(plugin):
    mask = torch.ones(1, 4)
    for scores, ends, error, what in (([[1.0]], [[4]], IndexError, "tokens of the response"),
                                      ([[1.0]], [[1, 2]], ValueError, "1 ascending"), ([], [], ValueError, "B = 1")):
        with pytest.raises(error, match=what):
            plugin.step_rewards(scores, ends, mask)


@pytest.mark.parametrize("shape", [(2, 7), (14,)])
def test_heads(plugin, shape):
    hidden, weight = torch.randn(*shape, 16, requires_grad=True), torch.randn(97, 16, requires_grad=True)
    labels = torch.randint(0, 97, shape)
    z = torch.log_softmax(hidden @ weight.T / 0.7, -1)
    expected, entropy = z.gather(-1, labels[..., None])[..., 0], -(z.exp() * z).sum(-1)
    upstream = torch.randn(2, *shape)
    truth = torch.autograd.grad((upstream[0] * expected + upstream[1] * entropy).sum(), (hidden, weight))
    for found in (plugin.FusedLinearForPPO()(hidden, weight, labels, 0.7),
                  [x.view(shape) for x in plugin.linear_cross_entropy(hidden, weight, labels, 0.7, "none", None)]):
        torch.testing.assert_close(torch.stack(tuple(found)), torch.stack([expected, entropy]), rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad((upstream[0] * found[0] + upstream[1] * found[1]).sum(), (hidden, weight))
        torch.testing.assert_close(grads, truth, rtol=1e-4, atol=1e-5)
    if len(shape) == 2:  # one temperature a sequence: verl#6110
        each = plugin.FusedLinearForPPO()(hidden, weight, labels, torch.tensor([0.7, 1.3]))[0]
        torch.testing.assert_close(each[0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not REAL, reason="verl is not installed")
def test_heads_take_the_place_of_verls(plugin):
    import verl.utils.experimental.torch_functional as theirs

    before = theirs.FusedLinearForPPO
    hidden, weight, labels = torch.randn(2, 7, 16), torch.randn(97, 16), torch.randint(0, 97, (2, 7))
    expected = before()(hidden, weight, labels, 0.7)
    try:
        with plugin.use_fused_heads():
            found = theirs.FusedLinearForPPO(impl_backend="torch")(hidden, weight, labels, 0.7)
            assert theirs.FusedLinearForPPO is plugin.FusedLinearForPPO
    except ImportError as error:  # verl's Triton head needs what a CPU machine lacks
        pytest.skip(str(error))
    assert theirs.FusedLinearForPPO is before
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def entry_points():
    text = (TESTS.parent / "pyproject.toml").read_text(encoding="utf-8")
    table = text.split('[project.entry-points."verl.plugins"]')[1].split("\n[")[0]
    return dict(re.findall(r'(?m)^(\w+) = "(.*)"$', table))


def test_the_entry_point_names_this_module():
    assert entry_points() == {"svpo": "svpo_kernels.integrations.verl"}
    assert (Path(PACKAGE) / "svpo_kernels" / "integrations" / "verl.py").is_file()


@pytest.mark.skipif(not REAL, reason="verl is not installed")
def test_verl_loads_it_by_itself(tmp_path):
    """`import verl` in a new process, this package's entry points installed."""
    folder = tmp_path / "svpo_entry-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: svpo_entry\nVersion: 1\n")
    lines = "".join(f"{name} = {place}\n" for name, place in entry_points().items())
    (folder / "entry_points.txt").write_text(f"[verl.plugins]\n{lines}")
    code = ("import verl, sys; assert 'svpo_kernels.integrations.verl' in sys.modules; "
            "from verl.trainer.ppo.core_algos import get_policy_loss_fn as f; print(f('svpo_step').__module__)")
    env = environment()
    env["PYTHONPATH"] += f":{tmp_path}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=TESTS, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "svpo_kernels.integrations.verl"
