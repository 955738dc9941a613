"""Every family of models - flat or pooled, with all ways to patch, pool, unpool, decode, share and mark positions - keeps its promises,
and each check that says so fails for models that were broken on purpose."""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stlm.config import ConfigError, Decoder, Encoder, ModelConfig, PatchConfig, Patcher, Pool, Positions, SharingConfig, Unpool
from stlm.data.tokenizers import ByteTokenizer, MarkedTokenizer, Tokenizer, byte_alphabet, train_bpe
from stlm.foundation import StlmError
from stlm.infer.generate import Sampling, steps
from stlm.infer.scoring import token_logprobs
from stlm.model import local, patches, pooling
from stlm.model.accounting import account
from stlm.model.lm import LanguageModel
from stlm.model.pooling import PooledStack
from stlm.pretrained import from_pretrained, save_pretrained

ROOT = Path(__file__).resolve().parents[1]
T = 32  # symbols that a model reads: several blocks of a window, a dozen patches

# --- The families -------------------------------------------------------------------------------------------------------------------------

PLANS = {
    "unshared": SharingConfig(),
    "ffn": SharingConfig(ffn="all"),
    "attention": SharingConfig(attention="repeat", lora_rank=2),
    "cycle": SharingConfig(ffn="cycle", attention="cycle"),
    "reverse": SharingConfig(ffn="reverse", free_ends=1, lora_rank=2, lora_scale=2.0),
    "loop": SharingConfig(loop_layers=1, loops=3),
    "all at once": SharingConfig(ffn="all", attention="reverse", lora_rank=1, loop_layers=2),
}
SWITCHES = dict(patcher=[name for name in get_args(Patcher) if name != "none"], encoder=get_args(Encoder), pooling=get_args(Pool),
                unpooling=get_args(Unpool), decoder=get_args(Decoder))


@dataclass(frozen=True)
class Family:
    "A kind of model, and the tokenizer that it goes with."
    name: str
    tokenizer: str
    config: ModelConfig

    def build(self, **changes) -> LanguageModel:
        "A model with weights so large that everything matters; what starts at zero is drawn as well, and a segmenter has opinions."
        torch.manual_seed(0)
        model = LanguageModel(replace(self.config, **changes))
        for name, parameter in model.named_parameters():
            threshold = name.endswith("threshold")
            if not (threshold or parameter.any()) or (name.startswith("body.patcher.") and parameter.ndim > 1):
                torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()


