"Corpora from real files of every kind, and from a hub that is not there."
import gzip
import json
import lzma
import os
import time
from pathlib import Path

import pandas as pd
import pytest
import zstandard
from huggingface_hub import HfApi, constants

from stlm.config import DataConfig
from stlm.data.corpora import SPLITS, Corpus, open_corpus, split_documents, split_of, texts
from stlm.foundation import StlmError

DOCUMENTS = [f"Document {i}.\n\nIt has \"quotes\", commas,\nan ünïcode word and 😀." for i in range(40)]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts").mkdir()
    return tmp_path / "texts"


def content(ending: str, folder: Path) -> bytes:
    "The documents in one of the four formats."
    if ending == "txt":
        return "\n<|endoftext|>\n".join(DOCUMENTS).encode()
    if ending == "jsonl":
        return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(DOCUMENTS)).encode()
    table = pd.DataFrame({"id": range(len(DOCUMENTS)), "text": DOCUMENTS})
    if ending == "csv":
        return table.to_csv(index=False).encode()
    table.to_parquet(folder / "plain")
    return (folder / "plain").read_bytes()


def read(name: str) -> list[str]:
    return list(open_corpus(name).documents())


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv", "parquet"])
def test_every_format_and_compression(folder, ending, compression):
    file = folder / f"a [1] *.{ending}{compression}"  # characters that a pattern would read otherwise
    file.write_bytes(COMPRESS[compression](content(ending, folder)))
    assert read(f"file:{file}") == DOCUMENTS
    assert open_corpus(f"file:{file}").fingerprint == open_corpus(f"file:{file}").fingerprint


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv", "parquet"])
def test_a_truncated_file_is_named(folder, ending, compression):
    file = folder / f"short.{ending}{compression}"
    whole = COMPRESS[compression](content(ending, folder))
    file.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(StlmError, match="short") as error:
        read(f"file:{file}")
    assert "\n" not in str(error.value)


def test_folders_and_patterns(folder):
    (folder / "deep" / "er").mkdir(parents=True)
    for name, text in {"b.txt": "bee", "a.txt": "ay", "deep/c.txt": "sea", "deep/er/d.txt": "dee", "notes.md": "left out"}.items():
        (folder / name).write_text(text)
    assert read(f"file:{folder}") == ["ay", "bee", "sea", "dee"]
    assert read(f"file:{folder}/*.txt") == ["ay", "bee"]
    assert sorted(read(f"file:{folder}/**/*.txt")) == ["ay", "bee", "dee", "sea"]
    with pytest.raises(StlmError, match=r"notes\.md"):
        read(f"file:{folder}/*")


def test_files_do_not_run_into_one_another(folder):
    (folder / "a.txt").write_text("one\n<|endoftext|>\ntwo")
    (folder / "b.txt").write_text("three\n<|endoftext|>\nfour\n<|endoftext|>\n")
    assert read(f"file:{folder}") == ["one", "two", "three", "four"]


def test_a_relative_path_and_home(folder, monkeypatch):
    (folder / "a.txt").write_text("here")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    assert read("file:a.txt") == read("file:~/a.txt") == ["here"]


def test_content_decides_the_fingerprint(folder):
    (folder / "a.txt").write_text("same")
    (folder / "b.txt").write_text("same")
    first = open_corpus(f"file:{folder}/a.txt").fingerprint
    assert first == open_corpus(f"file:{folder}/b.txt").fingerprint
    (folder / "a.txt").write_text("else")
    os.utime(folder / "a.txt", ns=(1, 1))
    assert first != open_corpus(f"file:{folder}/a.txt").fingerprint


def test_a_row_with_other_keys_is_no_obstacle(folder):
    rows = [{"text": "a"}, {"text": "b", "extra": 1}, {"other": None, "text": "c"}]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(f"file:{folder}/a.jsonl") == ["a", "b", "c"]


@pytest.mark.parametrize("column, words", [("#txt", "did you mean 'text'"), ("#id", "text")])
def test_a_missing_column_is_named(folder, column, words):
    for ending in ("jsonl", "csv", "parquet"):
        (folder / f"a.{ending}").write_bytes(content(ending, folder))
        with pytest.raises(StlmError, match=words):
            read(f"file:{folder}/a.{ending}{column}")


@pytest.mark.parametrize("name", ["file:/nowhere/a.txt", "file:", "pydoc", "hub:a", "hub:a/b:c:d:e:f"])
def test_names_that_mean_nothing(name):
    with pytest.raises(StlmError) as error:
        open_corpus(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["openwebtext", "hub:owner/name"])
def test_the_hub_out_of_reach_is_one_quick_line(name, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    start = time.perf_counter()
    with pytest.raises(StlmError, match=r"out of reach.*file:PATH") as error:
        open_corpus(name)
    assert time.perf_counter() - start < 5 and "\n" not in str(error.value)


def unreachable(*_, **__):
    raise ConnectionError("[Errno -2] Name or service not known")


def test_splits_stay_when_the_corpus_grows(folder):
    config = DataConfig(corpus=f"file:{folder}/a.txt", valid_fraction=0.2, test_fraction=0.2)
    many = [f"document number {i}" for i in range(500)]
    (folder / "a.txt").write_text("\n\n".join(many[:250]))
    before = {split: set(texts(config, split)) for split in SPLITS}
    (folder / "a.txt").write_text("\n\n".join([*many[::-1], *many]))
    after = {split: list(texts(config, split)) for split in SPLITS}
    assert sorted(text for part in after.values() for text in part) == sorted(many)  # every document once, in one split only
    for split in SPLITS:
        assert before[split] and before[split] <= set(after[split])
        assert all(split_of(text, 0.2, 0.2) == split for text in after[split])


def test_the_limit_counts_raw_bytes_of_whole_documents():
    corpus = Corpus("c", "0", {}, lambda: iter(["äöü", "b", "b", "c" * 10]))
    assert [text for _, text in split_documents(corpus, DataConfig(max_bytes=8))] == ["äöü", "b"]
    assert [text for _, text in split_documents(corpus, DataConfig(max_bytes=9))] == ["äöü", "b", "c" * 10]


def test_a_damaged_cache_of_pydocs_is_rebuilt(monkeypatch, tmp_path):
    monkeypatch.setattr("stlm.data.corpora.extract_pydocs", lambda: ["some text", "more text"])
    assert read("pydocs") == ["some text", "more text"]
    [cached] = (tmp_path / "cache").glob("corpora/*/documents.jsonl")
    cached.write_text('"some te')
    assert read("pydocs") == ["some text", "more text"]


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr("stlm.data.corpora.PYDOCS_PACKAGES", ("numpy", "no_such_package"))
    corpus = open_corpus("pydocs")
    assert corpus.info["missing"] == ["no_such_package"] and set(corpus.info["versions"]) == {"python", "numpy"}


@pytest.mark.skipif("STLM_SHARED_DATA" not in os.environ, reason="STLM_SHARED_DATA names no folder with real text")
def test_real_text():
    folder = Path(os.environ["STLM_SHARED_DATA"]) / "text"
    wiki = open_corpus(f"file:{folder / 'wiki_val.txt.xz'}")
    documents = list(wiki.documents())
    assert wiki.info["document"] == {"text between <|endoftext|> lines": 1}
    assert 300 < len(documents) < 330 and "<|endoftext|>" not in "".join(documents)
    stories = open_corpus(f"file:{folder / 'tinystories_sample.txt.xz'}")
    assert stories.info["document"] == {"a block between blank lines": 1}
    assert sum(len(text) for text in stories.documents(50_000)) < 60_000
