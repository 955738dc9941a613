"""Every score is the one that lm-evaluation-harness gives, for every family, on a sample of every benchmark.

lm-eval asks a second model, which shares no code with the scorer: Hugging Face's Llama with the same weights where there is one, else a
plain forward pass, one request at a time. It builds its own questions, cuts its own strings and counts its own hits.
"""
import json
import lzma
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from stlm.cli import app
from stlm.config import ModelConfig, PatchConfig
from stlm.data.tokenizers import ByteTokenizer, MarkedTokenizer, Tokenizer, train_bpe
from stlm.foundation import StlmError
from stlm.infer.generate import generate
from stlm.model.lm import LanguageModel
from stlm.pretrained import save_pretrained

pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'stlm[harness]' brings it")

from stlm.evaluate.benchmarks import open_model
from stlm.evaluate.harness import LOCAL_TASKS, HarnessModel, parity, second_model, unequal, write_tasks

SHARED = Path(os.environ.get("STLM_SHARED_DATA", "nowhere")) / "benchmarks"
SAMPLES = {"blimp": ("UID", {"adjunct_island", "npi_present_1"}), "mmlu_test": ("subject", {"anatomy", "college_mathematics"}),
           "mmlu_dev": ("subject", {"anatomy", "college_mathematics"}), "hellaswag_val": ("", {""}), "arc_easy_train": ("", {""}),
           "arc_easy_test": ("", {""}), "winogrande_dev": ("", {""})}
EACH = 5  # items of each paradigm, subject or other task

TEXT = (Path(__file__).resolve().parents[1] / "LICENSE").read_text("utf-8")
SIZES = dict(n_layers=2, d_model=48, n_heads=4, n_kv_heads=2, d_ff=96, init_std=0.1)
FAMILIES = {"bpe:400": dict(context=192), "bytes": dict(context=384), "bytes+bpe:400": dict(context=448, patches=PatchConfig(
                patcher="marks", max_size=8, d_local=32, n_heads=2, d_ff=64)),
            "bytes pooled": dict(context=384, patches=PatchConfig(patcher="space", d_local=32, n_heads=2, d_ff=64, window=32, ngram=3))}


def invented() -> dict[str, list[dict]]:
    "Items of every benchmark where none of the real ones are at hand."
    nouns = ["cat", "dog", "horse", "bird", "fish"]  # EACH of them
    school = [{"question": f"What does a {noun} need?", "choices": {"text": ["air", "coins", f"another {noun}"], "label": [*"ABC"]},
               "answerKey": "A"} for noun in nouns]
    exams = [{"question": f"How old is this {noun}?", "choices": ["one", "two", "ten", "none of them"], "answer": n % 4, "subject": subject}
             for subject in ("anatomy", "college_mathematics") for n, noun in enumerate(nouns)]
    return {"blimp": [{"sentence_good": f"Many {noun}s were asleep.", "sentence_bad": f"Many {noun}s was asleep.", "UID": paradigm,
                       "linguistics_term": "quantifiers", "field": "syntax"} for paradigm in SAMPLES["blimp"][1] for noun in nouns],
            "hellaswag_val": [{"activity_label": "Cooking", "ctx_a": f"A {noun} is in the kitchen.", "ctx_b": "the cook", "label": "2",
                               "endings": ["adds oil to it.", "sleeps [step] near it.", "sings to it.", "reads  it."]} for noun in nouns],
            "arc_easy_train": school, "arc_easy_test": school, "mmlu_dev": exams, "mmlu_test": exams,
            "winogrande_dev": [{"sentence": f"The {noun} did not fit into the box because the _ was too big.", "option1": noun,
                                "option2": "box", "answer": "1"} for noun in nouns]}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The first items of every benchmark, in the hub's columns."
    folder = tmp_path_factory.mktemp("benchmarks")
    if not SHARED.is_dir():
        for name, rows in invented().items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder
    for name, (column, wanted) in SAMPLES.items():
        seen: Counter[str] = Counter()
        with lzma.open(SHARED / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines, open(folder / f"{name}.jsonl", "w") as file:
            for line in lines:
                group = json.loads(line)[column] if column else ""
                if group in wanted and seen[group] < EACH:
                    file.write(line)
                    seen[group] += 1
                if seen.total() == EACH * len(wanted):
                    break
    return folder


def tokenizer_of(name: str) -> Tokenizer:
    "A tokenizer; byte pairs are learned from the licence."
    if name.startswith("bytes+"):
        return MarkedTokenizer(tokenizer_of(name.removeprefix("bytes+")))
    return train_bpe(name, [TEXT]) if name.startswith("bpe") else ByteTokenizer()


CASES = [("bpe:400", False), ("bpe:400", True), ("bytes", False), ("bytes", True), ("bytes pooled", False), ("bytes pooled", True),
         ("bytes+bpe:400", True)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}, {'trained' if case[1] else 'untrained'}")
def pair(request: pytest.FixtureRequest) -> tuple[LanguageModel, Tokenizer]:
    "A model as it starts, or after some steps on the licence, which take it far from equal probabilities."
    name, trained = request.param
    if name.startswith("bpe"):
        pytest.importorskip("accelerate", reason="lm-eval's hf backend needs accelerate; pip install 'stlm[harness]' brings it")
    tokenizer = tokenizer_of(name.removesuffix(" pooled"))
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, **SIZES | FAMILIES[name]))
    if trained:
        symbols = torch.tensor(tokenizer.encode(TEXT))
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(40):
            window = symbols[torch.randint(len(symbols) - 129, (4, 1)) + torch.arange(129)]
            loss = model.objective(window[:, :-1], window[:, 1:])[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), tokenizer


