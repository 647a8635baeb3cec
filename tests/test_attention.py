"""tree_attention_mask in its three forms, against the rule written out in loops."""

from __future__ import annotations

import pytest
import tiny_trees
import torch
import transformers as hf
from tiny_models import SMALL, build, one_thread  # noqa: F401
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import svpo_kernels as sk
from svpo_kernels import tree_attention_mask
from svpo_kernels.bench.trees import deep_tree
from svpo_kernels.trees.masks import block_mask


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
    with torch.autocast("cpu", torch.bfloat16):
        assert tree_attention_mask(batch.subtree_end, "additive").dtype == torch.bfloat16
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


def packed(trees):
    return sk.pack_trees(trees, [sk.select_pairs(tree, "all") for tree in trees], max_tokens=10**6)[0]


PACKS = {
    "two small trees": pack,
    "deep": lambda: pack(3, depth=5),
    "wide": lambda: packed([deep_tree(depth=1, children=9, tokens=(3, 60), prompt=70)]),
    "long steps": lambda: packed([deep_tree(seed, depth=2, children=3, tokens=(40, 90)) for seed in range(2)]),
    "full last block": lambda: packed([deep_tree(depth=3, children=2, tokens=(32, 32), prompt=64)]),
    "chains": lambda: packed([deep_tree(seed, depth=1, children=2, tokens=(1, 200), prompt=5) for seed in range(4)]),
}
FIELDS = [name + field for name in ("kv", "q", "full_kv", "full_q") for field in ("_num_blocks", "_indices")]


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("name", PACKS)
def test_block_masks_equal_those_made_from_every_pair(name, size):
    batch = PACKS[name]()
    end, position = batch.subtree_end, batch.position_ids[0]
    T = len(end)
    padded = torch.cat([end, torch.arange(T, T + 45) + 1])
    for ends, positions in ((end, position), (padded, torch.cat([position, torch.zeros(45, dtype=torch.int64)]))):
        for window in (None, 1, 7, 40, 150):
            ours = block_mask(ends, window, positions, size)
            theirs = create_block_mask(ours.mask_mod, None, None, len(ends), len(ends), device="cpu", BLOCK_SIZE=size)
            for field in FIELDS:
                a, b = getattr(ours, field), getattr(theirs, field)
                assert a.dtype == b.dtype and torch.equal(a, b), (field, window)
            assert ours.seq_lengths == theirs.seq_lengths and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    assert ours.BLOCK_SIZE == (size, size) and torch.equal(
        tree_attention_mask(end, "block").kv_indices, block_mask(end, size=128).kv_indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_additive_mask_gives_the_bits_of_the_bool_one(dtype):
    batch = pack(3, depth=4)
    T = batch.input_ids.shape[1]
    additive = tree_attention_mask(batch.subtree_end, "additive", dtype=dtype)
    assert T % 8 and all(stride % 8 == 0 for stride in additive.stride()[:-1]) and additive.stride(-1) == 1
    upstream = torch.randn(1, 2, T, 16, dtype=dtype)
    found = []
    for mask in (tree_attention_mask(batch.subtree_end), additive):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 2, T, 16, dtype=dtype, requires_grad=True) for _ in range(3))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
        found.append((out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_layers_share_one_additive_mask(implementation, autocast):
    """A bool mask becomes a float (T, T) in every layer, which keeps it for its backward; so does one in another dtype
    than attention runs in."""
    batch = pack(3, depth=4)
    T = batch.input_ids.shape[1]
    model = build(hf.LlamaConfig(**SMALL | dict(num_hidden_layers=4)), implementation)
    masks = set()

    def keep(tensor):
        if tensor.numel() == T * T:
            masks.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        inputs = batch.model_inputs(model)
        mask = inputs["attention_mask"]
        assert mask.dtype == (torch.bfloat16 if autocast else torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model.model(**inputs, use_cache=False).last_hidden_state
    out.sum().backward()
    assert masks <= {mask.untyped_storage().data_ptr()}
    assert implementation == "eager" or masks  # eager's sum with the mask keeps nothing of it


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
