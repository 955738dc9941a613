"Corpora from real files of every kind, and from a hub that is not there."
import gzip
import itertools
import json
import lzma
import os
import time
from pathlib import Path

import datasets
import pandas as pd
import pytest
import zstandard
from huggingface_hub import HfApi, constants
from hypothesis import given, settings
from hypothesis import strategies as st

from stlm.config import DataConfig
from stlm.data import corpora
from stlm.data.corpora import (SPLITS, Corpus, SeenHashes, cut_lines, interleave, open_corpus, remember_revisions, split_documents,
                               split_of, texts)
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


@pytest.mark.parametrize("first", [{"text": None, "url": "u", "title": "t"}, {"url": "u", "title": "t"}, {"url": "u"}])
@pytest.mark.parametrize("column", ["", "#text"])
def test_a_first_row_without_text_says_nothing_of_the_others(folder, first, column):
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, [first, {"text": "real", "url": "v", "title": "t"}])))
    assert [text for text in read(f"file:{folder}/a.jsonl{column}") if text] == ["real"]


@pytest.mark.parametrize("column, words", [("#txt", "did you mean 'text'"), ("#id", "text")])
def test_a_missing_column_is_named(folder, column, words):
    for ending in ("jsonl", "csv", "parquet"):
        (folder / f"a.{ending}").write_bytes(content(ending, folder))
        with pytest.raises(StlmError, match=words):
            read(f"file:{folder}/a.{ending}{column}")


@pytest.mark.parametrize("name", ["file:/nowhere/a.txt", "file:", "pydoc", "hub:a", "hub:a/b:c:d:e:f", "hub:a/b@", "babylm@v1:c"])
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


# The hub, played by a folder: `datasets` opens "me/stories" there by the same code


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A data set of 3,000 rows in three files, in a hub that is within reach."
    (tmp_path / "me" / "stories").mkdir(parents=True)
    for number in range(3):
        rows = {"text": [f"file {number}, row {row}, \u2028 {'ä' * (row % 50)}" for row in range(1000)]}
        pd.DataFrame(rows).to_parquet(tmp_path / "me" / "stories" / f"{number}.parquet", row_group_size=90)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: type("Info", (), {"sha": "abc"}))
    monkeypatch.setattr(corpora, "PIECE_BYTES", 20_000)
    return "hub:me/stories"


def pieces(cache):
    return sorted((cache / "corpora").glob("*/*.json.zst"))


def refuse(*_, **__):
    raise AssertionError("the network was asked")


def test_rows_from_the_hub_are_fetched_once(hub, tmp_path, monkeypatch):
    everything = read(hub)
    assert len(everything) == 3000 and len(pieces(tmp_path / "cache")) > 3
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    assert read(hub) == everything


@pytest.mark.parametrize("other_version", [False, True])
def test_a_reader_who_leaves_early_loses_nothing(hub, tmp_path, monkeypatch, other_version):
    "However often reading is broken off, the rows are the same, and none is fetched twice."
    whole = [row for file in range(3) for row in pd.read_parquet(f"me/stories/{file}.parquet")["text"]]
    for number, stop in enumerate([1, 300, 301, 1100, 2500, 2990]):
        if other_version:
            monkeypatch.setattr(corpora, "_datasets_version", lambda version=number: f"{version}")
        assert list(itertools.islice(open_corpus(hub).documents(), stop)) == whole[:stop]
    monkeypatch.setattr(corpora, "_datasets_version", lambda: "the last one")
    assert read(hub) == whole
    stored = [file.name.split(".")[0].split("-") for file in pieces(tmp_path / "cache")]
    assert all(int(stop) == int(start) for (_, stop), (start, _) in itertools.pairwise(stored))


def test_a_network_that_fails_half_way(hub, tmp_path, monkeypatch):
    load = datasets.load_dataset

    def failing(*arguments, **options):
        def rows():
            yield from itertools.islice(load(*arguments, **options), 700)
            raise ConnectionError("reset by peer")
        return datasets.IterableDataset.from_generator(rows)

    with monkeypatch.context() as patched:
        patched.setattr(datasets, "load_dataset", failing)
        patched.setattr(corpora, "_datasets_version", lambda: "of the failing stream")
        with pytest.raises(StlmError, match="reset by peer"):
            read(hub)
    assert pieces(tmp_path / "cache")
    assert [text.split(",")[:2] for text in read(hub)] == [[f"file {file}", f" row {row}"] for file in range(3) for row in range(1000)]


def test_a_damaged_piece_is_fetched_again(hub, tmp_path):
    everything = read(hub)
    for spoil in (lambda file: file.write_bytes(file.read_bytes()[:-9]), lambda file: file.write_bytes(b""), Path.unlink):
        spoil(pieces(tmp_path / "cache")[2])
        assert read(hub) == everything


def edit(monkeypatch, sha: str) -> None:
    "The owner of every data set commits something."
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, revision=None, **__: type("Info", (), {"sha": revision or sha}))


def test_the_hub_is_read_as_it_was_first_seen(hub, tmp_path, monkeypatch):
    before = open_corpus(hub)
    edit(monkeypatch, "def")
    assert open_corpus(hub).fingerprint == before.fingerprint and before.info["revision"] == "abc"
    (tmp_path / "cache" / "corpora" / "hub" / "me--stories.json").unlink()
    assert open_corpus(hub).info["revision"] == "def" and open_corpus(hub).fingerprint != before.fingerprint