def test_benchmarks_are_scored_as_lm_eval_scores_them(pair: tuple[LanguageModel, Tokenizer], samples: Path) -> None:
    table = parity(*pair, samples, ["blimp", "hellaswag", "arc_easy", "winogrande", "mmlu", "mmlu_5shot"]).set_index("task")
    assert table["questions"].tolist() == [10, 5, 5, 5, 10, 10] and (table["other strings"] == 0).all()
    assert table["largest difference"].max() < 1e-4
    assert table["ties"]["blimp"] == 0  # the one case in which accuracies may differ
    assert table["acc"].tolist() == table["acc lm-eval"].tolist()
    normed = table.loc[["hellaswag", "arc_easy"]]
    assert normed["acc_norm"].tolist() == normed["acc_norm lm-eval"].tolist()
    assert (table["second"] == ("HFLM" if pair[1].name == "bpe:400" else "PlainModel")).all()


def test_every_model_may_write_as_much_text(pair: tuple[LanguageModel, Tokenizer]) -> None:
    model, tokenizer = pair
    (text,) = HarnessModel(pair).generate_until([SimpleNamespace(args=("The", {"until": [], "max_gen_toks": 10}))], disable_tqdm=True)
    free = generate(model, tokenizer, "The", max_tokens=80, temperature=0)
    assert free.startswith(text) and (text == free or 40 <= len(text.encode()) < 40 + tokenizer.token_bytes.max())


@pytest.mark.parametrize("bos", [None, "<s>"])
def test_other_peoples_models_are_compared_too(samples: Path, tmp_path: Path, bos: str | None) -> None:
    pytest.importorskip("accelerate", reason="lm-eval's hf backend needs accelerate; pip install 'stlm[harness]' brings it")
    from test_reference import save_tokenizer, tiny
    theirs = tiny("Llama")
    theirs.config.max_position_embeddings = 192
    theirs.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, bos)
    pair = open_model(f"hf:{tmp_path}", "cpu")[:2]
    with pytest.raises(StlmError, match="--model hf"):
        HarnessModel(pair).generate_until([SimpleNamespace(args=("The", {"until": [], "max_gen_toks": 3}))], disable_tqdm=True)
    table = parity(*pair, samples, ["blimp", "winogrande"])
    assert table["questions"].tolist() == [10, 5] and (table["other strings"] == 0).all() and table["largest difference"].max() < 1e-4
    assert table["acc"].tolist() == table["acc lm-eval"].tolist() and (table["second"] == "HFLM").all()


