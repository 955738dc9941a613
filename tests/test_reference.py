"The scorer says of other people's models what lm-evaluation-harness says of them."
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from stlm.data.tokenizers import byte_alphabet
from stlm.evaluate.bits import bits_by_window, bits_per_byte
from stlm.evaluate.kept import model_fingerprint
from stlm.evaluate.reference import load_reference
from stlm.foundation import StlmError
from stlm.infer.scoring import score

transformers = pytest.importorskip("transformers", reason="the extra stlm[hf] is not installed")

CONTEXT = 48
TEXT = ("The quick brown fox jumps over the lazy dog, and then it sleeps. Questions have answers; answers have reasons.\n"
        "naïve café 🙂 清单 and tabs\tand numbers 1234567890. ") * 4


def save_tokenizer(folder: Path, bos: str | None, missing: str = "") -> None: # characters that stand for bytes
    "A byte-level vocabulary; with a beginning-of-text symbol, every text opens with it, as Llama's do."
    learned = tokenizers.Tokenizer(tokenizers.models.BPE())
    learned.pre_tokenizer, learned.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", *([bos] if bos else [])]
    alphabet = [letter for letter in tokenizers.pre_tokenizers.ByteLevel.alphabet() if letter not in missing]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    learned.train_from_iterator([TEXT], trainer)
    if bos:
        learned.post_processor = tokenizers.processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=learned, eos_token="<|endoftext|>", bos_token=bos)
    fast.save_pretrained(folder)


def tiny(kind: str) -> "transformers.PreTrainedModel":
    "An untrained model with decided opinions."
    torch.manual_seed(0)
    sizes = dict(vocab_size=384, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
    longer = dict(max_position_embeddings=CONTEXT, intermediate_size=64)
    config = {"Llama": lambda: transformers.LlamaConfig(**sizes, **longer, num_key_value_heads=2),
              "GPTNeoX": lambda: transformers.GPTNeoXConfig(**sizes, **longer),
              "GPT2": lambda: transformers.GPT2Config(**sizes, n_positions=CONTEXT)}[kind]()
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture(params=[("Llama", None), ("Llama", "<s>"), ("GPTNeoX", None), ("GPT2", None)], ids=str)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    "A model and its tokenizer as others save them."
    kind, bos = request.param
    tiny(kind).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, bos)
    return tmp_path


def requests() -> Iterator[tuple[str, str]]:
    "Like the benchmarks': nothing before a sentence, several answers behind a question, letters, a long text, the same again."
    words = TEXT.split(" ")
    for number in range(6):
        draw = random.Random(number)
        question = " ".join(draw.choices(words, k=draw.randint(3, 12)))
        yield from ((question, " " + " ".join(draw.choices(words, k=draw.randint(1, 5)))) for _ in range(4))
        yield from ((f"Question: {question}\nAnswer:", f" {letter}") for letter in "ABCD")
        yield from (("", f" {question} {end}") for end in ("fox", "dog", "fox"))
    yield TEXT, " The quick brown fox"
    yield "a context with a space behind ", "fox"


def test_scores_are_those_of_lm_eval(folder: Path) -> None:
    pytest.importorskip("accelerate", reason="lm-eval's own backend for transformers needs accelerate")
    instance = pytest.importorskip("lm_eval.api.instance", reason="lm-eval is not installed").Instance
    from lm_eval.models.huggingface import HFLM
    model, tokenizer = load_reference(folder)
    lm = HFLM(pretrained=model.inner, tokenizer=tokenizer.inner, batch_size=8)
    pairs = list(requests())
    theirs = lm.loglikelihood([instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)], disable_tqdm=True)
    ours = score(model, tokenizer, pairs)
    np.testing.assert_allclose([each.logprob for each in ours], [logprob for logprob, _ in theirs], rtol=1e-4)
    assert [each.greedy for each in ours] == [greedy for _, greedy in theirs]
    assert model.config.context == lm.max_length == CONTEXT and tokenizer.eot_id == lm.prefix_token_id
    assert [each.truncated for each in ours] == [number == len(pairs) - 2 for number in range(len(pairs))]


def looks_back_by_columns() -> "transformers.PretrainedConfig":
    return transformers.GPTNeoConfig(**SIZES, num_layers=2, attention_types=[[["global", "local"], 1]], window_size=64)


def forgets_its_window_under_a_mask() -> "transformers.PretrainedConfig":
    return transformers.MistralConfig(**SIZES, num_hidden_layers=2, intermediate_size=64, num_key_value_heads=2, sliding_window=64)


