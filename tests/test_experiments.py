"""Notebooks as experiments, and the command line: on a small corpus, in a project of their own."""

import json
import math
import re
import shutil
import subprocess
import sys
import warnings

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup

import stlm as stlm_package
from helpers import own_project, real_text, settings, small_run, stlm
from stlm.cli import app, main
from stlm.config import ConfigError, DataConfig, ModelConfig, preset, to_yaml
from stlm.data.corpora import open_corpus
from stlm.data.tokenizers import open_tokenizer, train_bpe
from stlm.evaluate.bits import bits_per_byte
from stlm.foundation import StlmError
from stlm.lab import studies
from stlm.lab.statistics import detectable_accuracy
from stlm.lab.studies import Study, equal_budgets, find_notebook, run_notebook
from stlm.model.lm import LanguageModel
from stlm.pretrained import from_pretrained, save_pretrained
from stlm.train.records import Run


def given(parameters: dict[str, object]) -> list[str]:
    return [part for name, value in parameters.items() for part in ("-P", f"{name}={value}")]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return own_project(tmp_path_factory.mktemp("experiments") / "project")


@pytest.fixture(scope="module")
def overrides(project):
    return small_run(real_text(project)) | {"train.steps": 20, "train.checkpoint_every": 0}


@pytest.fixture
def inside(project, monkeypatch):
    monkeypatch.chdir(project)
    return project


def test_a_failing_arm_is_recorded_and_the_others_go_on(inside, overrides, capfd):
    arms = {"good": {}, "diverging": {"model.init_std": 1e38}}
    study = Study("holes", "demo-bpe", {name: overrides | changes for name, changes in arms.items()})
    study.train()
    table = study.table(max_bytes=3000).set_index("arm")
    assert list(table["status"]) == ["finished", "stopped"]
    assert "not finite" in table.loc["diverging", "error"] and table.loc["good", "error"] == ""
    assert table.loc["good", "bits_per_byte"] > 0 and table.loc["good", "scored_bytes"] >= 2000
    assert study.verdict("good", 3000) == "Nothing can be said: no seed of good and of another arm has finished."
    assert "diverging, seed 0 failed" in capfd.readouterr().err
    notebook = json.loads((study.of("good")[0].run.folder / "notebook.ipynb").read_text())
    assert any("image/png" in output.get("data", {}) for cell in notebook["cells"] for output in cell.get("outputs", []))

    before = (study.of("good")[0].run.folder / "metrics.json").stat().st_mtime_ns
    study.train()
    assert (study.of("good")[0].run.folder / "metrics.json").stat().st_mtime_ns == before, "finished runs are not repeated"


def test_a_run_on_a_text_that_was_replaced_is_no_longer_compared(inside, overrides, tmp_path, capfd):
    text = tmp_path / "text.txt"
    shutil.copy(overrides["data.corpus"].removeprefix("file:"), text)
    whole, changes = text.read_text(), overrides | {"data.corpus": f"file:{text}", "train.steps": 2}
    arms = {"early": changes, "late": changes | {"train.lr": 0.01}}
    Study("replaced", "demo-bpe", {"early": changes}).train()
    text.write_text(whole.replace("License", "licence"))
    study = Study("replaced", "demo-bpe", arms)
    study.train()
    table = study.table(max_bytes=3000).set_index("arm")
    assert list(table["status"]) == ["failed", "finished"] and "holds another text" in table.loc["early", "error"]
    assert study.verdict("early", 3000).startswith("Nothing can be said") and list(study.logs()) == ["late"]
    assert "early, seed 0 failed: the data of" in capfd.readouterr().err
    code, _, errors = stlm("evaluate", next(planned.run.folder for planned in study.runs if planned.arm == "early"), cwd=inside)
    assert code == 2 and "holds another text" in errors
    shutil.rmtree(study.of("late")[0].run.folder)
    text.write_text(whole)
    study.train()
    assert [planned.status for planned in study.runs] == ["finished"] * 2, "the text is there again"
    text.unlink()
    study.train()
    assert [planned.status for planned in study.runs] == ["finished"] * 2, "nothing contradicts them"


@pytest.fixture
def asked_speeds(monkeypatch, tmp_path):
    "The arms of every measurement, of which the speeds are invented; the baseline's is 100 at the first, 200 at the second."
    asked = []
    def measure_speed(configs, rounds):
        asked.append(list(configs))
        speeds = {"baseline": 100.0 * len(asked), "wide": 50.0, "deep": 150.0}
        speed = pd.Series({arm: speeds.get(arm, 200.0) for arm in configs})
        return pd.DataFrame({"bytes_per_second": speed, "lower_quartile": 0.8 * speed, "upper_quartile": 1.25 * speed})
    monkeypatch.setenv("STLM_CACHE", str(tmp_path))
    monkeypatch.setattr(studies, "measure_speed", measure_speed)
    return asked


