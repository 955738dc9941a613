"What every tokenizer promises for any text, and GPT-2's vocabulary with and without a network."
import json
import os
import random
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stlm.config import DataConfig
from stlm.data.tokenizers import ByteTokenizer, Gpt2Tokenizer, MarkedTokenizer, Tokenizer, load_tokenizer, open_tokenizer, train_bpe
from stlm.foundation import StlmError

TRAINING_TEXT = " ".join("".join(random.Random(i).choices("aeinorst", k=1 + i % 6)) for i in range(2000))
LEARNED = train_bpe("bpe:400", [TRAINING_TEXT])
MARKED = MarkedTokenizer(LEARNED)
PIECES = ["<|endoftext|>", "\0", "👩‍👩‍👧", " ", "\r\n", "the", "é", "'ll", "'", "l", "123", "\u2028", "\x1c", "!"]
TEXTS = st.text() | st.lists(st.sampled_from(PIECES)).map("".join)

needs_gpt2 = pytest.mark.skipif("STLM_SHARED_DATA" not in os.environ, reason="STLM_SHARED_DATA names no folder with GPT-2's vocabulary")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(Path(os.environ["STLM_SHARED_DATA"]) / "gpt2_bpe"))
        patch.setenv("STLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return open_tokenizer(DataConfig(tokenizer="gpt2"))


def assert_exact(tokenizer: Tokenizer, text: str) -> None:
    [ids] = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.encode(text) == ids.tolist()
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.eot_id not in ids


@given(TEXTS)
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), LEARNED, MARKED], ids=lambda tokenizer: tokenizer.name)
def test_any_text_comes_back(tokenizer, text):
    assert_exact(tokenizer, text)


@needs_gpt2
@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_from_gpt2(gpt2, text):
    assert_exact(gpt2, text)
    assert_exact(MarkedTokenizer(gpt2), text)
    assert_marks(MarkedTokenizer(gpt2), text)


def assert_marks(marked: MarkedTokenizer, text: str) -> None:
    "Taken apart at the marks, the stream is what the symbols of the inner tokenizer stand for."
    symbols, patches = marked.inner.encode(text), [bytearray()]
    for symbol in marked.encode(text):
        if symbol == marked.end_of_patch_id:
            patches.append(bytearray())
        else:
            patches[-1].append(symbol)
    assert patches == [*(marked.inner.decode_bytes([symbol]) for symbol in symbols), b""]


@given(TEXTS)
@settings(max_examples=200, deadline=None)
def test_marks_stand_where_the_inner_symbols_end(text):
    assert_marks(MARKED, text)


def assert_prompt(tokenizer: Tokenizer, prompt: str, continuation: str) -> None:
    "What is said of a prompt holds whatever follows: the marks that stand in it and those that do not, up to its last word."
    said, whole = tokenizer.encode_prompt(prompt), tokenizer.encode(prompt + continuation)
    assert tokenizer.decode(said) == prompt
    settled = max((place + 1 for place, symbol in enumerate(said) if symbol == tokenizer.end_of_patch_id), default=0)
    assert said[:settled] == whole[:settled]


@given(TEXTS, TEXTS)
@settings(max_examples=500, deadline=None)
def test_a_prompt_says_nothing_that_its_continuation_takes_back(prompt, continuation):
    assert_prompt(MARKED, prompt, continuation)


@needs_gpt2
@given(prompt=TEXTS, continuation=TEXTS)
@settings(max_examples=300, deadline=None)
def test_nor_does_one_in_the_patches_of_gpt2(gpt2, prompt, continuation):
    assert_prompt(MarkedTokenizer(gpt2), prompt, continuation)


@pytest.mark.parametrize("prompt", ["a rest", "a rest one", "it's re", "none, no", "a\n\n  tree "])
def test_only_the_last_word_of_a_prompt_is_left_open(prompt):
    said = MARKED.encode_prompt(prompt)
    last = prompt.rstrip(" ").rpartition(" ")[0] if not prompt.endswith(" ") else prompt.rstrip()
    assert said[:-len(prompt[len(last):])] == MARKED.encode(last)