def config_of(number: int, plan: str, tokenizer: str, **switches) -> ModelConfig:
    "What is not asked for comes and goes with the number, in steps that share no divisor, so that it meets everything else."
    sizes = dict(n_layers=3, d_model=24, n_heads=3, d_ff=32, init_std=0.2)
    changing = dict(n_kv_heads=1 + 2 * (number % 3 // 2), qk_norm=number % 19 < 6, tied_head=number % 23 < 15,
                    norm=("rmsnorm", "layernorm")[number % 29 // 20], zero_init=number % 43 < 15, embedding_norm=number % 67 < 25,
                    residual_scalars=number % 53 < 25, value_residual=number % 59 < 30, logit_softcap=6.0 * (number % 61 < 20))
    return ModelConfig(vocab_size=open_tokenizer(tokenizer).vocab_size, context=T, sharing=PLANS[plan], **(sizes | changing | switches))


def patches_of(number: int, patcher: str, **switches) -> PatchConfig:
    "Of four symbols and more where slots must be as many as symbols, else sometimes of any length."
    gridded = switches["encoder"] == "patch" or switches["unpooling"] == "linear" or switches["decoder"] == "parallel"
    longest = 4 + number % 13 % 3 if gridded else 5 * (number % 13 // 9)
    return PatchConfig(patcher=patcher, **switches, size=3 + number % 2, max_size=longest, threshold=5.3, d_local=16, n_heads=2, d_ff=24,
                       window=5 + number % 11, encoder_layers=1 + number % 31 // 20, decoder_layers=1 + number % 37 // 25,
                       ngram=number % 17 // 8 * 3, ngram_buckets=50, position=number % 41 < 17 and patcher != "gate")


def pooled_families() -> list[Family]:
    found = []
    for number, values in enumerate(itertools.product(*SWITCHES.values())):
        switches = dict(zip(SWITCHES, values, strict=True))
        plan, positions = list(PLANS)[number % 7], get_args(Positions)[number % 11 % 5]
        try:
            pooled = patches_of(number, **switches)
        except ConfigError:
            continue  # how many these are is counted below
        tokenizer = "bytes+bpe:300" if switches["patcher"] == "marks" else "bytes"
        config = config_of(number, plan, tokenizer, positions=positions, patches=pooled)
        found.append(Family("-".join([*values, plan, positions]), tokenizer, config))
    return found


def flat_families() -> list[Family]:
    product = enumerate(itertools.product(("bytes", "bpe:300"), PLANS, get_args(Positions)))
    return [Family(f"{tokenizer}-{plan}-{positions}", tokenizer,
                   config_of(number, plan, tokenizer, positions=positions, embedding_rank=number % 4 // 3 * 8))
            for number, (tokenizer, plan, positions) in product]


@cache
def open_tokenizer(name: str) -> Tokenizer:
    if name.startswith("bytes+"):
        return MarkedTokenizer(open_tokenizer(name.removeprefix("bytes+")))
    return ByteTokenizer() if name == "bytes" else train_bpe(name, [(ROOT / "LICENSE").read_text(encoding="utf-8")])


POOLED, FLAT = pooled_families(), flat_families()
FAMILIES = {family.name: family for family in POOLED + FLAT}


def test_the_families_are_all_there_are_and_what_is_spread_over_them_meets_every_switch() -> None:
    sizes = [len(values) for values in SWITCHES.values()]
    without_question = len(SWITCHES["patcher"]) * len(SWITCHES["encoder"]) * len(SWITCHES["pooling"])  # a parallel decoder sees no bytes
    gate_of_patches = len(SWITCHES["pooling"]) * (3 * 3 - 1)  # a gate asks what an encoder has seen
    assert len(POOLED) == math.prod(sizes) - without_question - gate_of_patches == 360
    for key in SWITCHES:
        for value in SWITCHES[key]:
            having = [family.config for family in POOLED if getattr(family.config.patches, key) == value]
            assert {config.positions for config in having} == set(get_args(Positions)), (key, value)
            assert {config.sharing for config in having} == set(PLANS.values()), (key, value)
            assert {config.patches.ngram > 0 for config in having} == {config.qk_norm for config in having} == {True, False}, (key, value)
            assert {config.patches.max_size > 0 for config in having} >= {True}, (key, value)
            for switch in ("zero_init", "embedding_norm", "residual_scalars", "value_residual", "logit_softcap"):
                assert {bool(getattr(config, switch)) for config in having} == {True, False}, (key, value, switch)
            assert value == "gate" or {config.patches.position for config in having} == {True, False}, (key, value)
    assert {(c.positions, c.sharing) for c in (f.config for f in POOLED)} == set(itertools.product(get_args(Positions), PLANS.values()))


# --- Texts --------------------------------------------------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz" * 2 + "ABC0123é🙂清\0.,-"


def random_text(seed: int, length: int = 3 * T) -> str:
    "Words of all lengths, with line breaks, digits, NUL, and letters of two, three and four bytes."
    draw = random.Random(seed)
    words = ("".join(draw.choices(LETTERS, k=draw.choice([1, 2, 3, 5, 8, 13]))) + draw.choice([" ", " ", "  ", "\n"])
             for _ in range(length))
    return "".join(words)[:length]


def symbols_of(tokenizer: Tokenizer, text: str) -> list[int]:
    "What a model reads of a text: end of text, and the text; a second text where the first one holds a form feed."
    return [symbol for part in text.split("\f") for symbol in (tokenizer.eot_id, *tokenizer.encode(part))]


def changed_at(text: str, place: int) -> str:
    "The text with one byte changed: a letter to a space or a space to a letter, so that boundaries change too."
    return text[:place] + (" " if text[place].isalnum() else "e") + text[place + 1:]


# --- The checks: each takes a model and fails where it breaks its promise -----------------------------------------------------------------


@torch.no_grad()
def logprobs(model: LanguageModel, symbols: Sequence[int]) -> Tensor: # (T, V) of the symbol after each one
    return model(torch.tensor([symbols]))[0].float().log_softmax(-1)


@torch.no_grad()
def stepwise(model: LanguageModel, ids: Tensor, pieces: Sequence[int]) -> Tensor: # (B, T, V), read in pieces
    memory = model.new_cache(len(ids), ids.shape[1])
    return torch.cat([model(piece, memory) for piece in ids.split(list(pieces), dim=1)], dim=1).float().log_softmax(-1)


def check_causality(model: LanguageModel, symbols: Sequence[int], changed: Sequence[int]) -> None:
    "Everything is computed anew, boundaries too. What stands before the first difference is judged alike, and what follows is not."
    first = next(place for place, (one, other) in enumerate(zip(symbols, changed, strict=True)) if one != other)
    moved = (logprobs(model, symbols) - logprobs(model, changed)).abs().amax(-1)  # (T,)
    assert first > 0
    assert moved[:first].max() <= TOLERANCE, f"symbol {first} is seen before it comes, by {moved[:first].max():.1e}"
    assert moved[first:].max() > 1e-3, f"symbol {first} is never seen"


def check_text_causality(model: LanguageModel, tokenizer: Tokenizer, text: str, place: int) -> None:
    "The same from raw text on: marks and tokens are made anew as well."
    check_causality(model, *(symbols_of(tokenizer, variant)[:T] for variant in (text, changed_at(text, place))))


def check_steps(model: LanguageModel, ids: Tensor, pieces: Sequence[int]) -> None:
    "Symbol by symbol, or in pieces, is the same as all at once."
    whole = torch.stack([logprobs(model, row) for row in ids.tolist()])  # each row by itself: padding by other rows' patches is tested too
    torch.testing.assert_close(stepwise(model, ids, pieces), whole, rtol=1e-4, atol=TOLERANCE)


def check_batches(model: LanguageModel, sequences: Sequence[Sequence[int]]) -> None:
    "A text is scored alike alone, padded beside others, in a row with texts that begin as it does, and where only its end is asked for."
    longest = sequences[0]
    sequences = [*sequences, [*longest[:9], *longest[:8:-1]], longest[:11], longest]
    alone = [logprobs(model, text[:-1]).gather(1, torch.tensor(text[1:])[:, None])[:, 0].numpy() for text in sequences]
    for first in ([1] * len(sequences), [max(1, len(text) - 3) for text in sequences]):
        for start, one, other in zip(first, alone, token_logprobs(model, sequences, first), strict=True):
            np.testing.assert_allclose(one[start - 1:], other, rtol=1e-4, atol=TOLERANCE, err_msg=f"scored from {start}")


def check_chain_rule(model: LanguageModel, prompt: Sequence[int], seed: int) -> None:
    "What was written cost what it is scored with."
    written = list(steps(model, prompt, Sampling(max_tokens=T - len(prompt) + 1, seed=seed), eot_id=-1))
    scored = token_logprobs(model, [[*prompt, *(step.symbol for step in written)]], [len(prompt)])[0]
    assert len(scored) == len(written) == T - len(prompt) + 1
    assert sum(step.logprob for step in written) == pytest.approx(float(scored.sum()), rel=1e-4, abs=1e-3)


def check_saving(model: LanguageModel, tokenizer: Tokenizer, ids: Tensor, folder: Path) -> None:
    save_pretrained(folder, model, tokenizer)
    loaded, other = from_pretrained(folder, "cpu")
    assert loaded.config == model.config and other.fingerprint == tokenizer.fingerprint
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))


def check_gradients(model: LanguageModel, ids: Tensor) -> None:
    "Every weight learns, but for those of a segmenter; and the account knows them all."
    windows = ids.unfold(1, T // 2 + 1, 3).flatten(0, 1)  # from the middle of texts too: behind end of text nothing asks for the null
    model.objective(windows[:, :-1], windows[:, 1:])[0].backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith("body.patcher.")
        assert parameter.requires_grad != frozen, name
        assert (parameter.grad is None) if frozen else (torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0), name
    model.zero_grad(set_to_none=True)
    assert account(model.config).unique_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert account(model.config).unique_parameters == sum(tensor.numel() for tensor in model.state_dict().values())


TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- Every family keeps every promise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, tmp_path: Path) -> None:
    family, number = FAMILIES[name], list(FAMILIES).index(name)
    model, tokenizer = family.build(), open_tokenizer(family.tokenizer)
    texts = [random_text(3 * number), random_text(3 * number + 1, 9) + "\f" + random_text(3 * number + 2)]
    ids = torch.tensor([symbols_of(tokenizer, text)[:T + 1] for text in texts])
    check_gradients(model, ids)
    for place in (1, 7):
        check_text_causality(model, tokenizer, texts[0], place)
    check_steps(model, ids[1:, :T], [1] * T)
    check_steps(model, ids[:, :T], [9, 1, 4, 12, 6])
    check_batches(model, [ids[0].tolist(), ids[1, :14].tolist(), ids[0, 5:8].tolist(), ids[1, :2].tolist()])
    check_chain_rule(model, ids[1, :3 * T // 4].tolist(), number)
    check_saving(model, tokenizer, ids[:, :T], tmp_path / "model")


# --- Nothing below chance -----------------------------------------------------------------------------------------------------------------


def random_bytes(tokenizer: Tokenizer, seed: int, documents: int, length: int) -> list[list[int]]:
    "Uniformly random bytes as symbols, behind end of text; most are no UTF-8, so pairs are merged without a look for words."
    draw = np.random.default_rng(seed)
    return [[tokenizer.eot_id, *_symbols(tokenizer, draw.bytes(length))] for _ in range(documents)]


def _symbols(tokenizer: Tokenizer, data: bytes) -> list[int]:
    if isinstance(tokenizer, MarkedTokenizer):
        inner = _symbols(tokenizer.inner, data)
        return [symbol for token in inner for symbol in (*tokenizer.inner.decode_bytes([token]), tokenizer.end_of_patch_id)]
    if tokenizer.name == "bytes":
        return list(data)
    letters = {value: letter for letter, value in byte_alphabet().items()}
    return [token.id for token in tokenizer._bpe.model.tokenize("".join(letters[value] for value in data))]


def random_bits(model: LanguageModel, tokenizer: Tokenizer, seed: int, documents: int = 48, length: int = T // 2) -> np.ndarray:
    "(documents,) bits for each of their bytes, with every symbol paid for: marks too."
    sequences = random_bytes(tokenizer, seed, documents, length)
    return np.array([-scored.sum() for scored in token_logprobs(model, sequences, [1] * documents)]) / math.log(2) / length


def check_chance(model: LanguageModel, tokenizer: Tokenizer, seed: int) -> None:
    "No less than 8 bits for a random byte. Documents are independent, so four standard errors are room enough for luck."
    bits = random_bits(model, tokenizer, seed)
    assert bits.mean() >= 8 - 4 * bits.std(ddof=1) / len(bits) ** 0.5, f"{bits.mean():.2f} bits for a random byte"


def learn(model: LanguageModel, batches: Iterable[Tensor], lr: float) -> float: # nats of a symbol in the last one
    "A few steps of AdamW."
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, nats = torch.optim.AdamW(trained, lr=lr), torch.zeros(())
    for ids in batches:
        loss, nats = model.objective(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return nats.item()


@pytest.mark.parametrize("name", FAMILIES)
def test_random_bytes_cost_no_less_than_chance(name: str) -> None:
    family, number = FAMILIES[name], list(FAMILIES).index(name)
    model, tokenizer = family.build(init_std=0.03), open_tokenizer(family.tokenizer)  # about 8 bits from the start: what is below shows
    check_chance(model, tokenizer, number)
    text = torch.tensor(symbols_of(tokenizer, random_text(number, 150))[:4 * T]).view(4, T)
    before, after = (learn(model, [text] * n, lr=3e-3) for n in (1, 3))
    assert after < before
    check_chance(model, tokenizer, number)


def test_marks_must_be_paid_for() -> None:
    """They say where tokens end, and with that which bytes may come: who has learned them pays less than chance for the bytes alone."""
    family = FAMILIES["bytes-unshared-rope"]
    model, tokenizer = family.build(vocab_size=258, init_std=0.05, tied_head=False, qk_norm=False), open_tokenizer("bytes+bpe:300")
    letters, draw = b"orinte", np.random.default_rng(0)  # of many pairs of which the vocabulary has tokens

    def documents(n: int) -> Tensor:
        data = (bytes(letters[i] for i in draw.integers(len(letters), size=T)) for _ in range(n))
        return torch.tensor([[tokenizer.eot_id, *_symbols(tokenizer, each)][:T + 1] for each in data])

    learn(model, (documents(32) for _ in range(200)), lr=1e-2)
    ids = documents(200)
    bits = [-scored / math.log(2) for scored in token_logprobs(model, ids.tolist(), [1] * len(ids))]
    is_byte = ids[:, 1:].numpy() < 256
    chance = math.log2(len(letters))
    assert np.array(bits)[is_byte].mean() < chance - 0.1
    assert np.array(bits).sum() / is_byte.sum() > chance


# --- Any text, any pieces -----------------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(list(FAMILIES)), st.text(min_size=1, max_size=T), st.data())
def test_any_text_in_any_pieces(name: str, text: str, data: st.DataObject) -> None:
    family = FAMILIES[name]
    model, tokenizer = family.build(), open_tokenizer(family.tokenizer)
    try:
        symbols = symbols_of(tokenizer, text)[:T]
    except StlmError:
        assert any("\ud800" <= letter <= "\udfff" for letter in text)  # half a character is refused
        return
    cuts, left = [], len(symbols)
    while left:
        cuts.append(data.draw(st.integers(1, left)))
        left -= cuts[-1]
    check_steps(model, torch.tensor([symbols]), cuts)
    place = data.draw(st.integers(1, len(symbols)))
    if place < len(symbols):
        changed = [*symbols[:place], *(data.draw(st.integers(0, tokenizer.vocab_size - 1)) for _ in symbols[place:])]
        moved = (logprobs(model, symbols) - logprobs(model, changed)).abs().amax(-1)
        assert moved[:place].max() <= TOLERANCE


EDGES = {
    "one symbol": [65],
    "a patch ends with the last symbol": [*b"abc defg ", 256][:9],
    "no patch ends": list(b"abcdefghijklmnopqrst"),
    "every symbol ends a patch": [256] * 20,
    "separators only": list(b"  \n\t .,;  "),
    "ends of text": [256, *b"ab", 256, 256, *b" cd", 256],
    "the same byte": [0] * T,
    "highest bytes": [255] * T,
}


@pytest.mark.parametrize("longest", [1, 4])
@pytest.mark.parametrize("name", [family.name for family in POOLED[::11]])
def test_edges(name: str, longest: int) -> None:
    """One symbol, windows wider than the text, patches of one symbol, rows with none or twenty; from a cache as at once."""
    family = FAMILIES[name]
    size = min(family.config.patches.size, longest + (family.config.patches.patcher == "gate"))
    wide = replace(family.config.patches, max_size=longest, size=size, window=3 * T, encoder_layers=1, decoder_layers=1)
    model = family.build(patches=wide)
    for symbols in EDGES.values():
        whole = logprobs(model, symbols)
        assert torch.isfinite(whole).all()
        torch.testing.assert_close(stepwise(model, torch.tensor([symbols]), [1] * len(symbols))[0], whole, rtol=1e-4, atol=TOLERANCE)
    rows = torch.tensor([EDGES[edge][:20] for edge in ("no patch ends", "every symbol ends a patch", "the same byte", "highest bytes")])
    check_steps(model, rows, [3, 1, 16])


@torch.no_grad()
@pytest.mark.parametrize("name", [family.name for family in POOLED[::11]])
def test_the_stack_may_run_over_more_patches_than_there_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it does, so that few shapes occur; never over more than there are symbols, for more positions a model may not have."""
    model, tokenizer = FAMILIES[name].build(), open_tokenizer(FAMILIES[name].tokenizer)
    ids = torch.tensor([symbols_of(tokenizer, random_text(seed))[:T] for seed in range(3)])
    logits, fullest = model(ids), int(model.cuts(ids).ends.sum(1).max())
    for at_a_time in (fullest + 1, T + 7):
        monkeypatch.setitem(pooling.PATCHES_AT_A_TIME, "cpu", at_a_time)
        assert fullest <= pooling.patches_to_run(model.cuts(ids).ends) == min(at_a_time, T)
        torch.testing.assert_close(model(ids), logits, rtol=1e-4, atol=TOLERANCE)


@pytest.mark.parametrize("name", [family.name for family in POOLED[::47]])
def test_another_number_of_patches_compiles_nothing_anew(name: str) -> None:
    """Only the text says how many patches there are, and so how long the rows are that the stack reads."""
    model, tokenizer = FAMILIES[name].build(), open_tokenizer(FAMILIES[name].tokenizer)
    texts = [torch.tensor([symbols_of(tokenizer, " ".join("abcdefghijklm"[:size] for _ in range(T)))[:T]]) for size in (3, 4, 5, 2, 6)]
    torch.compiler.reset()
    objective = torch.compile(model.objective, backend="eager")
    for number, text in enumerate(texts):
        with torch._dynamo.config.patch(error_on_recompile=number > 1):  # the second text shows that the number varies
            torch.testing.assert_close(objective(text, text), model.objective(text, text))


@torch.no_grad()
@pytest.mark.parametrize("name", [family.name for family in POOLED[::23]])
def test_bfloat16_stays_causal(name: str) -> None:
    model, symbols = FAMILIES[name].build(), symbols_of(open_tokenizer(FAMILIES[name].tokenizer), random_text(1))[:T]
    with torch.autocast("cpu", torch.bfloat16):
        before, after = logprobs(model, symbols), logprobs(model, [*symbols[:20], *symbols[:T - 20]])
        moved = (before - after).abs().amax(-1)
        assert moved[:20].max() <= 0.05 < moved[20:].max()  # not equal: kernels round differently for another number of patches
        assert torch.isfinite(stepwise(model, torch.tensor([symbols]), [7, 1, 24])).all()


@pytest.mark.parametrize("name", [family.name for family in POOLED[::23]])
def test_a_full_cache_is_one_clear_line(name: str) -> None:
    model = FAMILIES[name].build()
    memory = model.new_cache(1, 10)
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.long), memory)
        with pytest.raises(StlmError, match="more do not fit"):
            model(torch.zeros(1, 3, dtype=torch.long), memory)
        assert memory.length == 8
        model(torch.zeros(1, 2, dtype=torch.long), memory)


@pytest.mark.parametrize("slots", [dict(encoder="patch"), dict(unpooling="linear"), dict(decoder="parallel"), {}], ids=str)
def test_a_stride_must_fit_its_slots(slots: dict[str, str]) -> None:
    """Else bytes would be lost, and the last ones of a patch would read the slots of the next one, which is still open."""
    PatchConfig(patcher="stride", size=4, max_size=4, **slots)
    with pytest.raises(ConfigError, match=r"model\.patches\.max_size"):
        PatchConfig(patcher="stride", size=5, max_size=4, **slots)


def test_heads_of_pooling_must_divide_the_width() -> None:
    local = PatchConfig(patcher="stride", size=4, max_size=4, encoder="patch", pooling="attention", d_local=40, n_heads=5)
    ModelConfig(vocab_size=257, d_model=40, n_heads=4, n_kv_heads=4, patches=local)
    with pytest.raises(ConfigError, match=r"model\.patches\.n_heads=5 .*d_model=24"):
        ModelConfig(vocab_size=257, d_model=24, n_heads=4, n_kv_heads=4, patches=local)


# --- Broken on purpose --------------------------------------------------------------------------------------------------------------------
# Each mutant replaces one function by another that leaks or forgets. The checks above must notice.

WISHES, ENTROPY, AFTER = patches.SpacePatcher.wishes, patches.EntropyPatcher.entropy, patches.after
SPANS, GRID, READ, DECODE = pooling.spans, local.GridBlock.forward, pooling.Repeat.read, PooledStack._decode


def peeking_wishes(self, ids, previous, cache=None):
    "Ends a patch before a space: what is in the standard vocabulary of tokenizers, and cannot be known in time."
    return F.pad(WISHES(self, ids, previous, cache)[:, 1:], (0, 1))


def top_wishes(self, ids, previous, cache=None):
    "The quarter of the text where entropy is highest, instead of a threshold."
    entropy = ENTROPY(self, ids, cache)
    return entropy >= entropy.topk(-(-ids.shape[1] // 4), dim=1).values[:, -1:]


def open_patch_read(self, answers, cuts, states):
    "The answer of the patch that is still open."
    ended = (cuts.ended + 1).clamp(max=answers.shape[1] - 1)
    return READ(self, answers, replace(cuts, ended=ended), states)


def late_spans(ends, n):
    "Patches that reach into the next one by a byte."
    first, last = SPANS(ends, n)
    return first, (last + 1).clamp(max=ends.shape[1] - 1)


def bidirectional_decode(self, states, answers, cuts, cache):
    "Bytes' states from the encoder that sees whole patches, given to the decoder."
    return DECODE(self, states + self.grid(states, cuts.ends, int(cuts.ends.sum(1).max())), answers, cuts, cache)


def next_state_gate(self, states, before=None):
    "How different a state is from the next one."
    following = torch.cat([states[:, 1:], states[:, -1:]], dim=1)
    return (1 - F.cosine_similarity(self.query(states), self.key(following), dim=-1)) / 2


def bias_of(shift: int) -> Callable:
    "A window that is moved by some bytes."
    def window_bias(slopes, queries, keys, window):
        distance = queries[:, None] - keys[None]
        return (-slopes[:, None, None] * distance).masked_fill((distance < -max(0, -shift)) | (distance >= window + shift), -torch.inf)
    return window_bias


def padded_grid(self, x, filled=None):
    "Slots that hold no byte of the patch are seen."
    return GRID(self, x)


def forgetting(what: str) -> Callable:
    "A cache that begins anew with every piece, in one respect."
    return lambda cuts, ids: replace(AFTER(cuts, ids), **{what: getattr(patches.nothing_open(len(ids)), what)})


MUTANTS = { # what is replaced, by what, in which model, and which check must notice
    "a space patcher that looks ahead": (patches.SpacePatcher, "wishes", peeking_wishes, dict(patcher="space"), "causality"),
    "the highest entropies of a text": (patches.EntropyPatcher, "wishes", top_wishes, dict(patcher="entropy", threshold=5.3), "causality"),
    "an answer of the open patch": (pooling.Repeat, "read", open_patch_read, dict(patcher="space"), "causality"),
    "a byte beyond the patch": (pooling, "spans", late_spans, dict(patcher="space"), "causality"),
    "a decoder that reads whole patches": (PooledStack, "_decode", bidirectional_decode,
                                           dict(patcher="stride", encoder="patch"), "causality"),
    "a gate that knows the next state": (patches.Gate, "forward", next_state_gate, dict(patcher="gate"), "causality"),
    "a window with the next byte": (local, "window_bias", bias_of(-1), dict(patcher="stride"), "causality"),
    "a window too wide by one": (local, "window_bias", bias_of(1), dict(patcher="stride"), "steps"),
    "padding that is seen": (local.GridBlock, "forward", padded_grid, dict(patcher="space", encoder="patch"), "causality"),
    "an open patch that is forgotten": (pooling, "after", forgetting("length"), dict(patcher="space", pooling="first"), "steps"),
    "a last byte that is forgotten": (pooling, "after", forgetting("previous"), dict(patcher="space"), "steps"),
    "a forced end that is forgotten": (pooling, "after", forgetting("since"), dict(patcher="space", max_size=3), "steps"),
}
CHECKS = dict(causality=lambda model: [check_text_causality(model, ByteTokenizer(), TEXT, place) for place in range(4, 20)],
              steps=lambda model: check_steps(model, torch.tensor([symbols_of(ByteTokenizer(), TEXT)[:T]]), [1] * T))
TEXT = "to be or, not to be;  that is the question of a word so long"


def mutant_model(**switches) -> LanguageModel:
    gridded = dict(max_size=8) if switches.get("encoder") == "patch" else {}
    pooled = PatchConfig(**(dict(size=4, d_local=24, n_heads=2, d_ff=24, window=6) | gridded | switches))
    return Family("", "bytes", config_of(0, "unshared", "bytes", qk_norm=False, patches=pooled)).build()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_model_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, replacement, switches, check = MUTANTS[name]
    for sound in CHECKS.values():
        sound(mutant_model(**switches))
    monkeypatch.setattr(owner, attribute, replacement)
    with pytest.raises(AssertionError):
        CHECKS[check](mutant_model(**switches))


def test_a_check_with_fixed_boundaries_is_blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The boundaries of the old text, given to the changed one, hide that they looked ahead."""
    monkeypatch.setattr(patches.SpacePatcher, "wishes", peeking_wishes)
    model, place = mutant_model(patcher="space"), TEXT.index(",")
    with pytest.raises(AssertionError, match="is seen before it comes"):
        check_text_causality(model, ByteTokenizer(), TEXT, place)
    old = model.cuts(torch.tensor([symbols_of(ByteTokenizer(), TEXT)[:T]]))
    monkeypatch.setattr(PooledStack, "_cut", lambda self, ids, opened, cache: old)
    check_text_causality(model, ByteTokenizer(), TEXT, place)
