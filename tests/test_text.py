"""tree_from_text: every path is, id by id, what the tokenizer makes of its text."""

from __future__ import annotations

import functools
import random

import pytest
import tiny_trees
import tokenizers_
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import svpo_kernels as sk
from svpo_kernels import StepNode, tree_from_text
from svpo_kernels.trees import joint, text

STYLES = ["qwen-chat", "qwen-raw", "gpt2", "sp-bpe", "sp-unigram"]
SEPARATORS = ["", " ", "\n", "\n\n"]
# Text whose pieces merge across borders: blanks, digits, punctuation, marks that combine, bytes of one character.
PIECES = ["the", " sum", "  ", "\n", "\n\n", " \n", "12", "3", "4.5", "x^2", "\\(", "\\)", "=", " =", "'s", "é", "中文",
          "e\u0301", "🙂", "\t", "So", " so", ".", "...", "a", "b", "ab", "t", "he"]


@functools.cache
def tokenizer_of(style, corpus):
    return tokenizers_.styles(list(corpus))[style]


def corpus():
    rng = random.Random(0)
    return tuple("".join(rng.choices(PIECES, k=60)) for _ in range(40))


def random_nodes(rng, count):
    nodes = []
    for i in range(count):
        nodes.append(StepNode(rng.randrange(-1, i), text="".join(rng.choices(PIECES, k=rng.randint(1, 5)))))
    parents = {node.parent for node in nodes}
    for i, node in enumerate(nodes):
        node.terminal, node.q_value = i not in parents and rng.random() < 0.5, round(rng.uniform(-1, 1), 2)
    return nodes


def text_of(tokenizer, prompt, nodes, i, separator, end):
    """The whole text of a path, and how the tokenizer is called for it: an independent statement of the contract."""
    steps = []
    while i != -1:
        steps.append(nodes[i].text + end + ("" if nodes[i].terminal else separator))
        i = nodes[i].parent
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return prompt + "".join(reversed(steps))


def ids_of(tokenizer, text, terminal):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not tokenizer.chat_template and tokenizer.bos_token == "<s>":
        ids = [tokenizer.bos_token_id, *ids]
    return ids + [tokenizer.eos_token_id] if terminal else ids  # of this ChatML too: <|im_end|>


def check(tokenizer, prompt, nodes, separator, end):
    tree = tree_from_text(tokenizer, prompt, nodes, step_separator=separator, step_end=end)
    for i, node in enumerate(nodes):
        assert tree.path(i) == ids_of(tokenizer, text_of(tokenizer, prompt, nodes, i, separator, end), node.terminal)
        siblings = tree.roots if node.parent == -1 else tree.children[node.parent]
        parent = tree.path(node.parent)
        starts = {tree.start[s] for s in siblings}
        longest = next(k for k in range(len(parent), -1, -1) if all(tree.path(s)[:k] == parent[:k] for s in siblings))
        assert starts == {longest}
    return tree


def check_pack(tree, batch):
    """Every step of the pack: its path, read off subtree_end, is the tree's; its value is read at its last token."""
    ids, depth = batch.input_ids[0], batch.position_ids[0]
    for (_, node), row in zip(batch.node_of_step.tolist(), batch.step_ends.tolist(), strict=True):
        path = [k for k in range(row + 1) if row < batch.subtree_end[k]]
        assert ids[path].tolist() == tree.path(node)
        assert depth[path].tolist() == list(range(tree.length[node]))


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("style", STYLES)
def test_every_path_is_the_tokenizers_output(style, separator):
    tokenizer = tokenizer_of(style, corpus())
    rng = random.Random(f"{style}{separator}")
    for _ in range(4):
        nodes = random_nodes(rng, 25)
        tree = check(tokenizer, "What is 12+3?", nodes, separator, rng.choice(["", "<eos>", " ki"]))
        everything = [list(range(len(nodes)))]
        for max_tokens in (10**6, max(tree.length) * 2):
            batches = sk.pack_trees([tree], [[]], max_tokens=max_tokens, values="labelled", sft=everything)
            for batch in batches:
                check_pack(tree, batch)
            assert sum(len(batch.sft_steps) for batch in batches) == len(nodes)


@pytest.mark.parametrize("separator", ["", "\n\n"])
@pytest.mark.parametrize("style", STYLES)
def test_real_trees(shared_data, style, separator):
    rows = tiny_trees.real_texts(shared_data / "aps_trees.jsonl")
    tokenizer = tokenizer_of(style, tuple(tiny_trees.all_texts(rows)))
    prompt, nodes = rows[2]
    tree = check(tokenizer, prompt, nodes, separator, "")
    check_pack(tree, *sk.pack_trees([tree], [sk.select_pairs(tree, "all")], max_tokens=10**6, values="labelled"))


