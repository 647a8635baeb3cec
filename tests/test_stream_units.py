"""The calls that a pack is cut into: every row once, no padding, counted tokens, memory flat in the branches."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from streams import ATTENTION, HYBRIDS, build, pack
from tiny_models import one_thread  # noqa: F401

import svpo_kernels as sk
from svpo_kernels.trees.segments import segments, units


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("max_tokens", [None, 8, 100])
@pytest.mark.parametrize("tokens", [(1, 1), (1, 2), (2, 6)])
def test_units_hold_every_row_once(stateful, max_tokens, tokens):
    _, batch = pack(((4, 2), (1, 5), (2, 3)), tokens)
    T, end = batch.input_ids.shape[1], batch.subtree_end
    cut = segments("test", batch)
    for segment in cut:
        inside = range(segment.start, segment.stop)
        assert all(end[k] == end[segment.start] for k in inside)  # no branch within
        below = [other for other in cut if other.parent >= 0 and cut[other.parent] == segment]
        assert len(below) != 1 or end[below[0].start] != end[segment.stop - 1]  # as long as can be
    made = units(cut, stateful=stateful, max_tokens=max_tokens)
    rows = torch.cat([unit.rows[unit.own] for unit in made])
    assert sorted(rows.tolist()) == list(range(T))
    repeated = sum(unit.rows.numel() for unit in made) - T
    assert repeated == 0 if not stateful else repeated <= len(cut)  # one a branch
    visible = (torch.arange(T) <= torch.arange(T)[:, None]) & (torch.arange(T)[:, None] < end)
    behind = {-1: []}  # rows of the path up to the end of each inner unit
    for index, unit in enumerate(made):
        B, L = unit.rows.shape
        assert B == 1 or not unit.inner
        assert max_tokens is None and B == 1 or B == 1 or B * L <= max_tokens
        assert not stateful or unit.parent < 0 or L > 1
        for own, path in zip(unit.own, unit.rows.tolist(), strict=True):
            last = path[int(own.nonzero().max())]
            whole = behind[unit.parent] + [row for place, row in enumerate(path) if place < 1 or row != path[place - 1]]
            assert whole == visible[last].nonzero().flatten().tolist()
        if unit.inner:
            behind[index] = whole


def test_a_thousand_steps_deep():
    nodes = [sk.StepNode(max(i // 2 * 2 - 2, -1), [3 + i % 7, 5 + i % 11], 1.0 - i % 2 * 2) for i in range(2000)]
    tree = sk.StepTree([1, 2], nodes)
    batch, = sk.pack_trees([tree], [sk.select_pairs(tree)], max_tokens=10**6)
    made = units(segments("test", batch), stateful=True, max_tokens=None)
    assert sum(unit.inner for unit in made) >= 999


@pytest.mark.parametrize("name", ["llama", "lfm2"])
@pytest.mark.parametrize("max_tokens", [None, 16, 10**6])
def test_counted_tokens(name, max_tokens):
    """Twice the trie, and for a model with a state at most one token a branch more in each pass; none of padding."""
    _, batch = pack(((3, 3), (2, 4)), (1, 3))
    model = build(name)
    calls = []
    model.get_input_embeddings().register_forward_hook(lambda module, given, out: calls.append(tuple(given[0].shape)))
    sk.stream_backward(model, batch, lambda out: out.logps.sum(), max_tokens=max_tokens)
    T, branches = batch.input_ids.shape[1], len(segments("test", batch))
    counted = sum(b * length for b, length in calls)
    assert counted == 2 * T if name == "llama" else 2 * T < counted <= 2 * (T + branches)
    assert max(b for b, _ in calls) == 1 if max_tokens is None else max(b for b, _ in calls) > 1
    assert name == "llama" or all(length > 1 for _, length in calls)
    if max_tokens == 16:
        assert all(b * length <= 16 for b, length in calls if b > 1)


def peak(call):
    """Bytes that a call holds at most beyond what was there, as the allocator tells."""
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        call()
    events = sorted((e.start_ns(), e.nbytes()) for e in profile.kineto_results.events() if e.name() == "[memory]")
    held = most = 0
    for _, size in events:
        held += size
        most = max(most, held)
    return most


def bushy(branches, tokens=30):
    nodes = [sk.StepNode(-1, [3 + i % 90 for i in range(2 * tokens)], 0.5)]
    for b in range(branches):
        nodes.append(sk.StepNode(0, [3 + (7 * b + j * j) % 90 for j in range(tokens)], b / 100))
        nodes.append(sk.StepNode(len(nodes) - 1, [3 + (5 * b + j * j) % 90 for j in range(tokens)], b / 100))
    tree = sk.StepTree([1, 2, 3], nodes)
    batch, = sk.pack_trees([tree], [sk.select_pairs(tree, "all")], max_tokens=10**6, values="labelled")
    return batch


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_peak_memory_is_flat_in_the_number_of_branches(name):
    model = tiny_models.build((ATTENTION | HYBRIDS)[name])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    found, index = {}, {}
    for branches in (2, 24):
        batch = bushy(branches)
        index[branches] = 40 * batch.input_ids.numel()  # indices: five integers a token
        for again in (False, True):
            found[branches, again] = peak(
                lambda batch=batch, again=again: sk.stream_backward(model, batch, lambda out: out.logps.sum(),
                                                                    recompute=again))
    for again in (False, True):
        assert found[24, again] <= 1.05 * found[2, again] + 2 * (index[24] - index[2])
    assert found[24, True] < 0.85 * found[24, False]
