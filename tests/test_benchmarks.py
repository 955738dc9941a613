"""Benchmarks on the real files: every question as it must be put, every figure from scores computed apart, nothing scored twice."""

import json
import lzma
import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from helpers import real_text, stlm
from stlm.cli import app
from stlm.config import DataConfig, ModelConfig
from stlm.data.tokenizers import Tokenizer, open_tokenizer
from stlm.evaluate import benchmarks
from stlm.evaluate.benchmarks import FIVE, TASKS, Item, Row, Source, Task, choices, evaluate, load_items, open_model
from stlm.evaluate.contamination import hash_words
from stlm.foundation import StlmError
from stlm.infer.scoring import score
from stlm.model.lm import LanguageModel
from stlm.pretrained import save_pretrained

SIZES = {"blimp": 67_000, "hellaswag": 10_042, "arc_easy": 2_376, "winogrande": 1_267, "mmlu": 14_042}


@pytest.fixture(scope="module")
def data() -> Path:
    folder = Path(os.environ.get("STLM_SHARED_DATA", "nowhere")) / "benchmarks"
    if not folder.is_dir():
        pytest.skip("the benchmarks are not here: STLM_SHARED_DATA names no folder with benchmarks/")
    return folder


@pytest.fixture(scope="module")
def loaded(data: Path) -> dict[str, list[Item]]:
    "Every question of the five, and of two other forms of MMLU."
    return {name: load_items(TASKS[name], data) for name in (*SIZES, "mmlu_5shot", "mmlu_cloze", "winogrande_sentence", "blimp_in_text")}


@pytest.fixture(scope="module")
def subject() -> tuple[LanguageModel, Tokenizer]:
    "A small untrained model with decided opinions, which reads bytes."
    torch.manual_seed(0)
    tokenizer = open_tokenizer(DataConfig(tokenizer="bytes"))
    shape = dict(context=1024, n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, d_ff=32, init_std=0.4)
    return LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, **shape)), tokenizer


def save(folder: Path, name: str, rows: list[dict]) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def in_jsonl(path: Path) -> list[dict]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# questions

SCHOOL = "Question: When a rock is placed in a graduated cylinder containing water, the height of the water will\nAnswer:"
AIR = "Question: What gas in the air do we need to breathe in order to live?\nAnswer:"
MURTIS = "What can murtis be translated as?\nA. Offerings\nB. Prayers\nC. Apparitions\nD. Idols\nAnswer:"
JUMP = "High jump: The boy lands on his back on to a red mat. The boy gets up from the mat. The boy"


@pytest.mark.parametrize("name, number, pairs, truth", [
    ("blimp", 0, [("", " Who should Derek hug after shocking Richard?"), ("", " Who should Derek hug Richard after shocking?")], 0),
    ("blimp_in_text", 0, [("It was late.", " Who should Derek hug after shocking Richard?"),
                          ("It was late.", " Who should Derek hug Richard after shocking?")], 0),
    ("hellaswag", 5, [(JUMP, " starts doing spins."), (JUMP, " celebrates by clapping and flexing both arms."),
                      (JUMP, " is dancing on the mat."), (JUMP, " does jump jacks on his stick.")], 1),
    ("arc_easy", 93, [(SCHOOL, " decrease"), (SCHOOL, " increase"), (SCHOOL, " remain the same")], 1),
    ("arc_easy", 500, [(AIR, f" {gas}") for gas in ("nitrogen", "oxygen", "carbon dioxide", "hydrogen", "water vapor")], 1),
    ("winogrande", 0, [("Sarah was a much better surgeon than Maria so Sarah", " always got the easier cases."),
                       ("Sarah was a much better surgeon than Maria so Maria", " always got the easier cases.")], 1),
    ("winogrande_sentence", 0, [("", " Sarah was a much better surgeon than Maria so Sarah always got the easier cases."),
                                ("", " Sarah was a much better surgeon than Maria so Maria always got the easier cases.")], 1),
    ("mmlu", 13871, [("The following are multiple choice questions (with answers) about world religions.\n\n" + MURTIS, f" {letter}")
                     for letter in "ABCD"], 3),
    ("mmlu_cloze", 13871, [("The following are questions (with answers) about world religions.\n\n"
                            "Question: What can murtis be translated as?\nAnswer:", f" {text}")
                           for text in ("Offerings", "Prayers", "Apparitions", "Idols")], 3),
])
def test_a_question_is_put_as_written_here(loaded: dict[str, list[Item]], name: str, number: int, pairs: list, truth: int) -> None:
    item = loaded[name][number]
    assert (list(item.pairs), item.truth, item.number) == (pairs, truth, number)