@pytest.mark.parametrize("style", ["gpt2", "sp-bpe"])
def test_the_random_texts_merge_across_borders(style):
    tokenizer, rng = tokenizer_of(style, corpus()), random.Random(1)
    trees = [tree_from_text(tokenizer, "Q", random_nodes(rng, 25), step_separator="") for _ in range(5)]
    assert sum(tree.start[i] < tree.length[n.parent] for tree in trees for i, n in enumerate(tree.nodes)
               if n.parent >= 0) > 20


def test_a_child_may_start_before_its_parent_does():
    """With the merges (h, e) and (t, he), the third step takes back tokens of both steps before it."""
    merges = [("h", "e"), ("t", "he")]
    vocab = {token: i for i, token in enumerate(["x", "t", "h", "e", "he", "the"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=merges)))
    nodes = [StepNode(-1, text="t"), StepNode(0, text="h"), StepNode(1, text="e"), StepNode(1, text="x")]
    tree = tree_from_text(tokenizer, "x", nodes, step_separator="")
    assert [tree.path(i) for i in range(4)] == [[0, 1], [0, 1, 2], [0, 5], [0, 1, 2, 0]]
    assert tree.start == [1, 2, 1, 1]
    batch, = sk.pack_trees([tree], [[[2, 3]]], max_tokens=9, values="labelled", sft=[[0, 1]])
    check_pack(tree, batch)
    assert batch.plan.counts[batch.pairs[0]].tolist() == [1, 3]


def test_eos_follows_terminal_steps_only():
    tokenizer = tokenizer_of("gpt2", corpus())
    nodes = [StepNode(-1, text="the sum", terminal=True), StepNode(-1, text="12")]
    with_eos = tree_from_text(tokenizer, "a", nodes)
    without = tree_from_text(tokenizer, "a", nodes, turn_end="none")
    assert with_eos.path(0) == [*without.path(0), tokenizer.eos_token_id] and with_eos.path(1) == without.path(1)
    assert tokenizer.decode(without.path(0)) == "athe sum" and tokenizer.decode(without.path(1)) == "a12\n\n"


def test_fields_survive_and_mappings_and_messages_will_do():
    tokenizer = tokenizer_of("qwen-chat", corpus())
    node = dict(parent=-1, text="the sum", q_value=0.5, visits=3.0, prior=0.2, ref_logp=-1.5, terminal=True)
    tree = tree_from_text(tokenizer, [dict(role="system", content="a"), dict(role="user", content="b")], [node])
    made = tree.nodes[0]
    assert {name: getattr(made, name) for name in node} == node
    assert tokenizer.decode(tree.prompt_ids).endswith("<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n")


def test_ids_of_special_tokens_put_behind_a_text_are_cut():
    tokenizer = tokenizer_of("sp-unigram", corpus())
    assert tokenizer("the sum")["input_ids"][-1] == tokenizer.eos_token_id  # this style ends every text so
    tree = tree_from_text(tokenizer, "the", [StepNode(-1, text=" sum"), StepNode(0, text=" so")])
    assert all(tokenizer.eos_token_id not in tree.path(i) for i in (-1, 0, 1))


@pytest.mark.parametrize("nodes, arguments, error, message", [
    ([StepNode(-1)], {}, TypeError, r"nodes\[0\].text must be a string, got None"),
    ([StepNode(-1, [1], text="a")], {}, ValueError, "ids are never re-tokenised"),
    ([StepNode(3, text="a")], {}, ValueError, r"nodes\[0\].parent"),
    ([StepNode(1, text="a"), StepNode(0, text="b")], {}, ValueError, "a cycle"),
    (["a"], {}, TypeError, r"nodes\[0\] must be a StepNode or a mapping"),
    ([StepNode(-1, text="a"), {"parent": 0, "txt": "b"}], {}, ValueError,
     r"^tree_from_text: nodes\[1\] must be a mapping with fields of parent, q_value, .*text, got the field 'txt'$"),
    ([dict(parent=-1, text="a", token_ids=[1])], {}, ValueError, r"nodes\[0\] must be .*, got the field 'token_ids'"),
    ([{"text": "a"}], {}, ValueError,
     r"^tree_from_text: nodes\[0\] must be a mapping with a parent, .*, got the fields text$"),
    ([{"parent": -1, "text": "a", "q_value": 2}], {}, ValueError,
     r"^tree_from_text: nodes\[0\].q_value must be in \[-1, 1\] or None, got int 2$"),
    ([{"parent": "0", "text": "a"}], {}, TypeError, r"^tree_from_text: nodes\[0\].parent must be an integer, .*'0'$"),
    (None, {}, TypeError, "^tree_from_text: nodes must be StepNodes or mappings with their fields, got None$"),
    ([], dict(step_separator=None), TypeError, "^tree_from_text: step_separator must be a string, got None$"),
    ([], dict(step_end=3), TypeError, "^tree_from_text: step_end must be a string, got int 3$"),
    ([StepNode(-1, text="")], dict(step_separator=""), ValueError, "text that adds a token"),
])
def test_bad_nodes(nodes, arguments, error, message):
    with pytest.raises(error, match=message):
        tree_from_text(tokenizer_of("gpt2", corpus()), "the sum", nodes, **arguments)