@given(st.lists(st.integers(0, 399)))
@settings(deadline=None)
def test_any_symbols_can_be_decoded(ids):
    raw = LEARNED.decode_bytes(ids)
    assert len(raw) == LEARNED.token_bytes[np.array(ids, dtype=int)].sum()
    assert LEARNED.decode(ids) == raw.decode("utf-8", errors="replace")


@given(st.text(st.characters()), st.characters(categories=["Cs"]), st.text())
@settings(deadline=None)
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), LEARNED, MARKED], ids=lambda tokenizer: tokenizer.name)
def test_a_lone_surrogate_is_named(tokenizer, before, surrogate, after):
    before = before.encode("utf-8", "ignore").decode()
    with pytest.raises(StlmError, match=f"character {len(before)} of the text is a lone surrogate"):
        tokenizer.encode_batch(["fine", before + surrogate + after])


@pytest.mark.parametrize("text", ["a" * 200_000, " " * 200_000, "\n" * 50_000, "é😀" * 30_000, "-=" * 100_000])
def test_monotonous_text_is_no_trap(text):
    assert_exact(LEARNED, text)


@needs_gpt2
def test_what_gpt2_cannot_read_is_named(gpt2):
    with pytest.raises(StlmError, match=r"cannot read the document that begins with 'the end'.*data\.tokenizer=bpe:V"):
        gpt2.encode(" " * 1_000_000 + "the end")


def test_learning_is_the_same_in_every_process(tmp_path):
    code = "from stlm.data.tokenizers import train_bpe; print(train_bpe('bpe:400', [open(__import__('sys').argv[1]).read()]).fingerprint)"
    (tmp_path / "text").write_text(TRAINING_TEXT)
    for seed, threads in (("1", "1"), ("2", "4")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        found = subprocess.run([sys.executable, "-c", code, tmp_path / "text"], env=environment, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == LEARNED.fingerprint


def test_only_the_train_split_and_only_once(tmp_path, monkeypatch):
    monkeypatch.setenv("STLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("\n\n".join(f"document {i}" for i in range(200)))
    config = DataConfig(corpus=f"file:{tmp_path}/a.txt", tokenizer="bpe:300", valid_fraction=0.2)
    first = open_tokenizer(config)
    monkeypatch.setattr("stlm.data.tokenizers.train_bpe", lambda *_: pytest.fail("this was learned already"))
    assert open_tokenizer(config).fingerprint == first.fingerprint


def test_gpt2_without_a_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("STLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(StlmError, match="TIKTOKEN_CACHE_DIR") as error:
        open_tokenizer(DataConfig(tokenizer="gpt2"))
    assert "\n" not in str(error.value)


def unreachable(*_, **__):
    raise urllib.error.URLError("no network")


@needs_gpt2
def test_gpt2_is_gpt2_and_its_folder_needs_no_network(gpt2, tmp_path, monkeypatch):
    assert gpt2.encode("Hello world<|endoftext|>") == [15496, 995, 27, 91, 437, 1659, 5239, 91, 29]
    assert (gpt2.vocab_size, gpt2.eot_id, gpt2.fingerprint) == (50257, 50256, "a76afe6fde5aad03")
    gpt2.save(tmp_path)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/nowhere")
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, Gpt2Tokenizer) and again.encode("It's naïve 😀") == gpt2.encode("It's naïve 😀")


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), LEARNED, MARKED], ids=lambda tokenizer: tokenizer.name)
def test_damage_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    good = json.loads(file.read_text())
    for key in good:
        for wrong in (None, [], "x", 3):
            file.write_text(json.dumps(good | {key: wrong}))
            if good[key] != wrong:
                with pytest.raises(StlmError, match=r"tokenizer\.json"):
                    load_tokenizer(tmp_path)