SIZES = dict(vocab_size=384, hidden_size=32, num_attention_heads=4, max_position_embeddings=256, initializer_range=0.3)


@pytest.mark.parametrize("config", [looks_back_by_columns, forgets_its_window_under_a_mask])
def test_attention_in_a_window(config: Callable[[], "transformers.PretrainedConfig"], tmp_path: Path) -> None:
    "Texts that begin alike are scored as each of them is alone, also where the model's layers do not see all of them."
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config()).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, None)
    model, tokenizer = load_reference(tmp_path)
    draw = random.Random(1)
    questions = [" ".join([TEXT[:size], *draw.choices(TEXT.split(" "), k=20)]) for size in (40, 150) for _ in range(8)]
    pairs = [(question, f" {end}") for question in questions for end in ("fox", "dog")]
    alone = [score(model, tokenizer, [pair])[0].logprob for pair in pairs]
    np.testing.assert_allclose([each.logprob for each in score(model, tokenizer, pairs)], alone, rtol=1e-4)
    assert not model.reads_trees


def test_a_document_ends_with_the_models_own_end_of_text(folder: Path) -> None:
    model, tokenizer = load_reference(folder)
    text = "The quick brown fox"
    with torch.inference_mode():
        behind = model.inner(torch.tensor([[tokenizer.eot_id, *tokenizer.encode(text)]])).logits[0, -1].log_softmax(-1)
    bits = bits_per_byte(model, tokenizer, [text])
    assert bits.end_nats == pytest.approx(-float(behind[tokenizer.inner.eos_token_id]), rel=1e-4)
    assert bits.by_position["nats"].sum() == pytest.approx(bits.nats) and bits.by_position["n_bytes"].sum() == len(text)
    assert bits_by_window(model, tokenizer, [text])["sliding"].end_nats == pytest.approx(bits.end_nats, rel=1e-4)


def test_a_vocabulary_may_lack_bytes_that_no_text_has(tmp_path: Path) -> None:
    tiny("Llama").save_pretrained(tmp_path)
    save_tokenizer(tmp_path, None, "".join(letter for letter, byte in byte_alphabet().items() if byte in {0xC0, 0xC1, *range(0xF5, 0x100)}))
    model, tokenizer = load_reference(tmp_path)
    assert bits_per_byte(model, tokenizer, [TEXT]).n_bytes == len(TEXT.encode())


def test_a_fingerprint_names_the_whole_configuration(tmp_path: Path) -> None:
    tiny("Llama").save_pretrained(tmp_path / "one")
    save_tokenizer(tmp_path / "one", None)
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    turned = {"rope_parameters": config["rope_parameters"] | {"rope_theta": 500.0}}
    for name, changed in {"moved": {"transformers_version": "4.0.0"}, "turned": turned, "normed": {"rms_norm_eps": 1e-2}}.items():
        shutil.copytree(tmp_path / "one", tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | changed))
    loaded = {name: load_reference(tmp_path / name) for name in ("one", "moved", "turned", "normed")}
    scores = {name: score(*each, [("The quick brown fox", " jumps over the lazy dog")])[0].logprob for name, each in loaded.items()}
    prints = {name: model_fingerprint(*each) for name, each in loaded.items()}
    assert scores["one"] == scores["moved"] and len(set(scores.values())) == 3
    assert prints["one"] == prints["moved"] and len(set(prints.values())) == 3


def test_a_fingerprint_names_the_whole_tokenizer(tmp_path: Path) -> None:
    tiny("Llama").save_pretrained(tmp_path / "one")
    save_tokenizer(tmp_path / "one", None)
    whole = json.loads((tmp_path / "one" / "tokenizer.json").read_text())
    shutil.copytree(tmp_path / "one", tmp_path / "split")
    parts = [{"type": "Punctuation", "behavior": "Isolated"}, whole["pre_tokenizer"]]
    whole["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    (tmp_path / "split" / "tokenizer.json").write_text(json.dumps(whole))
    one, split = (load_reference(tmp_path / name) for name in ("one", "split"))
    assert one[1].inner.get_vocab() == split[1].inner.get_vocab() and model_fingerprint(*one) != model_fingerprint(*split)


def test_a_models_own_code_is_not_run(folder: Path) -> None:
    marker = folder / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(StlmError, match="cannot load") as caught:
        load_reference(folder)
    assert "\n" not in str(caught.value) and not marker.exists()


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(StlmError, match="safetensors"):
        load_reference(folder)