def test_bad_prompts_and_tokenizers():
    tokenizer = tokenizer_of("gpt2", corpus())
    node = StepNode(-1, text="the", terminal=True)
    with pytest.raises(ValueError, match="prompt must be text for a tokenizer without a chat template, got messages"):
        tree_from_text(tokenizer, [dict(role="user", content="a")], [node])
    for prompt in (None, 3, ["a"]):
        for style in ("gpt2", "qwen-chat"):
            with pytest.raises(TypeError, match="tree_from_text: prompt must be text or chat messages, got "):
                tree_from_text(tokenizer_of(style, corpus()), prompt, [node])
    for wrong in (None, "gpt2"):
        with pytest.raises(TypeError, match="tree_from_text: tokenizer must be a Hugging Face tokenizer, got "):
            tree_from_text(wrong, "a", [node])
    with pytest.raises(ValueError, match="prompt must be text of which every first step keeps the first token"):
        tree_from_text(tokenizer, "", [node])
    mute = tokenizers_.gpt2(["a"])
    mute.eos_token = None
    with pytest.raises(ValueError, match="turn_end must be 'none' or a text for a tokenizer without an EOS token"):
        tree_from_text(mute, "a", [node])
    assert len(tree_from_text(mute, "a", [node], turn_end="none")) == 1


def chain_nodes(rng, count, long=(3, 12)):
    """A chain with a sibling here and there, of pieces that merge across borders."""
    nodes, last = [], -1
    for _ in range(count):
        for _ in range(rng.choice([1, 1, 2])):
            nodes.append(StepNode(last, text="".join(rng.choices(PIECES, k=rng.randint(*long))) + "a",
                                  q_value=round(rng.uniform(-1, 1), 2)))
        last = len(nodes) - 1
    return nodes


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("separator", ["", "\n\n"])
def test_texts_that_go_on_from_one_another_are_those_tokenised_whole(style, separator, monkeypatch):
    tokenizer = tokenizer_of(style, corpus())
    grown = []
    monkeypatch.setattr(joint, "LEAST", 0)
    grow = joint.grow
    monkeypatch.setattr(joint, "grow", lambda *given: grown.append(grow(*given)) or grown[-1])
    for seed in range(6):
        rng = random.Random(seed)
        nodes = chain_nodes(rng, 40)
        nodes[-1].terminal = style == "qwen-chat"
        prompt = "".join(rng.choices(PIECES, k=20)) + "q"
        ours = tree_from_text(tokenizer, prompt, nodes, step_separator=separator)
        with monkeypatch.context() as patch:
            patch.setattr(joint, "pays", lambda *given: False)
            whole = tree_from_text(tokenizer, prompt, nodes, step_separator=separator)
        for i in range(len(nodes)):
            assert ours.path(i) == whole.path(i), (seed, i)
        assert ours.start == whole.start and ours.prompt_ids == whole.prompt_ids
        assert [ours.value_end(i) for i in range(len(nodes))] == [whole.value_end(i) for i in range(len(nodes))]
    assert len(grown) == 6
    if style in ("qwen-chat", "qwen-raw", "gpt2"):
        assert None not in grown


def test_a_long_chain_is_tokenised_once(monkeypatch):
    rng = random.Random(0)
    tokenizer = tokenizer_of("qwen-chat", corpus())
    nodes = chain_nodes(rng, 300, (20, 30))
    seen = []
    tokenized = text._tokenized
    monkeypatch.setattr(text, "_tokenized", lambda tokenizer, texts, *given: seen.append(
        sum(map(len, texts))) or tokenized(tokenizer, texts, *given))
    tree = tree_from_text(tokenizer, "q", nodes)
    assert len(seen) == 1 and seen[0] < 8 * sum(len(node.text) + 2 for node in nodes)
    assert tree.path(len(nodes) - 1) == ids_of(
        tokenizer, text_of(tokenizer, "q", nodes, len(nodes) - 1, "\n\n", ""), False)
