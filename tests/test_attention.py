"""tree_attention_mask in its three forms, against the rule written out in loops."""

from __future__ import annotations

import pytest
import tiny_trees
import torch
from torch.nn.attention.flex_attention import flex_attention

import svpo_kernels as sk
from svpo_kernels import tree_attention_mask


def pack(seed=0, depth=3):
    trees = [tiny_trees.random_tree(seed + i, depth=depth, children=2) for i in range(2)]
    batch, = sk.pack_trees(trees, [sk.select_pairs(tree, "all") for tree in trees], max_tokens=10**6)
    return batch


def visible(batch, window=None):
    """(T, T) bool from parents: a token sees its ancestors, itself included, those less than `window` up."""
    depth, end = batch.position_ids[0].tolist(), batch.subtree_end.tolist()
    T = len(end)
    seen = torch.zeros(T, T, dtype=torch.bool)
    for q in range(T):
        level = depth[q]
        for k in range(q, -1, -1):  # going back, the next token one level up is the parent
            if depth[k] == level and end[k] > q:
                seen[q, k] = window is None or depth[q] - depth[k] < window
                level -= 1
        assert level == -1
    return seen


@pytest.mark.parametrize("window", [None, 1, 5, 1000])
def test_dense_and_additive(window):
    batch = pack()
    expected = visible(batch, window)
    options = dict(window=window, position_ids=batch.position_ids)
    dense = tree_attention_mask(batch.subtree_end, "dense", **options)
    assert dense.dtype == torch.bool and dense.shape == (1, 1, *expected.shape) and torch.equal(dense[0, 0], expected)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        additive = tree_attention_mask(batch.subtree_end, "additive", dtype=dtype, **options)
        low = torch.finfo(dtype).min
        assert additive.dtype == dtype and torch.equal(additive[0, 0] == 0, expected)
        assert torch.equal(additive[0, 0] == low, ~expected)
    assert tree_attention_mask(batch.subtree_end, "additive").dtype == torch.float32
    assert torch.equal(tree_attention_mask(batch.subtree_end.int(), window=window, position_ids=batch.position_ids[0]),
                       dense)


@pytest.mark.parametrize("window", [None, 5])
def test_block_mask_attends_like_the_dense_one(window):
    batch = pack(3, depth=4)
    T = batch.input_ids.shape[1]
    assert T > 256 and T % 128  # several blocks, the last one cut
    options = dict(window=window, position_ids=batch.position_ids)
    block = tree_attention_mask(batch.subtree_end, "block", **options)
    assert tuple(block.shape) == (1, 1, T, T)
    index = torch.arange(T)
    rule = block.mask_mod(0, 0, index[:, None], index)
    assert torch.equal(rule, visible(batch, window))
    assert block.to_dense()[0, 0].sum() < block.to_dense().numel()  # some blocks are skipped
    q, k, v = torch.randn(3, 1, 2, T, 16)
    dense = tree_attention_mask(batch.subtree_end, **options)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, dense)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=block), expected, rtol=1e-5, atol=1e-5)


def test_padding_sees_itself_and_makes_no_nan():
    batch = pack()
    T = batch.input_ids.shape[1]
    padded = torch.cat([batch.subtree_end, torch.arange(T, T + 9) + 1])
    mask = tree_attention_mask(padded)[0, 0]
    assert torch.equal(mask[:T, :T], visible(batch)) and torch.equal(mask[T:, T:], torch.eye(9, dtype=torch.bool))
    assert not mask[:T, T:].any() and not mask[T:, :T].any()


def test_no_token():
    none = torch.zeros(0, dtype=torch.int64)
    assert tree_attention_mask(none).shape == tree_attention_mask(none, "additive").shape == (1, 1, 0, 0)
    with pytest.raises(ValueError, match="at least one token for kind='block'"):
        tree_attention_mask(none, "block")


@pytest.mark.parametrize("arguments, error, message", [
    (dict(kind="causal"), ValueError, "kind must be one of 'dense', 'additive', 'block', got str 'causal'"),
    (dict(subtree_end=[1, 2]), TypeError, r"subtree_end must be a \(T,\) integer tensor, got list"),
    (dict(subtree_end=torch.ones(2)), TypeError, r"subtree_end must be .* got \(2,\) float32 on cpu"),
    (dict(subtree_end=torch.ones(1, 2, dtype=torch.int64)), TypeError, r"subtree_end must be .* got \(1, 2\) int64"),
    (dict(subtree_end=torch.tensor([2, 3])), IndexError, r"subtree_end must be above each .* T = 2, got \[2, 3"),
    (dict(subtree_end=torch.tensor([2, 1])), IndexError, r"subtree_end must be above each .* T = 2, got \[2, 1"),
    (dict(window=0), ValueError, "window must be >= 1 or None"),
    (dict(window=4), ValueError, "position_ids must be given with a window"),
    (dict(window=4, position_ids=torch.arange(3)), ValueError, r"position_ids must be \(T,\) or \(1, T\) with T = 2"),
    (dict(dtype=torch.bfloat16), ValueError, "dtype must be a floating dtype, with kind='additive' only"),
    (dict(kind="additive", dtype=torch.int32), ValueError, "dtype must be a floating dtype"),
])
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match="tree_attention_mask: " + message):
        tree_attention_mask(**dict(subtree_end=torch.tensor([2, 2])) | arguments)
