"Scoring, generation and bits per byte agree with one another and with the full forward pass, for every kind of positions and tokenizer."
import math
import tracemalloc
import typing
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from stlm.config import DataConfig, ModelConfig, PatchConfig, Positions
from stlm.data.tokenizers import Tokenizer, open_tokenizer
from stlm.evaluate.bits import bits_per_byte, ratio_interval
from stlm.evaluate.progression import make_items, progression
from stlm.foundation import StlmError
from stlm.infer.generate import Sampling, generate, steps, stream
from stlm.infer.scoring import score, score_symbols, token_logprobs
from stlm.model.lm import LanguageModel

CONTEXT = 48
TEXTS = ["The quick brown fox jumps over the lazy dog. " * 9, "naïve café 🙂 清单\n\ttabs and \x00 NUL", "x", "",
         "One more line, and then another one; and so on. " * 3]


@pytest.fixture(scope="module", params=["bytes", "bpe:300", "bytes+bpe:300"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    "A tokenizer; two of them are trained on a small corpus, in a cache of its own."
    folder = tmp_path_factory.mktemp("tokenizer")
    documents = [f"Document {number}: {text}" for number in range(40) for text in TEXTS[::4]]
    (folder / "corpus.txt").write_text("\n\n".join(documents), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STLM_CACHE", str(folder / "cache"))
        return open_tokenizer(DataConfig(corpus=f"file:{folder / 'corpus.txt'}", tokenizer=request.param))


@pytest.fixture(params=typing.get_args(Positions))
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> LanguageModel:
    "An untrained model with decided opinions: large initial weights keep the best symbol far from the second best."
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, context=CONTEXT, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2,
                                     d_ff=64, positions=request.param, init_std=0.3, tied_head=False, dropout=0.2))


@torch.inference_mode()
def greedy_by_full_forward(model: LanguageModel, symbols: list[int], count: int) -> list[int]:
    "The most probable symbols, each from a forward pass over everything that the model is meant to see."
    model.eval()
    seen, written = list(symbols), []
    for _ in range(count):
        if len(seen) > CONTEXT:
            seen = seen[-(CONTEXT // 2):]
        written.append(int(model(torch.tensor([seen]))[0, -1].argmax()))
        seen.append(written[-1])
    return written


def test_greedy_generation_with_the_cache_is_greedy_by_full_forward(model: LanguageModel, tokenizer: Tokenizer) -> None:
    prompt = [tokenizer.eot_id, *tokenizer.encode_prompt("The quick")]
    written = [step.symbol for step in steps(model, prompt, Sampling(max_tokens=3 * CONTEXT, temperature=0), eot_id=-1)]
    assert written == greedy_by_full_forward(model, prompt, 3 * CONTEXT)
    ended = tokenizer.decode(written[:written.index(tokenizer.eot_id)] if tokenizer.eot_id in written else written)
    assert generate(model, tokenizer, "The quick", max_tokens=3 * CONTEXT, temperature=0) == ended


def test_what_was_written_is_scored_as_it_was_written(model: LanguageModel, tokenizer: Tokenizer) -> None:
    prompt = [tokenizer.eot_id, *tokenizer.encode("One more")]
    sampling = Sampling(max_tokens=CONTEXT - len(prompt), temperature=0.9, top_k=50, top_p=0.95)
    written = list(steps(model, prompt, sampling, tokenizer.eot_id))
    symbols = prompt + [step.symbol for step in written]
    np.testing.assert_allclose(token_logprobs(model, [symbols], [len(prompt)])[0], [step.logprob for step in written], atol=1e-3)


def test_the_same_seed_writes_the_same_text_whatever_happens_around(model: LanguageModel, tokenizer: Tokenizer) -> None:
    torch.manual_seed(1)
    pieces = list(stream(model, tokenizer, "x", max_tokens=80, seed=5))
    torch.manual_seed(2)
    assert "".join(pieces) == generate(model, tokenizer, "x", max_tokens=80, seed=5)
    assert "".join(pieces) != generate(model, tokenizer, "x", max_tokens=80, seed=6)


def test_scores_do_not_depend_on_the_batch(model: LanguageModel, tokenizer: Tokenizer) -> None:
    model.train()  # dropout must not act, and the mode must come back
    sequences = [[tokenizer.eot_id, *tokenizer.encode(text)][:CONTEXT + 1] for text in TEXTS]
    first = [max(1, len(sequence) // 3) for sequence in sequences]
    alone = [token_logprobs(model, [sequence], [start])[0] for sequence, start in zip(sequences, first, strict=True)]
    for limit, order in ((10_000, 1), (100, 1), (10_000, -1)):
        together = token_logprobs(model, sequences[::order], first[::order], max_tokens_in_batch=limit)[::order]
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-3)
    assert model.training


def branches(random: np.random.Generator) -> Iterator[tuple[str, str]]:
    "Pairs as benchmarks have them, drawn at random: contexts that begin alike, several continuations, letters, duplicates, long ones."
    words = "".join(TEXTS).split(" ")
    beginnings = [""]
    for _ in range(20):
        further = " ".join(random.choice(words, random.integers(1, 4)))
        beginnings.append(str(random.choice(beginnings)) + further + random.choice(["", " "]))
    for context in random.choice(beginnings, 40):
        yield str(context), " " + " ".join(random.choice(words, random.integers(1, 6)))
    yield from (("Question: The\nAnswer:", f" {letter}") for letter in "ABCDA")
    yield from (("", "The quick" + end) for end in (" brown", " ", " brown fox", " brown"))
    yield TEXTS[0], " fox"
    yield "x", TEXTS[0]


def check_sharing(model: LanguageModel, tokenizer: Tokenizer) -> None:
    "Scores are those of each pair alone, whatever else is asked and in which order."
    pairs = list(branches(np.random.default_rng(len(tokenizer.name))))
    alone = [score(model, tokenizer, [pair])[0] for pair in pairs]
    for order in (1, -1):
        together = score(model, tokenizer, pairs[::order])[::order]
        np.testing.assert_allclose([each.logprob for each in together], [each.logprob for each in alone], rtol=1e-5, atol=1e-4)
        assert [replace(each, logprob=0) for each in together] == [replace(each, logprob=0) for each in alone]
    assert alone[-1].truncated and alone[-2].truncated and not all(each.truncated for each in alone)


def test_what_is_shared_changes_no_score(model: LanguageModel, tokenizer: Tokenizer) -> None:
    check_sharing(model, tokenizer)


@pytest.mark.parametrize("changes", [dict(ngram=3, ngram_buckets=500), dict(patches=PatchConfig(patcher="space", d_local=32, n_heads=2))])
def test_what_is_shared_changes_no_score_of_bytes(changes: dict) -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=257, context=CONTEXT, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=64, init_std=0.3)
    check_sharing(LanguageModel(replace(config, **changes)), open_tokenizer(DataConfig(tokenizer="bytes")))


def test_of_symbols_as_probable_as_each_other_greedy_decoding_writes_the_first(model: LanguageModel, tokenizer: Tokenizer) -> None:
    last = tokenizer.vocab_size - 1

    def written(*symbols: int) -> list[bool]:
        return [bool(each.greedy[0]) for each in score_symbols(model, [[5, symbol] for symbol in symbols], [1] * len(symbols))]

    with torch.no_grad():
        width = model.eval().hidden(torch.tensor([[5]]))[0, 0]
        model.head_weight.zero_()  # every symbol is as probable as every other
        assert written(0, 1, last) == [True, False, False]
        largest = width.abs().argmax()
        model.head_weight[[3, 7, last], largest] = width.sign()[largest]  # three are better, by one product each
    assert written(0, 3, 7, last) == [False, True, False, False]


def test_a_score_agrees_with_bits_per_byte(model: LanguageModel, tokenizer: Tokenizer) -> None:
    texts = [text[:CONTEXT // 4] for text in TEXTS if text]  # each in one window, be it of marked bytes
    bits = bits_per_byte(model, tokenizer, texts)
    without_end = (bits.per_document["nats"] - bits.per_document["end_nats"]).to_numpy()
    scored = score(model, tokenizer, [("", text) for text in texts])
    np.testing.assert_allclose([-each.logprob for each in scored], without_end, rtol=1e-4)
    assert bits.n_bytes == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize(("window", "stride"), [(None, None), (CONTEXT, 7), (5, 5), (5, 1)])
def test_bits_per_byte_counts_every_byte_and_every_symbol_once(model: LanguageModel, tokenizer: Tokenizer,
                                                               window: int | None, stride: int | None) -> None:
    bits = bits_per_byte(model, tokenizer, TEXTS, window, stride)
    assert bits.per_document["n_bytes"].tolist() == [len(text.encode()) for text in TEXTS]
    assert bits.per_document["n_tokens"].tolist() == [len(tokenizer.encode(text)) + 1 for text in TEXTS]
    assert bits_per_byte(model, tokenizer, TEXTS[::-1], window, stride, max_tokens_in_batch=1).nats == pytest.approx(bits.nats, rel=1e-4)


def test_costs_that_are_no_numbers_are_refused(model: LanguageModel, tokenizer: Tokenizer) -> None:
    broken = LanguageModel(model.config)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    with pytest.raises(StlmError, match="not finite; its weights are damaged"):
        bits_per_byte(broken, tokenizer, TEXTS)
    with pytest.raises(StlmError, match="not finite; its weights are damaged"):
        progression(broken, tokenizer, make_items(["some words that follow one another and say little " * 5], 2, 4, 4))


def test_an_interval_over_many_documents_takes_no_more_memory_than_one_over_few() -> None:
    draw = np.random.default_rng(0)
    sizes = draw.integers(100, 10_000, 20_000)
    tracemalloc.start()
    low, high = ratio_interval(sizes * draw.normal(2, 0.5, len(sizes)), sizes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150e6 and 1.98 < low < 2 < high < 2.02


def test_no_symbol_sees_itself_or_what_follows(model: LanguageModel, tokenizer: Tokenizer) -> None:
    sequence = [tokenizer.eot_id, *tokenizer.encode(TEXTS[0])][:CONTEXT + 1]
    changed = sequence[:20] + [(symbol + 1) % 256 for symbol in sequence[20:]]
    before, after = token_logprobs(model, [sequence, changed], [1, 1])
    np.testing.assert_allclose(before[:19], after[:19], atol=1e-4)
    assert np.abs(before[19:] - after[19:]).max() > 0.1