def test_what_cannot_be_compared_is_named(samples: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bytes")
    model = LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, **SIZES | FAMILIES["bytes"]))
    folder = shutil.copytree(samples, tmp_path / "samples")
    (folder / "arc_easy_train.jsonl").unlink()
    with pytest.raises(StlmError, match=r"has no file arc_easy_train\.jsonl"):
        parity(model, tokenizer, folder, ["arc_easy"])
    with open(folder / "blimp.jsonl", "a+") as file:
        file.seek(0)
        file.write(json.dumps(json.loads(file.readline()) | {"UID": "invented"}) + "\n")
    with pytest.raises(StlmError, match=r"^blimp: lm-eval does not ask as many questions of invented;"):
        parity(model, tokenizer, folder, ["blimp"])
    with pytest.raises(StlmError, match="tasks=piqa cannot be compared with lm-eval"):
        parity(model, tokenizer, folder, ["piqa"])


def test_a_difference_between_the_two_ways_is_noticed() -> None:
    same = {"questions": 10, "other strings": 0, "largest difference": 1e-6, "ties": 0, "acc": 0.5, "acc lm-eval": 0.5}
    rows = {"same": {}, "far": {"largest difference": 2e-4}, "unknown": {"largest difference": math.nan}, "other": {"acc": 0.6},
            "tied": {"acc": 0.6, "ties": 1}, "more than tied": {"acc": 0.7, "ties": 1}, "strings": {"other strings": 1},
            "normed": {"acc_norm": 0.3, "acc_norm lm-eval": 0.4}}
    expected = ["far", "unknown", "other", "more than tied", "strings", "normed"]
    assert unequal(pd.DataFrame([{"task": name} | same | row for name, row in rows.items()])) == expected


def in_jsonl(path: Path) -> list[dict]:
    "Rows without the fields that are empty."
    rows = map(json.loads, path.read_text("utf-8").splitlines())
    return [{field: cell for field, cell in row.items() if cell is not None} for row in rows]


def converted(samples: Path, folder: Path, kind: str) -> Path:
    "The same items in files of another kind; in CSV whatever is no text is JSON."
    folder.mkdir()
    for path in samples.glob("*.jsonl"):
        rows = pd.DataFrame(in_jsonl(path))
        write = {".csv.gz": lambda file, rows=rows: rows.map(lambda cell: cell if isinstance(cell, str) else json.dumps(cell)).to_csv(file),
                 ".parquet": rows.to_parquet, ".jsonl.zst": partial(rows.to_json, orient="records", lines=True)}[kind]
        write(folder / f"{path.stem}{kind}")
    return folder


def test_files_of_every_kind_are_handed_to_lm_eval(samples: Path, tmp_path: Path) -> None:
    kinds = {".jsonl": samples} | {kind: converted(samples, tmp_path / kind, kind) for kind in (".parquet", ".jsonl.zst")}
    written = []
    for kind, folder in kinds.items():
        assert write_tasks(folder, tmp_path / f"tasks{kind}") == list(LOCAL_TASKS)
        written.append({path.name: in_jsonl(path) for path in (tmp_path / f"tasks{kind}").glob("*.jsonl")})
    assert written[0] == written[1] == written[2] and sum(map(len, written[0].values())) == 10 + 5 + 2 * 5 + 5 + 2 * 10


def test_blank_lines_and_a_byte_order_mark_are_not_handed_to_lm_eval(samples: Path, tmp_path: Path) -> None:
    edited = tmp_path / "edited"
    edited.mkdir()
    for path in samples.glob("*.jsonl"):
        (edited / path.name).write_text("\n" + path.read_text("utf-8").replace("\n", "\n\n"), encoding="utf-8-sig")
    for folder, tasks in ((samples, "plain"), (edited, "read")):
        write_tasks(folder, tmp_path / tasks)
    assert [path.read_text() for path in sorted((tmp_path / "plain").glob("*.jsonl"))] == [
        path.read_text() for path in sorted((tmp_path / "read").glob("*.jsonl"))]


