"""`stream_backward`: values and gradients of every path run alone, for any architecture, in two passes over a tree."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import tiny_trees
import torch
import transformers as hf
from doubles import all_in_double
from streams import ATTENTION, HYBRIDS, MORE_HYBRIDS, build, difference, pack, separate, taken_gradients
from tiny_models import one_thread  # noqa: F401

import svpo_kernels as sk
from svpo_kernels.trees import stream_check
from svpo_kernels.trees.attention import unpackable
from svpo_kernels.trees.stream_check import TESTED

WAYS = ({}, {"max_tokens": 9}, {"max_tokens": 64, "recompute": True})

THOROUGHLY = ("llama", "gemma3", "qwen3.5", "lfm2")  # two trees, every way


@pytest.mark.parametrize("name", ATTENTION | HYBRIDS | MORE_HYBRIDS)
def test_equal_to_separate_runs(name):
    trees, batch = pack() if name in THOROUGHLY else pack(((2, 2),))
    model = build(name)
    torch.manual_seed(1)
    head = torch.nn.Linear(32, 2).double()
    up, value_up = torch.randn(batch.plan.num_steps).double(), torch.randn(batch.plan.num_steps, 2).double()

    def loss(logps, values):
        return logps @ up + (values * value_up).sum() + (logps.sum() / 50).tanh()

    with all_in_double():
        logps, values = separate(model, trees, batch, head, loss)
        expected = taken_gradients(model, head)
        seen = []

        def streamed(out):
            seen.append(out)
            return loss(out.logps, out.heads["value"])

        heads = {"value": (head, batch.value_positions)}
        for calls, options in enumerate(WAYS if name in THOROUGHLY else WAYS[2:], start=1):
            found = sk.stream_backward(model, batch, streamed, heads=heads, **options)
            assert len(seen) == calls
            out = seen[-1]
            assert not found.requires_grad and found == pytest.approx(float(loss(logps, values)), rel=1e-9)
            torch.testing.assert_close(out.logps.detach(), logps, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(out.heads["value"].detach(), values, rtol=1e-9, atol=1e-9)
            assert difference(taken_gradients(model, head), expected) <= 1e-9


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gpt2"])
def test_single_precision(name):
    """As near to fp64 as the packed run is (gpt2, which no mask function of packs serves, as separate runs are)."""
    trees, batch = pack()
    model, exact = build(name, torch.float32), build(name)
    up = torch.randn(batch.plan.num_steps)

    def streamed(model, up):
        sk.stream_backward(model, batch, lambda out: out.logps @ up)
        return taken_gradients(model)

    with all_in_double():
        truth = streamed(exact, up.double())
    ours = streamed(model, up)
    separate(model, trees, batch, torch.nn.Linear(32, 1), lambda logps, values: logps @ up)
    theirs = taken_gradients(model)
    assert difference(ours, truth) <= max(1e-6, 1.5 * difference(theirs, truth))


# -- what a loss may read -------------------------------------------------------------------------------------------


STATS = ("entropy", "logsumexp", "log_sum_sq_probs", "mean_logit", "top1")


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_every_number_and_its_gradient_are_those_of_the_pack(reduction):
    _, batch = pack()
    model = build("llama")
    N, S = batch.plan.num_predictions, batch.plan.num_steps
    torch.manual_seed(2)
    up = torch.randn(N if reduction == "none" else S).double()
    ups = torch.randn(2, N).double()
    positions = torch.randint(0, batch.input_ids.shape[1], (9,))
    head = torch.nn.Sequential(torch.nn.Linear(32, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    head_up = torch.randn(9, 3).double()

    def loss(out):
        return (out.logps @ up + out.stats["entropy"] @ ups[0] + out.stats["logsumexp"] @ ups[1]
                + (out.heads["h"] * head_up).sum())

    with all_in_double():
        hidden = model.model(**batch.model_inputs(model), use_cache=False).last_hidden_state
        logps, stats = sk.linear_step_logps(hidden, labels=batch.plan, reduction=reduction, stats=STATS,
                                            **sk.head(model))
        packed = sk.StreamOutputs(logps, stats, {"h": head(hidden.flatten(0, 1)[positions])})
        loss(packed).backward()
        expected = taken_gradients(model, head)
        seen = []
        sk.stream_backward(model, batch, lambda out: (seen.append(out), loss(out))[1], reduction=reduction,
                           stats=STATS, heads={"h": (head, positions)}, max_tokens=20, loss_scale=8.0)
        ours = {name: grad / 8 for name, grad in taken_gradients(model, head).items()}
    out, = seen
    torch.testing.assert_close(out.logps, packed.logps, rtol=1e-9, atol=1e-9, check_dtype=True)
    for name in STATS:
        torch.testing.assert_close(out.stats[name], stats[name], rtol=1e-9, atol=1e-9)
        assert out.stats[name].is_leaf and out.stats[name].requires_grad == (name in ("entropy", "logsumexp"))
    assert difference(ours, expected) <= 1e-9


def test_the_losses_of_the_library():
    """svpo_loss with values, step_policy_loss per token with entropy: NamedTuples, returned detached."""
    _, batch = pack()
    model = build("gpt2")
    head = torch.nn.Linear(32, 1).double()
    reference = torch.randn(batch.plan.num_steps).double() - 5

    def svpo(out):
        return sk.svpo_loss(out.logps, batch.pairs, reference, values=out.heads["value"].flatten().tanh(),
                            value_targets=batch.value_targets.double(), backend="reference")

    old = None

    def policy(out):
        nonlocal old
        old = out.logps.detach() + 0.1 if old is None else old
        return sk.step_policy_loss(out.logps, old, advantages, batch.plan.step_ids, ratio="step_mean", kind="ppo",
                                   entropy=out.stats["entropy"], entropy_weight=0.1, backend="reference")

    advantages = torch.randn(batch.plan.num_steps).double()
    for loss, options in ((svpo, {"heads": {"value": (head, batch.value_positions)}}),
                          (policy, {"reduction": "none", "stats": ("entropy",)})):
        found = sk.stream_backward(model, batch, loss, **options)
        assert type(found).__name__ in ("SVPOLoss", "StepPolicyLoss") and not found.loss.requires_grad
        ours = taken_gradients(model, head)
        eps, direction = 1e-6, {name: torch.randn_like(p) for name, p in model.named_parameters()}
        values = []
        for sign in (1, -1):  # a central difference along a random direction of all weights
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.add_(direction[name], alpha=sign * eps)
            values.append(sk.stream_backward(model, batch, loss, **options).loss)
            taken_gradients(model, head)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.sub_(direction[name], alpha=sign * eps)
        slope = sum((ours[f"0.{name}"] * x).sum() for name, x in direction.items() if f"0.{name}" in ours)
        assert float(slope) == pytest.approx(float((values[0] - values[1]) / (2 * eps)), rel=1e-5)


def test_gradients_are_added_and_weights_of_the_loss_get_theirs():
    _, batch = pack()
    model, scale = build("gpt2"), torch.nn.Parameter(torch.tensor(2.0).double())
    once = sk.stream_backward(model, batch, lambda out: scale * out.logps.sum())
    first = taken_gradients(model)
    assert scale.grad == pytest.approx(float(once) / 2)
    for _ in range(2):
        with torch.no_grad():
            sk.stream_backward(model, batch, lambda out: scale * out.logps.sum())
    assert difference({name: grad / 2 for name, grad in taken_gradients(model).items()}, first) <= 1e-12


def test_a_loss_on_heads_alone_and_heads_without_positions():
    _, batch = pack()
    model, head = build("llama"), torch.nn.Linear(32, 2).double()
    none = torch.zeros(0, dtype=torch.int64)
    heads = {"value": (head, batch.value_positions), "nothing": (head, none)}

    def loss(out):
        assert out.heads["nothing"].shape == (0, 2)
        return out.heads["value"].square().sum()

    sk.stream_backward(model, batch, loss, heads=heads)
    found = taken_gradients(model, head)
    hidden = model.model(**batch.model_inputs(model), use_cache=False).last_hidden_state.flatten(0, 1)
    head(hidden[batch.value_positions]).square().sum().backward()
    assert difference(found, taken_gradients(model, head)) <= 1e-6


# -- how models come ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_checkpointing_is_off_during_the_call_and_back_after_it(name):
    _, batch = pack()
    model = build(name).train()
    sk.stream_backward(model, batch, lambda out: out.logps.sum())
    expected = taken_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]

    def loss(out):
        return out.logps.sum()

    sk.stream_backward(model, batch, loss)
    assert difference(taken_gradients(model), expected) <= 1e-12
    with pytest.raises(ZeroDivisionError):
        sk.stream_backward(model, batch, lambda out: 1 / 0)
    assert layers and all(module.gradient_checkpointing for module in layers)


def test_lora_and_tree_attention():
    from peft import LoraConfig, get_peft_model

    _, batch = pack()
    model = build("llama")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"])).double()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    sk.stream_backward(adapted, batch, lambda out: out.logps.sum())
    ours = taken_gradients(adapted)
    assert ours and all("lora" in name for name in ours)
    hidden = model.model(**batch.model_inputs(adapted), use_cache=False).last_hidden_state
    sk.linear_step_logps(hidden, labels=batch.plan, **sk.head(adapted)).sum().backward()
    assert difference(ours, taken_gradients(adapted)) <= 1e-6
    sk.use_tree_attention(adapted)
    sk.stream_backward(adapted, batch, lambda out: out.logps.sum())
    assert difference(taken_gradients(adapted), ours) <= 1e-6


def test_autocast():
    """Weights cast in pass 1 without a graph are not used again in pass 2; bf16 gradients of a cache add up in fp32."""
    _, batch = pack()
    model = build("llama", torch.float32)
    sk.stream_backward(model, batch, lambda out: out.logps.sum() / 100)
    exact = taken_gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        sk.stream_backward(model, batch, lambda out: out.logps.sum() / 100)
        ours = taken_gradients(model)
        hidden = model.model(**batch.model_inputs(model), use_cache=False).last_hidden_state
        (sk.linear_step_logps(hidden, labels=batch.plan, **sk.head(model)).sum() / 100).backward()
        packed = taken_gradients(model)
    assert difference(ours, exact) <= 1.25 * difference(packed, exact)


# -- what is refused ------------------------------------------------------------------------------------------------


def bad_models():
    llama = build("llama").train()
    llama.model.layers[1].self_attn.attention_dropout = 0.1
    yield llama, "cannot be streamed: layers.1.self_attn.attention_dropout is of type 'dropout'"
    noisy = build("llama").train()
    noisy.model.embed_tokens.neftune_noise_alpha = 5.0
    yield noisy, "cannot be streamed: .*neftune_noise_alpha = 5.0"
    for name, what in (("router-loss", "router loss"), ("longrope", "longrope"), ("dynamic-ntk", "dynamic")):
        yield tiny_models.build(tiny_models.refused()[name][0]), what
    rwkv = hf.RwkvConfig(vocab_size=tiny_models.VOCAB, hidden_size=32, num_hidden_layers=2)
    yield tiny_models.build(rwkv, "eager"), "layer 0 leaves nothing in the cache it is given"
    indexed, unknown = build("llama"), build("llama")
    for model in (indexed, unknown):
        model.config = model.model.config = copy.deepcopy(model.config)
    indexed.config.layer_types = ["indexed_attention"] * 3
    yield indexed, "layer 0, of type 'indexed_attention', keeps a DynamicIndexedLayer"
    unknown.config.layer_types = ["full_attention", "full_attention", "astrology"]
    yield unknown, "no cache is known for layers of type 'astrology'"


def test_hybrids_that_are_tested_are_those_that_are_not_checked():
    every = HYBRIDS | MORE_HYBRIDS
    assert sorted(TESTED) == sorted(config.get_text_config().model_type for config in every.values())
    assert all(unpackable(build(name)) for name in every)  # and no pack serves them


def test_a_state_that_is_not_read_is_found_at_the_first_call(monkeypatch):
    """transformers' Mamba takes a cache and leaves the state in it unread; a model that passes is asked only once."""
    _, batch = pack()
    mamba = tiny_models.build(hf.MambaConfig(**tiny_models.SMALL, state_size=8), "eager")
    with pytest.raises(sk.PackingError, match="stream_backward: MambaForCausalLM gives other hidden states streamed"):
        sk.stream_backward(mamba, batch, lambda out: out.logps.sum())
    monkeypatch.setattr(stream_check, "TESTED", ())
    model, calls = build("lfm2"), []
    model.get_input_embeddings().register_forward_hook(lambda module, given, out: calls.append(given[0].numel()))
    counted = []
    for _ in range(2):
        calls.clear()
        sk.stream_backward(model, batch, lambda out: out.logps.sum())
        counted.append(sum(calls))
    assert counted[0] > counted[1]