def test_five_examples_stand_before_the_question(loaded: dict[str, list[Item]]) -> None:
    context, continuation = loaded["mmlu_5shot"][13871].pairs[3]
    first = "What is the sign of the covenant for Jewish males?\nA. The rainbow\nB. Circumcision\nC. A son\nD. Bar mitzvah\nAnswer: B\n\n"
    last = "How can the Upanishads be characterized?\nA. Ritual texts\nB. Philosophical texts\nC. Hymns\nD. Origin stories\nAnswer: B\n\n"
    assert context.startswith("The following are multiple choice questions (with answers) about world religions.\n\n" + first)
    assert context.endswith(last + MURTIS) and context.count("\nAnswer:") == 6 and continuation == " D"


def test_hellaswag_is_cleaned_as_in_the_harness() -> None:
    utils = pytest.importorskip("lm_eval.tasks.hellaswag.utils")
    texts = ["How to bake [title] Warm the oven.", " [header] First [title] then  this   that", "[substeps] [step] it", "a [b] [title]", ""]
    assert [benchmarks._without_marks(text) for text in texts] == [utils.preprocess(text) for text in texts]
    assert benchmarks._without_marks(texts[0]) == "How to bake. Warm the oven."


def test_choices_of_arc_may_be_numbered() -> None:
    labels = ["1", "2", "3", "4", "5"]
    row = Row({"question": "How many?", "choices": {"text": list("vwxyz"), "label": labels}, "answerKey": "4"})
    assert TASKS["arc_easy"].item(row) == Item(choices("Question: How many?\nAnswer:", list("vwxyz")), 3, plain="How many? y")


def test_the_sets_are_complete(loaded: dict[str, list[Item]]) -> None:
    assert {name: len(loaded[name]) for name in SIZES} == SIZES
    paradigms, phenomena, fields = (Counter(groups) for groups in zip(*(item.groups for item in loaded["blimp"]), strict=True))
    assert len(paradigms) == 67 and set(paradigms.values()) == {1000} and len(phenomena) == 12 and len(fields) == 4
    subjects, categories = (set(groups) for groups in zip(*(item.groups for item in loaded["mmlu"]), strict=True))
    assert len(subjects) == 57 and len(categories) == 4
    assert sum(len(item.pairs) != 4 for item in loaded["arc_easy"]) == 11


def test_a_question_is_told_without_its_frame(loaded: dict[str, list[Item]]) -> None:
    assert loaded["mmlu_5shot"][13871].plain == loaded["mmlu_cloze"][13871].plain == "What can murtis be translated as? Idols"
    assert loaded["arc_easy"][500].plain == "What gas in the air do we need to breathe in order to live? oxygen"
    assert loaded["blimp_in_text"][0].plain == loaded["blimp"][0].plain == " Who should Derek hug after shocking Richard?"
    assert loaded["hellaswag"][5].plain == f"{JUMP} celebrates by clapping and flexing both arms."
    assert sum(len(hash_words(item.plain)) < 8 for item in loaded["mmlu"]) == 160, "too short for an overlap of eight words"


def test_a_limit_holds_for_each_of_the_finest_groups(data: Path, loaded: dict[str, list[Item]]) -> None:
    for name, expected in {"winogrande": 5, "mmlu": 5 * 57, "mmlu_5shot": 5 * 57}.items():
        some = load_items(TASKS[name], data, limit=5)
        assert len(some) == expected and all(item == loaded[name][item.number] for item in some)
    assert [item.number for item in load_items(TASKS["arc_easy"], data, limit=3)] == [0, 1, 2]
    assert len(load_items(TASKS["winogrande"], data, limit=10**6)) == SIZES["winogrande"]


# figures