def test_a_pinned_revision(hub, monkeypatch):
    commit = "0123456789" * 4
    edit(monkeypatch, "def")
    by_tag = open_corpus(f"{hub}@v1:default")
    assert by_tag.info["revision"] == "v1" and by_tag.info["config"] == "default"
    assert open_corpus(hub).info["revision"] == "def", "one that is pinned says nothing of the newest"
    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    assert open_corpus(f"{hub}@v1:default").fingerprint == by_tag.fingerprint
    assert open_corpus(f"{hub}@{commit}").info["revision"] == open_corpus(f"tinystories@{commit}").info["revision"] == commit
    assert open_corpus(f"{hub}@{commit}:::text").fingerprint != open_corpus(f"{hub}@{commit}").fingerprint


@pytest.mark.parametrize("name", ["hub:me/stories", "tinystories", "mix:1*hub:me/stories@v1,2*tinystories"])
def test_another_machine_reads_the_hub_as_the_first_one_did(name, tmp_path, monkeypatch):
    edit(monkeypatch, "abc")
    before = open_corpus(name)
    monkeypatch.setenv("STLM_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    remember_revisions(before.name, before.info)
    assert open_corpus(name).fingerprint == before.fingerprint
    later = {"corpus": "tinystories", "revision": "def"}
    remember_revisions(name, {"source": [later]} if name.startswith("mix:") else later)
    assert open_corpus(name).fingerprint == before.fingerprint, "what this machine has read stays in use"


# Mixtures


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(1, 9), min_size=1, max_size=4), data=st.data())
def test_shares_are_right_everywhere(weights, data):
    streams = [data.draw(st.lists(st.text("aä", min_size=1, max_size=12), max_size=40)) for _ in weights]
    shares = [weight / sum(weights) for weight in weights]
    tagged = [[f"{number}{text}" for text in texts] for number, texts in enumerate(streams)]
    mixed = list(interleave([iter(texts) for texts in tagged], shares))
    taken = [0] * len(weights)
    for text in mixed:
        taken[int(text[0])] += len(text.encode())
        assert all(abs(amount - share * sum(taken)) <= 25 * len(weights) for amount, share in zip(taken, shares, strict=True))
    used = [[text for text in mixed if text[0] == str(number)] for number in range(len(weights))]
    assert all(part == given[:len(part)] for part, given in zip(used, tagged, strict=True))
    assert any(part == given for part, given in zip(used, tagged, strict=True)), "it ends with the first part that runs out"


def test_a_mixture_is_a_corpus(folder):
    (folder / "a.txt").write_text("\n\n".join(f"long text number {i}" for i in range(300)))
    (folder / "b, c.txt").write_text("\n\n".join(f"text {i}" for i in range(300)))
    name = f"mix:3*file:{folder}/a.txt,1*file:{folder}/b, c.txt"
    config = DataConfig(corpus=name, max_bytes=4000)
    documents = [text for _, text in split_documents(open_corpus(name), config)]
    assert documents == [text for _, text in split_documents(open_corpus(name), config)]
    assert sum(len(text) for text in documents if "long" in text) / sum(map(len, documents)) == pytest.approx(0.75, abs=0.01)
    before = open_corpus(name).fingerprint
    assert before != open_corpus(name.replace("3*", "4*")).fingerprint
    (folder / "a.txt").write_text("other")
    assert before != open_corpus(name).fingerprint
    with pytest.raises(StlmError, match="nowhere"):
        open_corpus(f"mix:1*file:{folder}/a.txt,1*file:/nowhere.txt")


# As large as it may be


def test_numbers_on_disk_are_a_set():
    numbers = [hash(("number", i % 7000)) % 2 ** 64 for i in range(20_000)] + [0, 0, 2 ** 64 - 1, 2 ** 64 - 2, 2 ** 64 - 1]
    table, reference = SeenHashes(), set()
    for number in numbers:
        assert table.add(number) == (number not in reference)
        reference.add(number)


def test_a_file_without_separators_is_cut(monkeypatch):
    monkeypatch.setattr(corpora, "LONGEST_DOCUMENT", 1000)
    lines = [f"line {i}\n" for i in range(500)]
    found = list(cut_lines(lines, lambda line: not line.strip()))
    assert "\n".join(found) + "\n" == "".join(lines) and max(map(len, found)) < 1020 and len(found) == 5


def test_a_file_of_one_line_is_cut(folder, monkeypatch):
    monkeypatch.setattr(corpora, "LONGEST_DOCUMENT", 1000)
    text = " ".join(f"word{i}" for i in range(1000))
    (folder / "text8.txt").write_text(text)
    found = read(f"file:{folder}/text8.txt")
    assert "".join(found) == text and max(map(len, found)) == 1000


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
def test_articles_of_wikitext_stay_whole(folder, mark):
    article = " = Apple = \n \n An apple is a <unk> . \n \n = = In the kitchen = = \n \n x = 2 . \n \n"
    (folder / "wiki.txt").write_bytes(mark + ("\n" * (not mark) + article + article.replace("Apple", "Pear")).encode())
    corpus = open_corpus(f"file:{folder}/wiki.txt")
    assert [text.split()[1] for text in corpus.documents() if text.strip()] == ["Apple", "Pear"]
    assert "".join(corpus.documents()).replace("\n", "") == (article + article.replace("Apple", "Pear")).replace("\n", "")
    assert corpus.info["document"] == {"an article of WikiText, from its title on": 1}
    (folder / "notes.txt").write_text("Notes\n\n = Apple = \n\nred\n")
    assert list(open_corpus(f"file:{folder}/notes.txt").documents()) == ["Notes", " = Apple = ", "red"]


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
