"""Prepared data under attack: killed builds, damaged files, rivals, and an order that must not depend on who asks."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stlm.config import DataConfig
from stlm.data.batches import Batches, random_order, windows_in_order
from stlm.data.corpora import SPLITS, open_corpus, split_documents
from stlm.data.shards import TokenSplit, find_damage, prepare, write_splits
from stlm.data.tokenizers import open_tokenizer
from stlm.foundation import StlmError

PREPARE = "import sys; from stlm.config import DataConfig; from stlm.data.shards import prepare; prepare(DataConfig(**eval(sys.argv[1])))"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "A cache of its own for each test."
    monkeypatch.setenv("STLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    "Nearly 5 MB of different documents: the texts behind Python's help(), numbered."
    path = tmp_path_factory.mktemp("corpus") / "topics.txt"
    path.write_text("\n<|endoftext|>\n".join(f"{turn}: {text}" for turn in range(10) for text in topics.values()), "utf-8")
    return f"file:{path}"


def settings_for(corpus, tokenizer):
    return dict(corpus=corpus, tokenizer=tokenizer, valid_fraction=0.05, test_fraction=0.05)


def start_prepare(values):
    return subprocess.Popen([sys.executable, "-c", PREPARE, repr(values)], stderr=subprocess.PIPE, text=True)


def content(folder):
    "Every file below a folder with its bytes."
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def litter(cache):
    return sorted(path.name for path in (cache / "data").glob(".*"))


# Killed at any moment


def kill_while_building(values, cache, rng):
    "Start a build in another process, kill it a moment after its first file appears; how far it had come, and its workers."
    process = start_prepare(values)
    while process.poll() is None and not list((cache / "data").glob(".*.tmp")):
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 3))
    workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    written = sum(path.stat().st_size for path in (cache / "data").glob(".*.tmp/train-*"))
    process.kill()
    process.communicate()
    return written, workers


def test_killed_build_leaves_nothing_to_mistake(cache, corpus):
    "Kill -9 several times at random moments: no half data set, no orphan, no litter, and in the end the same bytes as if undisturbed."
    config = DataConfig(**settings_for(corpus, "bpe:512"))
    calm = prepare(config, show_progress=False).folder
    expected = content(calm)
    rng = random.Random(0)
    for _ in range(3):
        shutil.rmtree(calm, ignore_errors=True)
        _, workers = kill_while_building(settings_for(corpus, "bpe:512"), cache, rng)
        assert not calm.exists() or not find_damage(calm, show_progress=False)
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive, "workers outlived their master"
    again = prepare(config, show_progress=False).folder
    assert content(again) == expected
    assert litter(cache) == []


def test_ctrl_c_leaves_nothing(cache, corpus):
    process = start_prepare(settings_for(corpus, "bpe:512"))
    while process.poll() is None and not list((cache / "data").glob(".*.tmp")):
        time.sleep(0.01)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert litter(cache) == [] and not list((cache / "data").glob("*/manifest.json"))


def test_rivals_both_end_well(cache, corpus):
    "Two processes that prepare the same data at once both succeed, and one finds what the other built."
    values = settings_for(corpus, "bytes")
    rivals = [start_prepare(values) for _ in range(2)]
    assert [rival.communicate(timeout=120) and rival.returncode for rival in rivals] == [0, 0]
    folder = prepare(DataConfig(**values), show_progress=False).folder
    assert not find_damage(folder, show_progress=False) and litter(cache) == []
    assert len(list((cache / "data").glob("*/manifest.json"))) == 1


def test_a_living_builder_is_left_alone(cache, corpus):
    "Cleaning up must not delete the temporary folder of another build that is still at work."
    builder = start_prepare(settings_for(corpus, "bpe:512"))
    while builder.poll() is None and not list((cache / "data").glob(".*.tmp")):
        time.sleep(0.01)
    prepare(DataConfig(**settings_for(corpus, "bytes")), show_progress=False)
    _, errors = builder.communicate(timeout=120)
    assert builder.returncode == 0, errors
    assert len(list((cache / "data").glob("*/manifest.json"))) == 2


# Damage


def flip_a_bit(path):
    values = bytearray(path.read_bytes())
    values[len(values) // 2] ^= 1
    path.write_bytes(values)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("name", ["train-00000.bin", "validation-00000.bin", "train.offsets.bin", "manifest.json"])
@pytest.mark.parametrize("spoil", [flip_a_bit, truncate, Path.unlink], ids=["flipped bit", "truncated", "missing"])
def test_damage_is_named_and_repaired(cache, corpus, name, spoil):
    config = DataConfig(**settings_for(corpus, "bytes"), max_bytes=500_000)
    folder = prepare(config, show_progress=False).folder
    expected = content(folder)
    spoil(folder / name)
    with pytest.warns(UserWarning, match=name):
        prepare(config, show_progress=False)
    assert content(folder) == expected


def test_intact_data_is_used_again_in_silence(cache, corpus, recwarn):
    config = DataConfig(**settings_for(corpus, "bytes"), max_bytes=500_000)
    first = prepare(config, show_progress=False)
    changed = (first.folder / "manifest.json").stat().st_mtime_ns
    second = prepare(config, show_progress=False)
    assert second.folder == first.folder and (second.folder / "manifest.json").stat().st_mtime_ns == changed
    assert not [warning for warning in recwarn if "prepared again" in str(warning.message)]


def test_an_unwritable_cache_is_one_line(tmp_path, monkeypatch, corpus):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("STLM_CACHE", str(blocked))
    with pytest.raises(StlmError, match="cannot write") as caught:
        prepare(DataConfig(**settings_for(corpus, "bytes")), show_progress=False)
    assert "\n" not in str(caught.value)


# The same bytes, whoever does the work


@pytest.mark.parametrize("tokenizer", ["bpe:512", "bytes+bpe:512"])
def test_parallel_equals_serial(cache, corpus, tmp_path, tokenizer):
    config = DataConfig(**settings_for(corpus, tokenizer), max_bytes=1_500_000)
    tokenizer = open_tokenizer(config)
    documents = list(split_documents(open_corpus(config.corpus), config))
    folders = {workers: tmp_path / str(workers) for workers in (0, 1, 3)}
    for workers, folder in folders.items():
        folder.mkdir()
        write_splits(folder, documents, tokenizer, show_progress=False, shard_tokens=50_000, workers=workers)
    assert content(folders[0]) == content(folders[1]) == content(folders[3])
    assert len(list(folders[0].glob("train-*.bin"))) > 3


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:512", "bytes+bpe:512"])
def test_documents_come_back(cache, corpus, tokenizer):
    config = DataConfig(**settings_for(corpus, tokenizer), max_bytes=2_000_000)
    dataset = prepare(config, show_progress=False)
    for name in SPLITS:
        texts = [text for split, text in split_documents(open_corpus(config.corpus), config) if split == name]
        split = dataset.split(name)
        assert list(split.documents(dataset.tokenizer)) == texts
        stream = split.read(0, split.n_tokens)
        assert split.n_bytes == sum(len(text.encode()) for text in texts) == dataset.tokenizer.token_bytes[stream].sum()
        assert np.flatnonzero(stream == dataset.tokenizer.eot_id).tolist() == split.document_offsets.tolist()


# Order


class Stream(TokenSplit):
    "A split of which only the length matters: symbol i of the stream is i."

    def __init__(self, n_tokens):
        self.name, self.n_tokens, self.eot_id = "train", n_tokens, -1

    def read(self, start, stop):
        assert 0 <= start < stop <= self.n_tokens
        return np.arange(start, stop)


sizes = dict(n_tokens=st.integers(2, 400), context=st.integers(1, 40), batch_size=st.integers(1, 48), seed=st.integers(0, 2 ** 32))


@settings(max_examples=60, deadline=None)
@given(**sizes)
def test_one_pass_visits_every_window_once(n_tokens, context, batch_size, seed):
    context = min(context, n_tokens - 1)
    batches = Batches(Stream(n_tokens), context, batch_size, seed)
    steps = -(-3 * batches.n_windows // batch_size)
    firsts = torch.cat([batches.batch(step).inputs[:, 0] for step in range(steps)]).numpy()
    for epoch in range(3):
        visited = firsts[epoch * batches.n_windows:(epoch + 1) * batches.n_windows]
        assert sorted(visited) == list(range(0, batches.n_windows * context, context))
        assert np.array_equal(visited // context, random_order(batches.n_windows, seed, epoch))


@settings(max_examples=60, deadline=None)
@given(**sizes, world=st.sampled_from([1, 2, 3, 4, 8]), step=st.integers(0, 10 ** 6))
def test_the_order_does_not_depend_on_who_asks(n_tokens, context, batch_size, seed, world, step):
    "One process or many, resumed or not: the batch of a step is the same."
    context, batch_size = min(context, n_tokens - 1), batch_size * world
    batches = Batches(Stream(n_tokens), context, batch_size, seed)
    before = batches.batch(0).inputs
    whole = batches.batch(step)
    shares = [Batches(Stream(n_tokens), context, batch_size, seed).batch(step, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat([share.inputs for share in shares]), whole.inputs)
    assert torch.equal(torch.cat([share.targets for share in shares]), whole.targets)
    assert torch.equal(whole.targets, whole.inputs + 1) and torch.equal(batches.batch(0).inputs, before)


@settings(max_examples=60, deadline=None)
@given(n_tokens=st.integers(2, 400), context=st.integers(1, 40), batch_size=st.integers(1, 8), max_bytes=st.integers(1, 1000))
def test_validation_covers_each_symbol_once(n_tokens, context, batch_size, max_bytes):
    token_bytes = np.arange(n_tokens) % 4
    found = list(windows_in_order(Stream(n_tokens), context, batch_size, max_bytes, token_bytes))
    targets = torch.cat([batch.targets.flatten() for batch in found]).tolist()
    assert targets == list(range(1, len(targets) + 1))
    assert len(targets) == n_tokens - 1 or token_bytes[targets[:-1]].sum() < max_bytes <= token_bytes[targets].sum()


def test_a_split_can_be_read_by_other_threads_and_processes(cache, corpus):
    split = prepare(DataConfig(**settings_for(corpus, "bytes"), max_bytes=500_000), show_progress=False).split("train")
    starts = range(0, split.n_tokens - 1000, 997)
    expected = [split.read(start, start + 1000).sum() for start in starts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda start: split.read(start, start + 1000).sum(), starts)) == expected
    batches = Batches(split, 100, 4, 0)
    loader = torch.utils.data.DataLoader([0, 1, 2], num_workers=2, collate_fn=lambda steps: batches.batch(steps[0]).inputs)
    for step, inputs in enumerate(loader):
        assert torch.equal(inputs, batches.batch(step).inputs)