def test_an_arm_that_is_added_is_measured_beside_the_baseline_and_leaves_the_others_as_they_are(asked_speeds, tmp_path):
    arms = {"baseline": {}, "wide": {"model.d_ff": 512}, "deep": {"model.n_layers": 5}}
    two = equal_budgets("demo-bpe", {arm: arms[arm] for arm in ("baseline", "wide")}, "seconds", 10_000)
    three = equal_budgets("demo-bpe", arms, "seconds", 10_000)
    assert asked_speeds == [["baseline", "wide"], ["baseline", "deep"]]
    assert {arm: changes["train.bytes"] for arm, changes in three.items()} == {"baseline": 10_000, "wide": 5_000, "deep": 7_500}
    assert {arm: three[arm] for arm in two} == two
    kept = [json.loads(file.read_text()) for file in (tmp_path / "speeds").iterdir()]
    assert sorted((each["ratio_low"], each["ratio"], each["ratio_high"]) for each in kept) == [
        pytest.approx((0.64 * ratio, ratio, ratio / 0.64)) for ratio in (0.5, 0.75)], "how sure the ratio is can be seen"


def test_what_does_the_same_arithmetic_reads_the_same_text(asked_speeds):
    schedule = {"train.schedule": "linear", "train.cooldown": 0.2, "train.min_lr_ratio": 0.0, "train.lr": 0.01, "train.weight_decay": 0.0,
                "train.warmup": 0.1, "train.seed": 5, "train.eval_every": 3, "train.eval_bytes": 99, "train.clip": 0.0}
    arms = {"baseline": {}, "other schedule": schedule, "wide": {"model.d_ff": 512}, "wide, other schedule": schedule | {"model.d_ff": 512},
            "muon": {"train.optimizer": "muon"}}
    budgets = {arm: changes["train.bytes"] for arm, changes in equal_budgets("demo-bpe", arms, "seconds", 10_000).items()}
    assert budgets["baseline"] == budgets["other schedule"] == 10_000 and budgets["wide"] == budgets["wide, other schedule"] != 10_000
    assert asked_speeds == [["baseline", "wide, other schedule", "muon"]], "nothing is measured that is known"


@pytest.mark.parametrize("module", [torch, stlm_package])
def test_other_code_is_measured_again(asked_speeds, monkeypatch, module):
    arms = {"baseline": {}, "wide": {"model.d_ff": 512}}
    for version in ("1", "1", "2"):
        monkeypatch.setattr(module, "__version__", version)
        equal_budgets("demo-bpe", arms, "seconds", 10_000)
    assert len(asked_speeds) == 2


def test_impossible_arms_are_refused_before_any_work(inside, overrides):
    with pytest.raises(ConfigError, match="n_layer"):
        Study("never", "demo-bpe", {"good": overrides, "typo": {"model.n_layer": 3}})
    with pytest.raises(ConfigError, match="at least one arm"):
        Study("never", "demo-bpe", {})
    assert not (inside / "runs" / "never").exists()


@pytest.mark.parametrize("parameters, said", [
    ({"layers": 3}, "layers is not a parameter"),
    ({"overrides": 3}, "overrides=3 has the wrong type"),
])
def test_wrong_parameters_of_a_notebook_are_refused(inside, tmp_path, parameters, said):
    with pytest.raises(StlmError, match=said):
        run_notebook(find_notebook("train"), tmp_path / "out.ipynb", parameters, live=False)
    assert not (inside / "runs" / "train").exists()