def test_models_that_cannot_be_streamed_are_refused_by_name():
    _, batch = pack()
    for model, what in bad_models():
        with pytest.raises(ValueError, match=f"stream_backward: .*{what}"):
            sk.stream_backward(model, batch, lambda out: out.logps.sum())


def test_prompt_tuning_is_refused():
    from peft import PromptTuningConfig, get_peft_model

    _, batch = pack()
    model = get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="without prompt-tuning adapters.*'default' .PromptTuningConfig"):
        sk.stream_backward(model, batch, lambda out: out.logps.sum())


def test_bad_arguments():
    trees, batch = pack()
    model, head = build("llama"), torch.nn.Linear(32, 1).double()
    beyond = torch.tensor([batch.input_ids.shape[1]])

    def loss(out):
        return out.logps.sum()

    cut = sk.StepBatch(batch)
    cut.position_ids = batch.position_ids + 1
    for error, what, change in (
        (ValueError, "reduction must be one of", {"reduction": "max"}),
        (ValueError, "max_tokens must be an int >= 1, or None, got int 0", {"max_tokens": 0}),
        (TypeError, "loss_scale must be a number", {"loss_scale": "2"}),
        (ValueError, "batch must be a pack of trees", {"batch": sk.distinct_batch(trees, [[], []], values="labelled")}),
        (ValueError, "batch must be a pack of whole trees.*got positions 1 to", {"batch": cut}),
        (TypeError, r"heads\['h'\] must be a pair", {"heads": {"h": head}}),
        (TypeError, r"heads\['h'\] must be positions .K,. of integers", {"heads": {"h": (head, torch.ones(2))}}),
        (IndexError, r"heads\['h'\] must be positions below T", {"heads": {"h": (head, beyond)}}),
        (ValueError, "scalar with a gradient", {"loss_fn": lambda out: out.logps}),
        (ValueError, "scalar with a gradient", {"loss_fn": lambda out: out.logps.sum().detach()}),
        (ValueError, "scalar with a gradient, got float 0.5", {"loss_fn": lambda out: 0.5}),
        (ValueError, "stats", {"stats": ("median",)}),
    ):
        with pytest.raises(error, match="(stream_backward|linear_step_logps): .*" + what):
            sk.stream_backward(**{"model": model, "batch": batch, "loss_fn": loss} | change)
    assert not taken_gradients(model)


def test_a_batch_without_a_step():
    tree = tiny_trees.random_tree(0, depth=1, children=2)
    batch, = sk.pack_trees([tree], [[]], max_tokens=100, sft=[[0]])
    batch.plan = sk.StepPlan.from_predictions([], [], [], 0)
    model = build("llama")
    assert sk.stream_backward(model, batch, lambda out: out.logps.sum()) == 0
    assert not any(grad.any() for grad in taken_gradients(model).values())