def test_lists_and_numbers_in_csv_are_read_as_such(samples: Path, tmp_path: Path) -> None:
    model = LanguageModel(ModelConfig(vocab_size=257, **SIZES | {"context": 1024, "n_layers": 1}))
    folder = converted(samples, tmp_path / "csv", ".csv.gz")
    table = parity(model, tokenizer_of("bytes"), folder, ["hellaswag", "arc_easy", "mmlu"], limit=2)
    assert table["questions"].tolist() == [2, 2, 4] and (table["other strings"] == 0).all() and table["largest difference"].max() < 1e-4
    assert table["acc"].tolist() == table["acc lm-eval"].tolist()


UNUSUAL = [("", " word"), ("", "naïve café 🙂"), ("Question: why?\nAnswer: ", "because"), ("two  blanks  ", " x"), ("a\n\n", "\nb"),
           ("清单", "是"), ("cut " * 150, "at the left"), ("the", "m"), ("x", " 1234567890" * 5)]


def test_unusual_requests_are_answered_as_lm_eval_answers_them(pair: tuple[LanguageModel, Tokenizer]) -> None:
    requests = [SimpleNamespace(args=each) for each in UNUSUAL]
    texts = [SimpleNamespace(args=(text,)) for text in (TEXT[:1500], "One line.", TEXT[:192], TEXT[:193])]
    ours, theirs = HarnessModel(pair), second_model(*pair)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the context that is cut is cut on purpose
        nats, greedy = zip(*ours.loglikelihood(requests, disable_tqdm=True), strict=True)
    expected_nats, expected_greedy = zip(*theirs.loglikelihood(requests, disable_tqdm=True), strict=True)
    np.testing.assert_allclose(nats, expected_nats, rtol=1e-4)
    assert list(greedy) == list(expected_greedy)
    rolled = [lm.loglikelihood_rolling(texts, disable_tqdm=True) for lm in (ours, theirs)]
    np.testing.assert_allclose(*rolled, rtol=1e-4)


def test_lm_eval_is_left_alone_until_it_is_asked_for() -> None:
    code = "import sys, stlm, stlm.cli, stlm.evaluate.benchmarks; print({'lm_eval', 'evaluate', 'datasets'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
    import evaluate
    assert "stlm" not in evaluate.__name__ and Path(evaluate.__file__).parent.name == "evaluate"  # lm-eval's, not the room of this name


def test_lm_eval_keeps_its_own_models() -> None:
    pytest.importorskip("accelerate", reason="lm-eval's hf backend needs accelerate; pip install 'stlm[harness]' brings it")
    code = ("from stlm.evaluate.harness import register; register()\n"
            "from lm_eval.api.registry import get_model; print(*(get_model(name).__name__ for name in ('dummy', 'hf', 'stlm')))")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == ["DummyLM", "HFLM", "HarnessModel"]


def test_the_command_is_lm_evals_own(samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    model = LanguageModel(ModelConfig(vocab_size=257, **SIZES | FAMILIES["bytes"]))
    save_pretrained(tmp_path / "model", model, tokenizer_of("bytes"))
    write_tasks(samples, tmp_path / "tasks")
    monkeypatch.setattr(sys, "argv", ["stlm"])  # it is put back: the command changes it
    given = {"model": "stlm", "model_args": f"path={tmp_path / 'model'}", "device": "cpu", "tasks": "arc_easy",
             "include_path": tmp_path / "tasks", "output_path": tmp_path / "results"}
    app(["lm-eval", "--log_samples", *(str(word) for name, value in given.items() for word in (f"--{name}", value))], standalone_mode=False)
    assert "|arc_easy|" in capsys.readouterr().out.replace(" ", "")
    results, = (tmp_path / "results").rglob("results_*.json")
    assert json.loads(results.read_text())["config"]["tokenizer"].startswith("bytes-")
    assert len(next((tmp_path / "results").rglob("samples_*.jsonl")).read_text().splitlines()) == EACH
