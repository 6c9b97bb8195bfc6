"The tokenizer in plain Python against the one in Rust, for the dialects of real models and for texts of all kinds."

import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.core.errors import KitError
from llmkit.deploy.bpe import GPT2, PlainTokenizer, plain_spec, python_pattern

tokenizers = pytest.importorskip("tokenizers")
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = [
    "My card was declined at the shop; it's 300 pounds!",
    "Où est ma carte? 我的卡在哪里？ 12½",
    "def f(x):\n    return x\r\n\r\n",
]


def family(name):
    "A small tokenizer of a family, trained here."
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = lambda p: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(p), "isolated"), plain])
    steps = {
        "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "gpt2 as a split": split(GPT2),
        "llama3": split(LLAMA3),
        "qwen": split(QWEN),
        "o200k": split(O200K),
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    }
    tok = tokenizers.Tokenizer(models.BPE(ignore_merges=name == "llama3"))
    tok.pre_tokenizer, tok.decoder = steps[name], decoders.ByteLevel()
    if name == "qwen":
        tok.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        CORPUS * 9,
        trainers.BpeTrainer(vocab_size=420, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False),
    )
    tok.add_tokens(["<tool>"])
    return tok


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40) | st.text(
    "aA's 1²½\t\r\n\x1c\x85\u3000ée\u0301我?!.<>", max_size=30
)


@pytest.mark.parametrize("name", ["gpt2", "gpt2 as a split", "llama3", "qwen", "o200k", "smollm"])
def test_the_same_ids_and_the_same_text(name):
    real = family(name)
    mine = PlainTokenizer(plain_spec(json.loads(real.to_str()), ["<|end|>"], [0]))

    @settings(max_examples=150, deadline=None, database=None)
    @given(TEXT)
    def same(text):
        plain = real.normalizer.normalize_str(text) if real.normalizer else text
        words = [w for w, _ in real.pre_tokenizer.pre_tokenize_str(plain)]
        assert ["".join(mine.letters[b] for b in w.encode()) for w in mine._words(plain)] == words
        ids = real.encode(text).ids
        assert mine.encode(text) == ids
        assert mine.decode(ids) == real.decode(ids)

    same()
    for text in [*CORPUS, "a <tool> b", "x<tool><tool>"]:
        assert mine.encode(text) == real.encode(text).ids


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen", "o200k"])
def test_scripts_that_came_to_unicode_after_this_python(name):
    "Garay, Kirat Rai, Tulu-Tigalari, Ol Onal, Todhri, Nag Mundari, a Han extension, Cyrillic and Latin of Unicode 16, digits of Kawi and Garay."
    real = family(name)
    mine = PlainTokenizer(plain_spec(json.loads(real.to_str()), ["<|end|>"], [0]))
    new = "\U00010d50\U00010d51 \U00016d43\U00016d44 \U00011392 \U0001e5d0\U0001e5d1 \U000105c0 \U0001e4d0 \U0002ebf0\U0002ebf1 \u1c89\u1c8a \ua7cb \U00011f50\U00010d40"
    for text in (new, new.replace(" ", ""), f"my{new[0]} card{new[3:]}"):
        assert mine.encode(text) == real.encode(text).ids


@pytest.mark.parametrize(
    "pattern",
    [
        r"\w+|[^\w\s]+|\s+", r"\b\p{L}+|.", r"\d+|\D+", r"\p{L}+$|.|\n", r"^\p{L}|\p{L}+|.|\n", r"(?i:[a-z]+)|.",
        r"(?i:\p{Lu}+)|.", r"[[:alpha:]]+|.", r"[a-z&&[^aeiou]]+|.", r"[a-z[0-9]]+|.", r"(?m).+|\n",
    ],
)  # fmt: skip
def test_a_pattern_that_means_something_else_to_python_is_refused(pattern):
    with pytest.raises(KitError, match="Python"):
        python_pattern(pattern)


def test_a_very_long_word_takes_no_minutes():
    "A key or an image in base64 that somebody pasted: 50,000 signs without a space."
    real = family("gpt2 as a split")
    mine = PlainTokenizer(plain_spec(json.loads(real.to_str()), ["<|end|>"], [0]))
    rng = random.Random(0)
    for word in ("".join(rng.choice("carddeclinedshop") for _ in range(50_000)), "aab" * 5000):
        start = time.process_time()
        assert mine.encode(word) == real.encode(word).ids
        assert time.process_time() - start < 5