@pytest.fixture(scope="module")
def small(data: Path, loaded: dict[str, list[Item]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The first rows of every set, and of each of its first groups, in files of their own."
    folder = tmp_path_factory.mktemp("benchmarks")
    for stem in ("hellaswag_val", "arc_easy_test", "winogrande_dev"):
        save(folder, f"{stem}.jsonl", in_jsonl(data / f"{stem}.jsonl.xz")[:12])
    blimp, mmlu = in_jsonl(data / "blimp.jsonl.xz"), in_jsonl(data / "mmlu_test.jsonl.xz")
    save(folder, "blimp.jsonl", blimp[:5] + blimp[20_000:20_004] + blimp[40_000:40_007])
    save(folder, "mmlu_test.jsonl", mmlu[:5] + mmlu[3000:3004] + mmlu[9000:9007])
    return folder


@pytest.mark.parametrize("name", [*SIZES, "mmlu_cloze", "winogrande_sentence"])
def test_figures_follow_from_scores(small: Path, subject: tuple, name: str) -> None:
    result = evaluate(*subject, TASKS[name], small, show_progress=False)
    summary = result.summary()
    for item, (_, row) in zip(result.items, result.table.iterrows(), strict=True):
        logprobs = np.array([each.logprob for each in score(*subject, list(item.pairs))])
        texts = [continuation[1:] for _, continuation in item.pairs]
        np.testing.assert_allclose(row["logprob"], logprobs, rtol=1e-4)
        assert row["acc"] == (logprobs.argmax() == item.truth)
        assert row["acc_norm"] == ((logprobs / [len(text) for text in texts]).argmax() == item.truth)
        assert row["acc_bytes"] == ((logprobs / [len(text.encode()) for text in texts]).argmax() == item.truth)
        assert row["truth_share"] == pytest.approx(torch.tensor(logprobs).softmax(0)[item.truth].item(), rel=1e-3, abs=1e-30)
    groups = result.table.groupby(TASKS[name].groups[0])["acc"].mean() if TASKS[name].groups else result.table["acc"]
    assert summary["acc"] == pytest.approx(groups.mean() if name == "blimp" else result.table["acc"].mean())
    of_truth = [score(*subject, [item.pairs[item.truth]])[0].logprob for item in result.items]
    assert summary["truth_logprob"] == pytest.approx(np.mean(of_truth), rel=1e-4)
    assert benchmarks.results_table([summary])["truth_logprob"][0] == f"{summary['truth_logprob']:.2f}"
    assert summary["n_items"] == len(result.items) and 0 <= summary["acc_stderr"] < 0.2 and 0 < summary["chance"] <= 0.5
    json.dumps(summary, allow_nan=False)


def test_standard_errors_are_those_of_the_harness(small: Path, subject: tuple) -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics")
    for name, combine in {"blimp": lambda errors, _: metrics.unweighted_mean_stderr(errors), "mmlu": metrics.pooled_sample_stderr}.items():
        result = evaluate(*subject, TASKS[name], small, show_progress=False)
        groups = [part.tolist() for _, part in result.table.groupby(TASKS[name].groups[0], sort=False)["acc_norm"]]
        expected = combine([metrics.mean_stderr(group) for group in groups], list(map(len, groups)))
        assert result.summary()["acc_norm_stderr"] == pytest.approx(float(expected))
    plain = evaluate(*subject, TASKS["arc_easy"], small, show_progress=False)
    assert plain.summary()["acc_norm_stderr"] == pytest.approx(metrics.mean_stderr(plain.table["acc_norm"].tolist()))


def test_identical_sentences_of_blimp_are_right_by_half(loaded: dict[str, list[Item]], data: Path, tmp_path: Path, subject: tuple) -> None:
    ties = [item.number for item in loaded["blimp"] if len(set(item.pairs)) == 1]
    rows = in_jsonl(data / "blimp.jsonl.xz")
    save(tmp_path, "blimp.jsonl", [rows[number] for number in ties])
    assert len(ties) == 7 and set(evaluate(*subject, TASKS["blimp"], tmp_path, show_progress=False).table["acc"]) == {0.5}


def test_a_last_word_is_right_if_it_would_be_written(tmp_path: Path, subject: tuple) -> None:
    save(tmp_path, "lambada_test.jsonl", [{"text": "It was late and he went to bed"}, {"text": "She opened the old door"}])
    result = evaluate(*subject, TASKS["lambada"], tmp_path, show_progress=False)
    by_hand = score(*subject, [("It was late and he went to", " bed"), ("She opened the old", " door")])
    assert list(result.table["acc"]) == [each.greedy for each in by_hand]
    assert result.summary()["perplexity"] == pytest.approx(math.exp(-np.mean([each.logprob for each in by_hand])), rel=1e-4)
    assert result.summary()["chance"] == 0 and result.summary()["acc_norm"] is None
    assert replace(result, table=result.table.assign(truth_logprob=-1e4)).summary()["perplexity"] is None, "no number is as large"


def test_questions_that_do_not_fit_are_counted(small: Path, subject: tuple) -> None:
    model, tokenizer = subject
    short = LanguageModel(replace(model.config, context=100))
    result = evaluate(short, tokenizer, TASKS["hellaswag"], small, show_progress=False)
    longest = [max(len((context + text).encode()) for context, text in item.pairs) for item in result.items]
    assert result.summary()["n_truncated"] == sum(length > 100 for length in longest) > 0


@pytest.mark.parametrize("name", ["winogrande", "blimp"])
def test_figures_that_are_no_numbers_are_refused(small: Path, subject: tuple, tmp_path: Path, name: str) -> None:
    broken = LanguageModel(subject[0].config)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    with pytest.raises(StlmError, match="not finite") as error:
        evaluate(broken, subject[1], TASKS[name], small, folder=tmp_path, show_progress=False)
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*.parquet"))


# cache

def test_an_interrupted_evaluation_goes_on_where_it_was(small: Path, subject: tuple, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "_PORTION_CHARACTERS", 1500)
    asked: list[int] = []

    def counted(model: LanguageModel, tokenizer: Tokenizer, pairs: list) -> list:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(pairs))
        return score(model, tokenizer, pairs)

    monkeypatch.setattr(benchmarks, "score", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*subject, TASKS["hellaswag"], small, folder=tmp_path, show_progress=False)
    assert not list(tmp_path.glob("*.parquet"))
    before = sum(asked)
    asked[:] = [0] * 3
    resumed = evaluate(*subject, TASKS["hellaswag"], small, folder=tmp_path, show_progress=False)
    assert before > 0 and before + sum(asked) == sum(len(item.pairs) for item in resumed.items)
    (path,) = tmp_path.iterdir()
    assert path == resumed.path

    asked[:] = [0, 0]  # the next score would be refused
    again = evaluate(*subject, TASKS["hellaswag"], small, folder=tmp_path, show_progress=False)
    monkeypatch.setattr(benchmarks, "score", score)
    pd.testing.assert_frame_equal(again.table, pd.read_parquet(path))
    fresh = evaluate(*subject, TASKS["hellaswag"], small, show_progress=False)
    assert again.summary() | {"file": None} == resumed.summary() | {"file": None} == fresh.summary()

    path.write_bytes(path.read_bytes()[:200])  # damaged: made again
    assert evaluate(*subject, TASKS["hellaswag"], small, folder=tmp_path, show_progress=False).summary() == again.summary()


def test_what_differs_is_not_mixed_up(small: Path, subject: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = subject
    other = LanguageModel(model.config)
    task = TASKS["winogrande"]
    changed = replace(task, version=2)
    paths = {evaluate(each, tokenizer, which, small, limit, tmp_path, show_progress=False).path
             for each, which, limit in ((model, task, 0), (model, task, 3), (other, task, 0), (model, changed, 0), (model, task, 0))}
    assert len(paths) == len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(benchmarks, "SCORER", benchmarks.SCORER + 1)
    assert evaluate(model, tokenizer, task, small, 0, tmp_path, show_progress=False).path not in paths


def test_what_was_found_is_judged_again(tmp_path: Path, subject: tuple) -> None:
    save(tmp_path, "same.jsonl", [{"text": "A cat."}, {"text": "A dog."}])
    first = Task("same", Source("nobody/same", None, "test", "same"), lambda row: Item(choices("", [row.text("text")] * 2), 1))
    shared, folder = replace(first, ties="shared"), tmp_path / "kept"
    tables = [evaluate(*subject, task, tmp_path, folder=folder, show_progress=False).table for task in (first, shared, shared, first)]
    assert [table["acc"].tolist() for table in tables] == [[0, 0], [0.5, 0.5], [0.5, 0.5], [0, 0]]
    (path,) = folder.iterdir()
    assert pd.read_parquet(path)["acc"].tolist() == [0, 0], "the file says what was said last"


# sources and errors

def test_the_hub_is_read_by_datasets(small: Path, tmp_path: Path) -> None:
    "`datasets` takes a folder for a data set of the hub; one with configurations stands for BLiMP's 67."
    hub = tmp_path / "hub"
    rows = [json.loads(line) for line in (small / "blimp.jsonl").read_text().splitlines()]
    names = sorted({row["UID"] for row in rows})
    configs = "\n".join(f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}.jsonl" for name in names)
    hub.mkdir()
    (hub / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    for name in names:
        save(hub, f"{name}.jsonl", [row for row in rows if row["UID"] == name])
    items = load_items(replace(TASKS["blimp"], source=Source(str(hub), "*", "train", "blimp")))
    assert sorted(item.pairs for item in items) == sorted(item.pairs for item in load_items(TASKS["blimp"], small)) and len(items) == 16


SCENE = {"activity_label": "a", "ctx_a": "b", "endings": ["c", "d"], "label": "2"}
SCHOOL_ROW = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
EXAM = {"subject": "anatomy", "question": "q", "choices": list("abcd"), "answer": 4}


@pytest.mark.parametrize("name, row, said", [
    ("hellaswag_val", SCENE, "field 'ctx_b' is missing"),
    ("hellaswag_val", SCENE | {"ctx_b": ""}, "field 'label' holds '2'; allowed: one of 0, 1"),
    ("arc_easy_test", SCHOOL_ROW | {"answerKey": "C"}, "field 'answerKey' holds 'C'; allowed: one of A, B"),
    ("arc_easy_test", SCHOOL_ROW | {"choices": {"text": ["a"], "label": ["A"]}},
     "field 'choices.text' holds ['a']; allowed: a list of two or more texts"),
    ("arc_easy_test", SCHOOL_ROW | {"choices": {"text": list("abc"), "label": list("AB")}}, "field 'choices.label' holds ['A', 'B']"),
    ("arc_easy_test", SCHOOL_ROW | {"choices": {"text": list("ab"), "label": list("ABC")}}, "field 'choices.label' holds ['A', 'B', 'C']"),
    ("winogrande_dev", {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": ""}, "field 'answer' holds ''"),
    ("mmlu_test", EXAM | {"choices": "abcd"}, "field 'choices' holds 'abcd'"),
    ("mmlu_test", EXAM | {"choices": list("abcde")}, "field 'choices' holds ['a', 'b', 'c', 'd', 'e']; allowed: a list of 4 texts"),
    ("mmlu_test", EXAM | {"choices": ["a"], "answer": 0}, "field 'choices' holds ['a']; allowed: a list of 4 texts"),
    ("mmlu_test", EXAM, "field 'answer' holds 4; allowed: one of 0, 1, 2, 3"),
    ("mmlu_test", EXAM | {"question": "half a \ud800 pair"}, "field 'question' holds 'half a \\ud800 pair'"),
    ("mmlu_test", EXAM | {"question": " "}, "field 'question' holds ' '; allowed: text in valid Unicode, not blank"),
    ("blimp", {"sentence_good": None, "field": "f", "linguistics_term": "l", "UID": "u"}, "field 'sentence_good' holds None"),
])
def test_a_bad_row_is_named(small: Path, tmp_path: Path, name: str, row: dict, said: str) -> None:
    (task,) = (TASKS[each] for each in FIVE if TASKS[each].source.file == name)
    path = tmp_path / f"{name}.jsonl"
    path.write_text((small / f"{name}.jsonl").read_text().splitlines()[0] + "\n" + json.dumps(row) + "\n")
    with pytest.raises(StlmError) as error:
        load_items(task, tmp_path)
    assert f"{path}, row 2: {said}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv"])
def test_what_editors_leave_in_a_file_is_passed_over(tmp_path: Path, ending: str) -> None:
    rows = [{"goal": f"Dry a cup, {n}", "sol1": "with a towel", "sol2": "with a fish", "label": "0"} for n in range(3)]
    lines = list(map(json.dumps, rows))
    text = "\r\n".join(["", lines[0], "", "  ", *lines[1:], "", ""])
    if ending != ".jsonl":
        text = pd.DataFrame(rows).to_csv(index=False, sep="\t" if ending == ".tsv" else ",")
    path = tmp_path / f"piqa_val{ending}"
    path.write_text(text, encoding="utf-8-sig")
    assert [dict(row.fields) for row in benchmarks.local_rows(tmp_path, "piqa_val")] == rows
    assert [item.number for item in load_items(TASKS["piqa"], tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("text", ["goal,sol1,sol2,label\na,b,c,0\na,b,c,0,\n", "goal,sol1,sol2,label\na,b,c,0\na,b,0\n"])
def test_a_row_with_other_cells_than_columns_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "piqa_val.csv").write_text(text)
    with pytest.raises(StlmError, match=r"piqa_val\.csv: ValueError: row 2 has [35] cells for 4 columns"):
        load_items(TASKS["piqa"], tmp_path)


def test_a_blank_line_counts_where_a_row_is_named(tmp_path: Path) -> None:
    for wrong in ("{}", "null", '{"goal": 1}'):
        (tmp_path / "piqa_val.jsonl").write_text(f"\n\n{wrong}\n")
        with pytest.raises(StlmError, match="row 3"):
            load_items(TASKS["piqa"], tmp_path)


def test_a_file_that_was_cut_off_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "winogrande_dev.jsonl.xz").write_bytes((data / "winogrande_dev.jsonl.xz").read_bytes()[:20_000])
    with pytest.raises(StlmError, match=r"cannot read .*winogrande_dev\.jsonl\.xz: .*complete"):
        load_items(TASKS["winogrande"], tmp_path)
    (tmp_path / "piqa_val.jsonl").touch()
    with pytest.raises(StlmError, match="holds no rows"):
        load_items(TASKS["piqa"], tmp_path)


def test_the_command(small: Path, subject: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_pretrained(tmp_path / "model", *subject)
    code, output, errors = stlm("evaluate", "model", "--tasks", "all", "--data-dir", small, "--limit", 3, cwd=tmp_path)
    assert code == 0, errors
    lines = [line.split() for line in output.splitlines()]
    assert [line[0] for line in lines[1:6]] == list(SIZES) and [line[-2] for line in lines[1:6]] == ["9", "3", "3", "3", "9"]
    assert "winogrande: 100%" in errors
    paths = [Path(line.split()[1].rstrip(",")) for line in output.splitlines() if ".json" in line]
    written = {name: json.loads((tmp_path / path).read_text()) for name, path in zip(SIZES, paths, strict=True)}
    for name, figures in written.items():
        assert figures["task"] == name and "--limit 3" in figures["command"] and figures["environment"]["torch"] == torch.__version__
    tables = {name: pd.read_parquet(tmp_path / path.with_suffix(".parquet")) for name, path in zip(SIZES, paths, strict=True)}
    assert max(map(len, output.splitlines()[:6])) <= 120
    for name, path in (("blimp", paths[0]), ("mmlu", paths[4])):
        group = TASKS[name].groups[0]
        kinds = pd.read_csv(tmp_path / path.with_suffix(".csv"), index_col=group)
        assert f"wrote {path.with_suffix('.csv')}, the figures of every {group}" in output and list(kinds["n_items"]) == [3, 3, 3]
        np.testing.assert_allclose(kinds["acc"], tables[name].groupby(group, sort=False)["acc"].mean())
    for name in ("hellaswag", "arc_easy", "winogrande"):
        assert tables[name]["acc_norm"].mean() == pytest.approx(written[name]["acc_norm"])
    for arguments, said in ((("--tasks", "helaswag"), "did you mean 'hellaswag'"), (("--tasks", "piqa"), "--data-dir")):
        code, _, errors = stlm("evaluate", "model", *arguments, cwd=tmp_path)
        assert code == 2 and said in errors and len(errors.strip().splitlines()) == 1


def test_a_call_leaves_the_results_of_others(small: Path, subject: tuple, tmp_path: Path) -> None:
    save_pretrained(tmp_path / "model", *subject)
    for options in (["arc_easy,winogrande"], ["winogrande", "--limit", "2"], ["winogrande"]):
        app(["evaluate", str(tmp_path / "model"), "--data-dir", str(small), "--tasks", *options], standalone_mode=False)
    found = [json.loads(path.read_text()) for path in sorted((tmp_path / "model" / "evaluations").glob("*.json"))]
    assert sorted((each["task"], each["n_items"]) for each in found) == [("arc_easy", 12), ("winogrande", 2), ("winogrande", 12)]


def test_a_result_keeps_the_machine_that_scored_it(small: Path, subject: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(tmp_path / "model", *subject)

    def written(machine: str, *options: str, name: str = "evaluations/arc_easy") -> dict:
        monkeypatch.setattr("stlm.hardware.describe", lambda: {"cpu": machine})
        app(["evaluate", str(tmp_path / "model"), *options], standalone_mode=False)
        (path,) = (tmp_path / "model").glob(f"{name}*.json")
        return json.loads(path.read_text())

    text = ("--corpus", real_text(tmp_path), "--max-bytes", "2000")
    bits = written("cluster", *text, name="bits_")
    assert bits["environment"] == {"cpu": "cluster"} and bits == written("laptop", *text, name="bits_")

    asked = ("--data-dir", str(small), "--tasks")
    first = written("cluster", *asked, "arc_easy")
    assert first["environment"] == {"cpu": "cluster"} and first == written("laptop", *asked, "arc_easy,winogrande")
    (found,) = (tmp_path / "model" / "evaluations").glob("winogrande*.json")
    assert json.loads(found.read_text())["environment"] == {"cpu": "laptop"}
    (table,) = (tmp_path / "model" / "evaluations").glob("arc_easy*.parquet")
    table.with_suffix(".json").unlink()
    assert written("laptop", *asked, "arc_easy")["environment"] is None, "nobody knows"
    table.with_suffix(".json").write_text('{"environment": ')
    assert written("laptop", *asked, "arc_easy")["environment"] is None, "a damaged one counts as missing"
    table.unlink()
    assert written("laptop", *asked, "arc_easy")["environment"] == {"cpu": "laptop"}


@pytest.mark.parametrize("given, said", [
    (["--limit", "0"], "--limit is for benchmarks"), (["--data-dir", "."], "--data-dir is for benchmarks"),
    (["--precision", "fp32"], "--precision is for benchmarks"), (["--tasks", "blimp", "--split", "test"], "--split is not for benchmarks"),
    (["--tasks", "all", "--stride", "8"], "--stride is not for benchmarks"), (["--tasks", "all", "--max-bytes", "9"], "--max-bytes is"),
    (["--tasks", "all", "--corpus", "pydocs"], "--corpus is not for benchmarks"),
    (["--corpus", "pydocs", "--split", "test"], "--split divides the run's own text"),
])
def test_what_would_change_nothing_is_refused(given: list[str], said: str) -> None:
    with pytest.raises(StlmError, match=said) as error:
        app(["evaluate", "nowhere", *given], standalone_mode=False)
    assert "\n" not in str(error.value)


def test_the_help_lists_every_task() -> None:
    text = " ".join(CliRunner().invoke(app, ["evaluate", "--help"], terminal_width=200).output.split())
    assert f"There are {', '.join(TASKS)}." in text and f"all = {', '.join(FIVE)}." in text


def test_other_peoples_models_stand_in_the_same_table(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="the extra stlm[hf] is not installed")
    from test_reference import save_tokenizer, tiny
    monkeypatch.setenv("STLM_CACHE", str(tmp_path / "cache"))
    tiny("GPTNeoX").save_pretrained(tmp_path / "theirs")
    save_tokenizer(tmp_path / "theirs", None)
    model, tokenizer, folder = open_model(f"hf:{tmp_path / 'theirs'}", "cpu")
    result = evaluate(model, tokenizer, TASKS["winogrande"], small, folder=folder, show_progress=False)
    assert result.path is not None and result.path.is_relative_to(tmp_path / "cache" / "evaluations") and result.path.exists()
    expected = [each.logprob for each in score(model, tokenizer, [pair for item in result.items for pair in item.pairs])]
    np.testing.assert_allclose(np.concatenate(result.table["logprob"].to_list()), expected, rtol=1e-4)


def test_a_task_of_ones_own(tmp_path: Path, subject: tuple) -> None:
    save(tmp_path, "sums.jsonl", [{"a": "2", "b": "3", "sum": "5"}, {"a": "1", "b": "7", "sum": "8"}])
    own = Task("sums", Source("nobody/sums", None, "test", "sums"),
               lambda row: Item(choices(f"{row.text('a')} + {row.text('b')} =", "5678"), row.position("sum", "5678")), shots=1,
               examples=Source("nobody/sums", None, "test", "sums"))
    result = evaluate(*subject, own, tmp_path, show_progress=False)
    assert result.items[0].pairs[0] == ("1 + 7 = 8\n\n2 + 3 =", " 5"), "no question is its own example"
    assert result.items[1].pairs[3] == ("2 + 3 = 5\n\n1 + 7 =", " 8") and result.items[1].truth == 3 and result.summary()["n_items"] == 2
