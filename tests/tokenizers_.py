"""Small real tokenizers of the three styles in use, trained on the spot."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# The pre-tokenisation of Qwen2 (and, but for one number, of Llama-3): letters take one leading non-letter, digits
# stand alone, newlines go with the blanks before them.
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def _bytes(texts, pre_tokenizer, specials, vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def qwen(texts, vocab_size=2000, chat=True):
    """Byte-level BPE behind the Qwen2 split, NFC, ChatML template."""
    split = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer = _bytes(texts, split, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], vocab_size)
    tokenizer.normalizer = normalizers.NFC()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    if chat:
        fast.chat_template = CHATML
    return fast


def gpt2(texts, vocab_size=2000):
    """Byte-level BPE with GPT-2's own split: a run of blanks leaves its last one to the next word."""
    tokenizer = _bytes(texts, pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"], vocab_size)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def sentencepiece(texts, vocab_size=2000, unigram=False):
    """Metaspace in front of BPE or Unigram, <s> put before every text and, as some models do, </s> behind it."""
    specials = ["<unk>", "<s>", "</s>"]
    # Without a split at spaces BPE merges across words, as SentencePiece does when told to: the hardest case.
    if unigram:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=vocab_size, special_tokens=specials, unk_token="<unk>",
                                          show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, show_progress=False,
                                      max_token_length=16)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=unigram)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if unigram else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in specials])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def styles(texts):
    return {"qwen-chat": qwen(texts), "qwen-raw": qwen(texts, chat=False), "gpt2": gpt2(texts),
            "sp-bpe": sentencepiece(texts), "sp-unigram": sentencepiece(texts, unigram=True)}


def words(texts):
    """A token a word, <s> put before every text; a newline is white space, as between Math-Shepherd's steps."""
    vocabulary = dict.fromkeys(["<unk>", "<s>", "</s>", *texts])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def llama3(texts, template, vocab_size=500):
    """Byte-level BPE with Llama-3's turn tokens, its BOS put before every text."""
    specials = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer = _bytes(texts, pre_tokenizers.ByteLevel(add_prefix_space=False), specials, vocab_size)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    fast.chat_template = template
    return fast