def test_a_notebook_whose_process_is_killed(inside, tmp_path):
    cells = [nbformat.v4.new_code_cell("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "greedy.ipynb")
    with pytest.raises(StlmError, match=r"greedy.ipynb failed: its process was ended, as Linux does it where memory runs out"):
        run_notebook(tmp_path / "greedy.ipynb", tmp_path / "out.ipynb", {}, live=False)


def test_report_in_one_command(project, overrides):
    own = ("data.corpus", "data.tokenizer", "model.context", "train.steps")  # the study's, or its parameters'
    common = {name: value for name, value in overrides.items() if name not in own}
    parameters = {"corpus": overrides["data.corpus"], "budget": 4000, "score_bytes": 2000, "seeds": "[0,1]", "items": 3,
                  "overrides": json.dumps(common | {"data.valid_fraction": 0.25})}
    code, output, errors = stlm("report", "quickstart", *given(parameters), cwd=project)
    assert code == 0, errors[-2000:]
    page = (project / "reports" / "quickstart" / "index.html").read_text()
    results = pd.read_csv(project / "reports" / "quickstart" / "results.csv")
    assert set(results["status"]) == {"finished"} and len(results) == 8 and results["bits_per_byte"].between(1, 12).all()
    assert "flat bytes" in page and "http://" not in page.replace("http://www.w3.org", "") and "bits per byte" in page
    assert "12-grams shuffled" in page, "what the arms have learned is shown"
    assert "quickstart" in (project / "reports" / "index.html").read_text() and "reports/quickstart/index.html" in output
    assert (project / "reports" / "quickstart" / "figures" / "learning-curves.png").stat().st_size > 5000
    assert "seed 0" in errors, "progress is shown while the study runs"


@pytest.mark.parametrize("name, arms", [("positions", ["RoPE", "learned"]), ("ffn_tying", ["own networks", "loop"]),
                                        ("byte_pooling", ["BPE 4k", "BPE boundaries"]), ("recipe", ["baseline", "modern, n-grams"])])
def test_the_other_studies(project, overrides, name, arms):
    own = ("data.corpus", "train.steps", "data.tokenizer", "model.context", "model.n_layers")  # the study's, or its parameters'
    common = {field: value for field, value in overrides.items() if field not in own} | {"data.valid_fraction": 0.25}
    code, _, errors = stlm("report", name, *given({"corpus": overrides["data.corpus"], "budget": 4000, "score_bytes": 6000, "seeds": "[0]",
                                                   "only": json.dumps(arms), "jobs": 2, "equal": "flops", "overrides": json.dumps(common)}),
                           cwd=project)
    assert code == 0, errors[-2000:]
    results = pd.read_csv(project / "reports" / name / "results.csv")
    assert list(results["arm"]) == arms and set(results["status"]) == {"finished"} and results["bits_per_byte"].between(1, 12).all()
    spent = results["bytes_seen"] * results["training_flops_per_byte"]
    assert spent.max() - spent.min() <= (spent / results["steps"]).max(), "FLOPs were held equal, up to one step"
    assert arms[1] in (project / "reports" / name / "index.html").read_text()


def test_the_race(project, overrides):
    common = {field: value for field, value in overrides.items() if field.startswith("data.")} | {"data.valid_fraction": 0.25}
    common |= {"data.tokenizer": "bytes", "model.context": 64, "model.n_layers": 1, "train.compile": "off"}
    arms = ["the recipe", "with n-grams"]
    asked = {"corpus": overrides["data.corpus"], "seconds": 2, "score_bytes": 3000, "only": json.dumps(arms),
             "overrides": json.dumps(common), "more_seeds": json.dumps({"the recipe": [1, 2]})}

    def made():
        code, _, errors = stlm("report", "race", *given(asked), cwd=project)
        assert code == 0, errors[-2000:]
        page = BeautifulSoup((project / "reports" / "race" / "index.html").read_text(), "html.parser").get_text()
        return pd.read_csv(project / "reports" / "race" / "results.csv").set_index("arm"), page

    results, page = made()
    assert list(results.index) == [*arms, "the recipe", "the recipe"] and list(results["seed"]) == [0, 0, 1, 2]
    assert results["bits_per_byte"].between(1, 12).all()
    runs = [Run(folder.parent) for folder in (project / "runs" / "race").rglob("pace.json")]
    assert sorted(run.pace["steps"] for run in runs) == sorted(results["steps"])
    assert all(run.pace["steps"] == max(1, int(2 / run.pace["seconds_per_step"])) for run in runs)
    bits = results.loc["the recipe", "bits_per_byte"]
    assert f"{bits.mean():.3f} bits per byte ({bits.min():.3f} to {bits.max():.3f} with 3 seeds)" in page
    assert f"over seeds is {bits.std():.4f} (2 degrees of freedom" in page and "Not trained: AdamW for all; embeddings" in page

    for run in runs:  # as if the machine had slowed down during the second arm
        metrics = run.metrics | {"train_seconds": 2.2 if run.config.model.ngram else 2.0}
        (run.folder / "metrics.json").write_text(json.dumps(metrics))
    made()
    verdict = json.loads((project / "reports" / "race" / "report.json").read_text())["verdict"]
    assert "no part of the race: with n-grams (2)" in verdict and "At the same clock" not in verdict


@pytest.fixture
def measured(project, overrides):
    "The page on throughput, of very small models in single precision: its results and its text."
    def run(start=""):
        fractions = {field: value for field, value in overrides.items() if field in ("data.valid_fraction", "data.test_fraction")}
        small = {"corpus": overrides["data.corpus"], "rounds": 1, "batch_size": 2, "context": 64, "write_bytes": 40, "layers": 1,
                 "overrides": json.dumps(fractions | {"train.precision": "fp32"})}
        code, _, errors = stlm("report", "throughput", *given(small), cwd=project, start=start)
        assert code == 0, errors[-2000:]
        folder = project / "reports" / "throughput"
        text = BeautifulSoup((folder / "index.html").read_text(), "html.parser").get_text()
        return pd.read_csv(folder / "results.csv").set_index("arm"), text
    return run


def test_throughput(measured):
    results, page = measured()
    families = ["flat bytes", "pooled bytes", "BPE"]
    assert (results.loc[families, ["training_bytes_per_second", "writing_bytes_per_second"]] > 0).all(axis=None)
    code = [name + kind for name in ("stlm", "Hugging Face Llama") for kind in ("", ", compiled")]
    assert (results.loc[code, ["training_symbols_per_second", "mfu"]] > 0).all(axis=None)
    assert "in float32, an eager step runs" in page and "an eager one of Hugging Face's Llama; a compiled step" in page
    sizes = results.loc[["flat bytes", "pooled bytes"], "unique_parameters"]
    assert sizes.max() < 1.03 * sizes.min()


def test_throughput_without_a_compiler(measured, tmp_path):
    results, page = measured(f"import os; os.environ |= {{'CXX': '/nowhere/g++', 'TORCHINDUCTOR_CACHE_DIR': '{tmp_path}'}}")
    assert "stlm" in results.index and not results.index.str.contains("compiled").any()
    assert "stlm, compiled is left out, because torch.compile fails" in page and "a compiled step" not in page


def test_the_machine(project, overrides):
    own = ("data.corpus", "data.max_bytes", "data.valid_fraction", "train.steps")  # the notebook's
    common = {field: value for field, value in overrides.items() if field not in own} | {"data.valid_fraction": 0.25}
    code, _, errors = stlm("report", "machine", *given({"large": "demo-bytes", "windows": 2, "trial": 3, "small": "demo-bytes", "steps": 4,
                                                        "corpus": overrides["data.corpus"], "overrides": json.dumps(common)}), cwd=project)
    assert code == 0, errors[-2000:]
    folder = project / "reports" / "machine_demo-bytes_cpu"
    results = pd.read_csv(folder / "results.csv").set_index("arm")
    assert results.loc["demo-bytes", "symbols per second"] > 0 and 0 < results.loc["demo-bytes", "MFU"] < 1.5
    memory = results.filter(like="demo-bytes, ", axis=0)
    assert len(memory) == 2 and (memory["measured, GB"] > memory["computed, GB"]).all() and (memory["computed, GB"] > 0).all()
    repeated = results.filter(regex="same again|resumed", axis=0)
    assert len(repeated) == 4 and (repeated["largest difference of a weight"] == 0).all()
    page = BeautifulSoup((folder / "index.html").read_text(), "html.parser").get_text()
    assert "equal runs end with the same bits, stopped and resumed or not" in page


def small_benchmarks(folder):
    "Six pairs of BLiMP and six questions of MMLU in files."
    pairs = [{"sentence_good": f"The {noun}s {verb}.", "sentence_bad": f"The {noun}s {verb}s.", "field": "morphology", "UID": verb,
              "linguistics_term": "subject_verb_agreement"} for noun in ("dog", "bird", "girl") for verb in ("sing", "run")]
    exams = [{"subject": subject, "question": f"What is {n} and {n}?", "choices": [str(2 * n), "9", "7", "5"], "answer": 0}
             for subject in ("anatomy", "virology") for n in range(3)]
    for name, rows in {"blimp": pairs, "mmlu_test": exams}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_documents(project, overrides, tmp_path):
    small_benchmarks(tmp_path)
    common = {field: value for field, value in overrides.items() if field.startswith("data.")} | {"data.valid_fraction": 0.25}
    common |= {"data.tokenizer": "bytes", "model.context": 64, "model.n_layers": 1, "train.compile": "off"}
    parameters = {"corpus": overrides["data.corpus"], "budget": 4000, "score_bytes": 3000, "sizes": "[0,1]", "seeds": "[0]",
                  "tasks": "blimp", "data_dir": tmp_path, "jobs": 2, "overrides": json.dumps(common)}
    code, _, errors = stlm("report", "documents", *given(parameters), cwd=project)
    assert code == 0, errors[-2000:]
    results = pd.read_csv(project / "reports" / "documents" / "results.csv").set_index("arm")
    assert list(results["status"]) == ["finished"] * 2, results["error"].tolist()
    assert list(results.index) == ["whole documents", "single lines"] and len(set(results["scored_bytes"])) == 1
    assert results["bits_per_byte"].between(1, 12).all() and results["bits_per_byte_of_lines"].between(1, 12).all()
    assert results["blimp"].between(0, 1).all()


def save_tiny(folder, seed):
    "A model that has learned nothing."
    torch.manual_seed(seed)
    tokenizer = open_tokenizer(DataConfig(tokenizer="bytes"))
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, context=128, n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, d_ff=32)
    save_pretrained(folder, LanguageModel(shape), tokenizer)
    return folder


def school_questions(folder, count=40):
    "Questions of ARC whose choices differ in length, in a file."
    texts = [[f"{n}", f"{n} and no more", f"about as many as {n + 1}", f"{n + 2}!"] for n in range(count)]
    rows = [{"question": f"What is {n} and 0?", "choices": {"text": choices, "label": [*"ABCD"]}, "answerKey": "ABCD"[n % 4]}
            for n, choices in enumerate(texts)]
    (folder / "arc_easy_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return texts


def rows_under(page, heading):
    "The cells of the first table below a heading, as text."
    table = BeautifulSoup(page, "html.parser").find("h2", string=heading).find_next("table")
    return [[cell.get_text(strip=True) for cell in row.find_all(["th", "td"])] for row in table.find_all("tr")]


def shares_by_length(table, texts):
    "What falls to each choice, (N, 4), with its characters taken out."
    a_character = np.array([np.array(row) / [*map(len, choices)] for row, choices in zip(table["logprob"], texts, strict=False)])
    return np.exp(a_character) / np.exp(a_character).sum(1, keepdims=True)


def calibration_by_hand(shares, truth):
    bins = {}
    for share, right in zip(shares, truth, strict=True):
        bins.setdefault(math.ceil(10 * share.max()), []).append(share.max() - (share.argmax() == right))
    return sum(abs(sum(gaps)) for gaps in bins.values()) / len(shares)


def asked_before(folder, task):
    "What was kept of a model's answers."
    (path,) = (folder / "evaluations").glob(f"{task}-*.parquet")
    return pd.read_parquet(path)


def test_the_report_card(project, overrides, tmp_path):
    save_tiny(tmp_path / "second", 0)
    code, _, errors = stlm("train", *settings(overrides | {"train.steps": 17}), "--folder", tmp_path / "first", cwd=project)
    assert code == 0, errors
    (tmp_path / "grammar.txt").write_text("All of the dogs sing. The birds run away.\n" * 50)  # what a third one would have read
    shutil.copytree(tmp_path / "first", tmp_path / "third")
    config = tmp_path / "third" / "config.yaml"
    config.write_text(config.read_text().replace(overrides["data.corpus"], f"file:{tmp_path / 'grammar.txt'}"))
    environment = tmp_path / "third" / "environment.json"
    environment.write_text(environment.read_text().replace(open_corpus(overrides["data.corpus"]).fingerprint,
                                                           open_corpus(f"file:{tmp_path / 'grammar.txt'}").fingerprint))
    metrics = tmp_path / "third" / "metrics.json"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"train_seconds": 600}))
    small_benchmarks(tmp_path)
    exams = tmp_path / "mmlu_test.jsonl"
    exams.write_text("".join(exams.read_text().splitlines(keepends=True)[:3]))  # of a single subject
    texts = school_questions(tmp_path)
    for split, count in (("train", 30), ("validation", 10)):
        words = [("sentence", "label"), *((f"The {'cat sat' if n % 2 else 'sat cat'} {n}.", n % 2) for n in range(count))]
        (tmp_path / f"cola_{split}.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in words))
    parameters = {"models": json.dumps([{"small": str(tmp_path / "first")}, str(tmp_path / "second"), str(tmp_path / "third")]),
                  "tasks": "blimp,mmlu,arc_easy", "limit": 30, "data_dir": tmp_path, "corpora": json.dumps([real_text(tmp_path)]),
                  "score_bytes": 3000, "prompts": '["The"]', "probes": '["cola"]', "overlap_words": 3,
                  "remark": "How they were trained: by hand."}
    code, _, errors = stlm("report", "evaluate", *given(parameters), cwd=project)
    assert code == 0, errors[-2000:]
    results = pd.read_csv(project / "reports" / "evaluate" / "results.csv").set_index("arm")
    assert list(results.index) == ["small", "second", "third"] and set(results["status"]) == {"measured"}
    assert results[["blimp_n_items", "mmlu_n_items", "arc_easy_n_items"]].to_numpy().tolist() == [[6, 3, 30]] * 3
    assert results["blimp_acc"].between(0, 1).all() and results["bits_per_byte_licence.txt"].between(1, 40).all()
    assert (results["bits_per_byte_licence.txt_sliding"] != results["bits_per_byte_licence.txt"]).all()
    model, tokenizer = from_pretrained(tmp_path / "first" / "model")
    licence_lines = [line for text in open_corpus(real_text(tmp_path)).documents(3000) for line in text.split("\n") if line.strip()]
    of_lines = bits_per_byte(model, tokenizer, licence_lines).bits_per_byte
    assert results.loc["small", "bits_per_byte_licence.txt_lines_alone"] == pytest.approx(of_lines, rel=1e-5)
    page = (project / "reports" / "evaluate" / "index.html").read_text()
    assert "chance" in page and "The first 30 questions" in page and "How they were trained: by hand." in page
    assert "<td>17</td>" in page, "the steps of the one that is a run"

    verdict = json.loads((project / "runs" / "evaluate" / "conclusion.json").read_text())["verdict"]
    for name, sentence in zip(results.index, verdict.split(" million parameters): ")[1:], strict=True):
        assert ("below the published" in sentence) == (results.loc[name, "blimp_acc"] < 0.78)
    assert " They were trained for different times: small " in verdict and verdict.endswith("; third 10.0 minutes.")

    table, other = (asked_before(tmp_path / name, "arc_easy") for name in ("first", "second"))
    shares, truth = shares_by_length(table, texts), table["truth"]
    below = {tuple(row[:2]): row[-1] for row in rows_under(page, "Below the accuracy")}
    assert below["small", "arc_easy"] == f"{calibration_by_hand(shares, truth):.3f}", "lengths are taken out, as in acc_norm"
    of_truth = sorted(shares[range(30), truth])
    told = [row[1:3] for row in rows_under(page, "The easiest and the hardest") if row[0] == "arc_easy"]
    assert told == [["easiest", f"{share:.3f}"] for share in of_truth[:-3:-1]] + [["hardest", f"{share:.3f}"] for share in of_truth[:2]]

    better = {tuple(row[:2]): row[2:] for row in rows_under(page, "Which is better")}  # points, interval, can be shown, won, lost, p
    discordance = (table["acc_norm"] != other["acc_norm"]).mean()
    assert better["arc_easy, acc_norm", "second"][2] == f"{100 * detectable_accuracy(30, discordance, level=0.025):.1f}"
    assert better["arc_easy, acc_norm", "third"] == ["+0.0", "+0.0 to +0.0", "-", "0", "0", "1"], "one and the same"

    assert better["mmlu, acc", "second"][1:3] == ["unbounded", "-"], "one subject alone says nothing"

    probed = {row[0]: row[1:] for row in rows_under(page, "Linear probes")}
    assert [[*probed[name][:2], *probed[name][-2:]] for name in results.index] == [["cola", "mcc", "10", "0"]] * 3

    seen = {tuple(row[:2]): row[2:5] for row in rows_under(page, "Has it been seen before?")}
    assert seen["small", "blimp"] == ["6", "0", "0"] and seen["third", "blimp"] == ["4", "2", "0"], "each in the text that it has read"
    figures = project / "reports" / "evaluate" / "figures"
    assert {path.stem for path in figures.iterdir()} == {"accuracy", "reliability", "blimp-phenomenon", "blimp-paradigm", "mmlu-category",
                                                         "mmlu-subject", "bits-in-sight"}
    by_paradigm = pd.read_csv(project / "runs" / "evaluate" / "blimp_by_paradigm.csv").set_index(["model", "paradigm"])
    assert by_paradigm["n_items"].to_dict() == {(model, verb): 3 for model in results.index for verb in ("sing", "run")}


def test_a_report_card_shows_what_is_missing_and_goes_on(project, tmp_path):
    passages = ["The river rose for three days, and in the end the water took the bridge and the mill beside the river",
                "She had put the letter into the drawer herself, but when she looked there was no letter",
                "He asked the old man for the way to the harbour, and the man walked with him down to the harbour"]
    (tmp_path / "lambada_test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in passages))
    models = [tmp_path / "gone", save_tiny(tmp_path / "good", 0), save_tiny(tmp_path / "other", 1)]
    parameters = {"models": json.dumps([*map(str, models)]), "tasks": "lambada", "data_dir": tmp_path, "prompts": '["The"]',
                  "corpora": json.dumps([real_text(tmp_path), f"file:{tmp_path / 'nowhere.txt'}"]), "score_bytes": 2000}
    code, _, errors = stlm("report", "evaluate", *given(parameters), cwd=project)
    assert code == 0, errors[-2000:]
    results = pd.read_csv(project / "reports" / "evaluate" / "results.csv").set_index("arm")
    assert results["status"].to_dict() == {"gone": "failed", "good": "measured", "other": "measured"}
    assert "config.json" in results.loc["gone", "error"] and results.loc["good", "error"].startswith(f"file:{tmp_path / 'nowhere.txt'}")
    assert results.loc[["good", "other"], ["lambada_acc", "lambada_perplexity", "bits_per_byte_licence.txt"]].notna().all(axis=None)
    page = (project / "reports" / "evaluate" / "index.html").read_text()
    assert "gone could not be measured" in page and '<pre class="output">no task has choices' in page
    missing = {tuple(row[:2]): row[2] for row in rows_under(page, "What is asked")}
    assert "config.json" in missing["gone", "everything"] and "finds no file" in missing["other", f"file:{tmp_path / 'nowhere.txt'}"]
    assert [row[:2] for row in rows_under(page, "Bits per byte")[2:]] == [["good", "licence.txt"], ["other", "licence.txt"]]


@pytest.mark.parametrize("models, said", [
    (["runs/a/model", "runs/b/model", "runs/c/a"], "runs/a/model and runs/c/a are both called a"),
    (["gone"], "no model could be measured: gone: cannot read gone/config.json")])
def test_a_report_card_that_cannot_be_made(project, tmp_path, models, said):
    small_benchmarks(tmp_path)
    parameters = {"models": json.dumps(models), "tasks": "blimp", "data_dir": tmp_path}
    code, _, errors = stlm("report", "evaluate", *given(parameters), cwd=project)
    assert code == 2 and said in errors, errors[-2000:]


def test_scoring(project, overrides, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'stlm[harness]' brings it")
    small_benchmarks(tmp_path)
    small = {"model.n_layers": 1, "model.d_model": 16, "model.n_heads": 2, "model.n_kv_heads": 1, "model.d_ff": 32,
             "data.tokenizer": "bpe:300", "data.valid_fraction": 0.2, "data.test_fraction": 0.2}
    parameters = {"data_dir": tmp_path, "tasks": "blimp,mmlu", "share": 0.7, "rounds": 2, "batches": "[2]",
                  "corpus": overrides["data.corpus"], "overrides": json.dumps(small)}
    code, _, errors = stlm("report", "scoring", *given(parameters), cwd=project)
    assert code == 0, errors[-2000:]
    results = pd.read_csv(project / "reports" / "scoring" / "results.csv").set_index(["task", "way"])
    assert all(asked == (6 if way.startswith("stlm") else 4) for (_, way), asked in results["questions"].items()), "stlm is asked all"
    assert (results["seconds_lowest"] > 0).all()
    assert np.allclose(results["seconds"], (results["seconds_lowest"] + results["seconds_highest"]) / 2), "the median of two rounds"
    assert (results["seconds_lowest"] < results["seconds_highest"]).all()
    harness = results.xs("lm-eval, batches of 2", level="way")
    assert list(harness.index) == ["blimp", "mmlu"]
    assert harness["largest_difference"].between(0, 1e-4).all() and (harness["same_answer"] == 1).all()


def test_the_commands(project, overrides):
    given = settings(overrides | {"train.steps": 21})
    code, output, errors = stlm("prepare", *given, cwd=project)
    assert code == 0 and "wrote" in output and "validation" in output, errors
    code, output, errors = stlm("train", *given, "--folder", "mine", cwd=project)
    assert code == 0 and "wrote" in output and "bits per byte" in output, errors
    code, output, errors = stlm("train", *given, "--folder", "mine", cwd=project)
    assert code == 0 and Run(project / "mine").metrics["steps"] == 21, "a finished run is shown again"
    code, output, errors = stlm("evaluate", "mine", "--max-bytes", 2000, cwd=project)
    assert code == 0 and "bits per byte" in output and (project / "mine" / "bits_validation_max-bytes-2000.json").exists(), errors
    assert overrides["data.corpus"] in output
    code, first, errors = stlm("generate", "mine", "The licence", "--max-tokens", 20, cwd=project)
    assert code == 0 and first.startswith("The licence"), errors
    assert stlm("generate", "mine", "The licence", "--max-tokens", 20, cwd=project)[1] == first, "the same seed, the same text"
    errors = stlm("generate", "mine", "The licence " * 100, "--max-tokens", 1, cwd=project)[2]
    assert re.fullmatch(r"warning: the prompt has \d+ symbols; the model reads the last \d+ of them\n", errors), "one line, for a user"
    code, output, errors = stlm("generate", "mine", "The licence", "--temperature", "-1", cwd=project)
    assert code and not output and "temperature=-1.0 is not possible" in errors, "nothing is written before all is checked"
    code, output, errors = stlm("runs", ".", cwd=project)
    assert code == 0 and "mine" in output and "finished" in output, errors
    code, output, errors = stlm("runs", "nowhere", cwd=project)
    assert code and "nowhere is no folder" in errors and not output
    code, output, errors = stlm("evaluate", "mine", "--corpus", "", cwd=project)
    assert code and "data.corpus=''" in errors and not output
    (project / "a file").write_text("")
    code, output, errors = stlm("train", *settings(overrides | {"data.corpus": "file:nowhere.txt"}), "--folder", "a file", cwd=project)
    assert code and "a file is a file; allowed: a folder" in errors, "before any text is looked for"


def test_memory_of_training_knows_what_is_overridden(capsys):
    def memory(*settings):
        given = [word for each in settings for word in ("--set", each)]
        app(["info", "stlm-10m", "--windows", "2", "--device", "cpu", *given], standalone_mode=False)
        return float(re.search(r"training memory, GB +([\d.]+)", capsys.readouterr().out)[1])

    plain = memory("train.precision=fp32")
    assert memory("train.precision=fp32", "train.checkpoint_activations=true") < 0.7 * plain
    assert memory("train.precision=bf16") < 0.95 * plain


def test_a_run_that_was_stopped_is_named_as_such_before_anything_is_prepared(tmp_path):
    run = tmp_path / "a run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(preset("demo-bpe", {"data.corpus": f"file:{tmp_path}/nowhere.txt"})))
    for command in (["evaluate"], ["evaluate", "--corpus", "file:nowhere.txt"], ["evaluate", "--tasks", "piqa"], ["generate"],
                    ["parity", "--data-dir", "nowhere"]):
        with pytest.raises(StlmError, match="has not finished") as error:
            app([*command, str(run)], standalone_mode=False)
        assert str(error.value).endswith(f"go on with: stlm train --config '{run}/config.yaml' --folder '{run}'")
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from stlm.evaluate.harness import HarnessModel
    with pytest.raises(StlmError, match="has not finished"):
        HarnessModel(run)


def test_the_command_starts_without_what_it_may_not_need():
    slow = {"torch", "numpy", "pandas", "datasets", "transformers", "lm_eval"}
    code = f"import sys, stlm, stlm.cli; print(sorted({slow} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_text_is_scored_as_it_is(tmp_path, capsys):
    torch.manual_seed(0)
    documents = ["A first document, naïve and short.", "A second one.\nIt has two lines.", "A third one, which ends the file."]
    tokenizer = train_bpe("bpe:300", [" ".join(documents) * 3])
    sizes = dict(context=16, n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, d_ff=32)
    model = LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, **sizes))
    save_pretrained(tmp_path / "mine", model, tokenizer)
    for name, texts in {"whole": documents, "first": documents[:1]}.items():
        (tmp_path / f"{name} of it.txt").write_text("\n\n".join(texts), encoding="utf-8")
        app(["evaluate", str(tmp_path / "mine"), "--corpus", f"file:{tmp_path}/{name} of it.txt", "--stride", "8"], standalone_mode=False)
        bits, output = bits_per_byte(model, tokenizer, texts, stride=8), capsys.readouterr().out
        assert output.startswith(f"{bits.bits_per_byte:.4f} bits per byte") and f"documents of file:{tmp_path}/{name} of it.txt;" in output
        path, = (tmp_path / "mine").glob(f"bits_{name}-of-it*.json")
        found = json.loads(path.read_text())
        assert found["bits_per_byte"] == bits.bits_per_byte and found["n_bytes"] == sum(len(text.encode()) for text in texts)
    app(["evaluate", str(tmp_path / "mine"), "--corpus", f"file:{tmp_path}/whole of it.txt", "--max-bytes", "1"], standalone_mode=False)
    assert "in 1 documents" in (output := capsys.readouterr().out) and "where --max-bytes 1 stopped" in output
    app(["evaluate", str(tmp_path / "mine"), "--corpus", f"file:{tmp_path}/whole of it.txt"], standalone_mode=False)
    kept = {path.stem.partition("_")[2].partition("_")[2]: json.loads(path.read_text()) for path in tmp_path.glob("mine/bits_whole*.json")}
    assert {name: (each["n_documents"], each["stride"]) for name, each in kept.items()} == {
        "": (3, 16), "stride-8": (3, 8), "max-bytes-1": (1, 16)}, "a quick figure does not take the place of the full one"
    assert kept["stride-8"]["command"].endswith("it.txt' --stride 8") and kept[""]["environment"]["torch"] == torch.__version__
    for folder in ("mine", "hf:nobody/nothing"):
        with pytest.raises(StlmError, match=r"name a text with --corpus"):
            app(["evaluate", folder if ":" in folder else str(tmp_path / folder)], standalone_mode=False)


def test_ctrl_c_is_said_in_one_line(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr("sys.argv", ["stlm", "info"])
    monkeypatch.setattr("stlm.cli._config", interrupt)
    monkeypatch.setattr("warnings.formatwarning", warnings.formatwarning)  # `main` sets another one
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130 and capsys.readouterr().err == "stlm: interrupted\n"


@pytest.mark.parametrize("arguments, said", [
    (["train", "--set", "model.n_layer=3"], "model.n_layer is not a field"),
    (["train", "--set", "train.lr=fast"], "train.lr='fast' has the wrong type"),
    (["train", "--preset", "stlm-5m"], "preset='stlm-5m' does not exist"),
    (["prepare", "--set", "data.corpus=file:nothing.txt"], "nothing.txt"),
    (["prepare", "--set", "data.corpus=openwebtext"], "file:"),
    (["generate", "nowhere"], "nowhere"),
    (["generate", "hf:gpt2"], "only scored here"),
    (["study", "nothing"], "there is no experiment 'nothing'"),
])
def test_mistakes_are_one_line(project, arguments, said):
    code, _, errors = stlm(*arguments, cwd=project)
    lines = errors.strip().splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("stlm: ") and said in lines[0], errors
