"""Prepared data under attack: killed builds, damaged files, rivals, and an order that must not depend on who asks."""

import json
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
from stlm.data import batches as batches_module
from stlm.data import shards
from stlm.data.batches import LARGEST_SORT, Batches, computed_order, random_order, windows_in_order
from stlm.data.corpora import SPLITS, open_corpus, split_documents
from stlm.data.shards import TokenSplit, find_damage, prepare, write_splits
from stlm.data.tokenizers import ByteTokenizer, open_tokenizer
from stlm.foundation import StlmError, file_sha256

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak of memory")

PREPARE = """import sys
from stlm.config import DataConfig
from stlm.data import shards
shards.COMMIT_CHUNKS = 2
shards.prepare(DataConfig(**eval(sys.argv[1])))"""
SLOWLY = "import os, time; os.fsync = lambda _: time.sleep(0.5)\n" + PREPARE  # many seconds, on the fastest machine
HEARING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what a shell starts with & is deaf to Ctrl-C


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


def start_prepare(values, script=PREPARE):
    return subprocess.Popen([sys.executable, "-c", script, repr(values)], stderr=subprocess.PIPE, text=True)


def content(folder):
    "Every file below a folder with its bytes."
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def litter(cache):
    return sorted(path.name for path in (cache / "data").glob(".*"))


# Killed at any moment


def wait_for_work(process, cache):
    while process.poll() is None and not list((cache / "data").glob(".*.work")):
        time.sleep(0.01)


def kill_while_building(values, cache, rng):
    "Start a build in another process, kill it a moment after its first file appears; its workers."
    process = start_prepare(values)
    wait_for_work(process, cache)
    time.sleep(rng.uniform(0, 3))
    workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.communicate()
    return workers


def test_killed_build_leaves_nothing_to_mistake(cache, corpus):
    "Kill -9 several times at random moments: no half data set, no orphan, no litter, and in the end the same bytes as if undisturbed."
    config = DataConfig(**settings_for(corpus, "bpe:512"))
    calm = prepare(config, show_progress=False).folder
    expected = content(calm)
    rng = random.Random(0)
    for _ in range(3):
        shutil.rmtree(calm, ignore_errors=True)
        workers = kill_while_building(settings_for(corpus, "bpe:512"), cache, rng)
        assert not calm.exists() or not find_damage(calm, show_progress=False)
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive, "workers outlived their master"
    again = prepare(config, show_progress=False).folder
    assert content(again) == expected
    assert litter(cache) == []


def test_readers_of_documentation_end_with_who_started_them(cache):
    "They are forked while the lock is held, and would hold it for ever."
    process = start_prepare(settings_for("pydocs", "bytes"))
    while process.poll() is None and not psutil.Process(process.pid).children():
        time.sleep(0.01)
    readers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(readers, timeout=10)
    assert readers and not alive


def test_who_waits_for_another_process_says_so(cache, corpus, capfd):
    config = DataConfig(**settings_for(corpus, "bytes"), max_bytes=500_000)
    folder = prepare(config, show_progress=False).folder
    assert "waiting" not in capfd.readouterr().err
    with ThreadPoolExecutor(1) as pool:
        with shards._lock(folder):
            waiting = pool.submit(prepare, config, False)
            while "waiting for another process that prepares" not in capfd.readouterr().err:
                assert not waiting.done()
                time.sleep(0.01)
        assert waiting.result(60).folder == folder


def test_what_hears_of_progress_may_end_it(cache, corpus):
    config, heard = DataConfig(**settings_for(corpus, "bpe:512")), []

    def tell(n_bytes):
        heard.append(n_bytes)
        if len(heard) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, False, tell)
    assert heard == sorted(heard) and heard[0] > 0 and not list((cache / "data").glob("*/manifest.json"))
    dataset = prepare(config, False, heard.append)
    assert heard[-1] == sum(dataset.manifest["splits"][split]["bytes"] for split in SPLITS) and not litter(cache)


def test_only_what_is_trained_on_is_cut_in_pieces(cache, corpus):
    whole, pieces = (prepare(DataConfig(**settings_for(corpus, "bpe:512"), piece_bytes=size), show_progress=False) for size in (0, 300))
    assert whole.folder != pieces.folder and whole.tokenizer.fingerprint == pieces.tokenizer.fingerprint
    texts, cut = ({split: list(data.split(split).documents(data.tokenizer)) for split in SPLITS} for data in (whole, pieces))
    assert texts["validation"] == cut["validation"] and texts["test"] == cut["test"]
    lines, lines_of_pieces = ({line for text in each["train"] for line in text.split("\n")} for each in (texts, cut))
    assert lines == lines_of_pieces and len(cut["train"]) > 2 * len(texts["train"])
    longest = max(len(line.encode()) for line in lines)
    assert all(text.strip() and len(text.encode()) <= 300 + longest + text.count("\n\n") for text in cut["train"])


def test_a_script_without_a_guard_is_told_so_and_waits_for_nothing(cache, corpus, tmp_path):
    "Each tokenising process runs such a script again before it works, and would wait for the lock of the one that waits for it."
    script = tmp_path / "script.py"
    script.write_text(PREPARE, "utf-8")
    done = subprocess.run([sys.executable, script, repr(settings_for(corpus, "bpe:512"))], capture_output=True, text=True, timeout=120)
    last = done.stderr.rstrip().splitlines()[-1]
    assert done.returncode == 1 and "a tokenising process died" in last and '`if __name__ == "__main__":`' in last
    assert prepare(DataConfig(**settings_for(corpus, "bpe:512")), show_progress=False)  # nothing is locked, nothing in the way


def test_ctrl_c_leaves_nothing_to_mistake(cache, corpus):
    values = settings_for(corpus, "bpe:512")
    process = start_prepare(values, HEARING + SLOWLY)
    wait_for_work(process, cache)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert not list((cache / "data").glob("*/manifest.json"))
    assert not find_damage(prepare(DataConfig(**values), show_progress=False).folder) and litter(cache) == []


# Going on


class Interrupted(Exception):
    pass


class CountingTokenizer(ByteTokenizer):
    "Bytes, and how many chunks have been asked for."
    asked = 0

    def encode_batch(self, documents):
        self.asked += 1
        return super().encode_batch(documents)


@pytest.fixture(scope="session")
def documents():
    return [(SPLITS[turn % 7 % 3], f"{turn}: {text}") for turn in range(2) for text in topics.values()]


@pytest.fixture
def small_chunks(monkeypatch):
    "Many chunks and frequent notes in the journal."
    monkeypatch.setattr(shards, "CHUNK_BYTES", 5_000)
    monkeypatch.setattr(shards, "COMMIT_CHUNKS", 3)


def write(folder, documents, tokenizer):
    (folder / "data").mkdir(parents=True, exist_ok=True)
    return write_splits(folder / "data", documents, tokenizer, False, shard_tokens=70_000, workers=0, journal_path=folder / "journal.json")


def unfinished(folder):
    "Files of symbols and offsets that the journal does not call finished."
    written = json.loads((folder / "journal.json").read_text())["written"] if (folder / "journal.json").exists() else {}
    finished = {name for split in written.values() for name in split["files"]}
    return [path for path in (folder / "data").glob("*.bin") if path.name not in finished]


def until(documents, stop):
    yield from documents[:stop]
    raise Interrupted


def test_interrupted_anywhere_the_bytes_are_the_same(tmp_path, documents, small_chunks):
    "Broken off at twelve random places in a row, and never more is done again than since the last note."
    expected, rng = write(tmp_path / "calm", documents, ByteTokenizer()), random.Random(1)
    tokenizer, n_chunks = CountingTokenizer(), len(list(shards.chunks(documents)))
    for stop in sorted(rng.sample(range(len(documents)), 12)):
        with pytest.raises(Interrupted):
            write(tmp_path / "torn", until(documents, stop), tokenizer)
        for file in unfinished(tmp_path / "torn"):  # a crash of the machine may leave anything behind the synced part
            file.write_bytes(file.read_bytes() + b"garbage")
    assert write(tmp_path / "torn", documents, tokenizer) == expected
    assert content(tmp_path / "torn" / "data") == content(tmp_path / "calm" / "data")
    assert n_chunks < tokenizer.asked < n_chunks + 12 * shards.COMMIT_CHUNKS < 2 * n_chunks


@pytest.mark.parametrize("spoil", [
    lambda folder: (folder / "journal.json").write_text("{"),
    lambda folder: (folder / "journal.json").write_text('{"layout": [1, 2, 3], "chunks": 1, "written": {}}'),
    lambda folder: truncate(folder / "data" / "train.offsets.bin"),
    lambda folder: (folder / "data" / "train-00000.bin").unlink(),
    lambda folder: shutil.rmtree(folder / "data")], ids=["torn journal", "other layout", "short file", "missing file", "no files"])
def test_an_attempt_that_is_not_whole_is_begun_again(tmp_path, documents, small_chunks, spoil):
    write(tmp_path / "calm", documents, ByteTokenizer())
    with pytest.raises(Interrupted):
        write(tmp_path / "torn", until(documents, 600), ByteTokenizer())
    spoil(tmp_path / "torn")
    write(tmp_path / "torn", documents, ByteTokenizer())
    assert content(tmp_path / "torn" / "data") == content(tmp_path / "calm" / "data")


def test_other_text_is_not_mixed_in(tmp_path, documents, small_chunks):
    with pytest.raises(Interrupted):
        write(tmp_path, until(documents, 600), ByteTokenizer())
    with pytest.raises(StlmError, match="start again"):
        write(tmp_path, documents[1:], ByteTokenizer())
    assert write(tmp_path, documents[1:], ByteTokenizer())["splits"]["train"]["documents"]


def test_a_kill_late_in_the_work_loses_little(cache, corpus):
    "Kill -9 once the journal exists: the next attempt does not begin at the beginning."
    values = settings_for(corpus, "bpe:512")
    process = start_prepare(values)
    while process.poll() is None and not list((cache / "data").glob(".*.work/journal.json")):
        time.sleep(0.005)
    process.kill()
    process.communicate()
    [journal] = (cache / "data").glob(".*.work/journal.json")
    [train] = (cache / "data").glob(".*.work/data/train-00000.bin")
    begun = train.stat().st_ino
    folder = prepare(DataConfig(**values), show_progress=False).folder
    assert (folder / train.name).stat().st_ino == begun and not journal.exists() and not find_damage(folder)


# As large as it may be


@pytest.mark.parametrize("size, allowed", [(1, 3), (4, 1)])
def test_little_text_is_under_way(tmp_path, size, allowed):
    "Reading does not run ahead of the workers, and long documents fill no more of the memory than short ones."
    taken = 0

    def batches():
        nonlocal taken
        for _ in range(60):
            taken += 1
            yield "train", ["x" * size * shards.CHUNK_BYTES]

    ByteTokenizer().save(tmp_path)
    for done, _ in enumerate(shards.encode_all(batches(), ByteTokenizer(), tmp_path, workers=1)):
        assert taken <= max(shards.FEW_CHUNKS, done + 1 + allowed)
    assert taken == done + 1 == 60


MANY_DOCUMENTS = """import resource, sys, tempfile
from pathlib import Path
from stlm.config import DataConfig
from stlm.data.corpora import Corpus, split_documents
from stlm.data.shards import write_splits
from stlm.data.tokenizers import ByteTokenizer, train_bpe

workers = int(sys.argv[2])
tokenizer = train_bpe("bpe:300", ["This is document number 12 of many."]) if workers else ByteTokenizer()
corpus = Corpus("many", "0", {}, lambda: (f"This is document number {i} of many." for i in range(int(sys.argv[1]))))
with tempfile.TemporaryDirectory() as folder:
    write_splits(Path(folder), split_documents(corpus, DataConfig()), tokenizer, False, workers=workers)
largest_worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) + largest_worker)"""


@on_linux
@pytest.mark.parametrize("workers, noise", [(0, 3), (2, 8)])
def test_memory_does_not_grow_with_the_corpus(cache, workers, noise):
    "In this process and in the largest of its workers: twelve bytes kept for each document would show as 4 MB, the texts as 25."
    command = [sys.executable, "-c", MANY_DOCUMENTS]
    peaks = [int(subprocess.check_output([*command, str(count), str(workers)])) / 1024 for count in (150_000, 450_000)]
    assert peaks[1] - peaks[0] < noise, peaks


LONG_LINES = """import sys
from pathlib import Path
from stlm.data.corpora import open_corpus

size = sum(map(len, open_corpus(f"file:{sys.argv[1]}").documents()))
print(size, Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])"""


@on_linux
@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_long_documents_are_read_one_at_a_time(cache, tmp_path, ending):
    "Eighty books of 400 kB, each in a line: read together they would take 32 MB and more."
    peaks = []
    for books in (4, 80):
        lines = [f"{number} " + "A book in a single line. " * 16_000 for number in range(books)]
        path = tmp_path / f"{books}.{ending}"
        path.write_text("\n\n".join(lines) if ending == "txt" else "\n".join(json.dumps({"text": line}) for line in lines))
        size, peak = map(int, subprocess.check_output([sys.executable, "-c", LONG_LINES, str(path)]).split())
        assert size == sum(map(len, lines))
        peaks.append(peak / 1024)
    assert peaks[1] - peaks[0] < 8, peaks


def test_text_that_changes_while_it_is_read_is_not_kept(cache, tmp_path, monkeypatch):
    path = tmp_path / "growing.txt"
    text = "\n<|endoftext|>\n".join(topics.values())
    path.write_text(text)
    config, read = DataConfig(**settings_for(f"file:{path}", "bytes")), split_documents

    def changed(*arguments):
        path.write_text(text.replace("the", "THE"))
        return read(*arguments)

    monkeypatch.setattr(shards, "split_documents", changed)
    with pytest.raises(StlmError, match=r"growing\.txt was changed while it was read; prepare it again"):
        prepare(config, show_progress=False)
    assert not [folder for folder in (cache / "data").iterdir() if folder.is_dir()]
    monkeypatch.setattr(shards, "split_documents", read)
    path.write_text(text)
    dataset = prepare(config, show_progress=False)
    assert "THE " not in "".join(dataset.split("train").documents(dataset.tokenizer))


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
    wait_for_work(builder, cache)
    prepare(DataConfig(**settings_for(corpus, "bytes")), show_progress=False)
    _, errors = builder.communicate(timeout=120)
    assert builder.returncode == 0, errors
    assert len(list((cache / "data").glob("*/manifest.json"))) == 2


# Damage


def flip_a_bit(path):
    values = bytearray(path.read_bytes())
    values[len(values) // 2] ^= 1
    path.write_bytes(values)


def empty_list(path):
    path.write_text("[]")


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("name", ["train-00000.bin", "validation-00000.bin", "train.offsets.bin", "manifest.json"])
@pytest.mark.parametrize("spoil", [flip_a_bit, truncate, empty_list, Path.unlink], ids=["bit", "truncated", "list", "missing"])
def test_damage_is_named_and_repaired(cache, corpus, name, spoil):
    config = DataConfig(**settings_for(corpus, "bytes"), max_bytes=500_000)
    for _ in range(2):  # made, and found whole
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


def test_what_was_whole_is_read_again_only_where_it_changed(cache, corpus, monkeypatch):
    read = []
    monkeypatch.setattr(shards, "file_sha256", lambda path: read.append(path.name) or file_sha256(path))
    config = DataConfig(**settings_for(corpus, "bytes"), max_bytes=500_000)
    dataset = prepare(config, show_progress=False)
    files = [Path(name).name for name in dataset.manifest["files"]]
    memory = dataset.folder.with_name(f"{dataset.folder.name}.verified.json")

    def read_by_prepare():
        read.clear()
        prepare(config, show_progress=False)
        return read

    assert read_by_prepare() == files and read_by_prepare() == []
    os.utime(dataset.folder / "train-00000.bin")
    assert read_by_prepare() == ["train-00000.bin"] and read_by_prepare() == []
    truncate(memory)
    assert read_by_prepare() == files and read_by_prepare() == []
    flip_a_bit(dataset.folder / "validation-00000.bin")
    with pytest.warns(UserWarning, match=r"validation-00000.bin does not match its SHA-256"):
        read_by_prepare()
    assert read_by_prepare() == files and not find_damage(dataset.folder, show_progress=False), "what is made anew is looked at once"
    memory.unlink()
    memory.with_name(f".{memory.name}.1.tmp").write_text("of a process that died while it wrote")
    prepare(config, show_progress=False)
    assert litter(cache) == []


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:512"])  # a vocabulary is learned, and writes, before anything else does
def test_an_unwritable_cache_is_one_line(tmp_path, monkeypatch, corpus, tokenizer):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("STLM_CACHE", str(blocked))
    with pytest.raises(StlmError, match="cannot write") as caught:
        prepare(DataConfig(**settings_for(corpus, tokenizer)), show_progress=False)
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
        self.name, self.n_tokens = "train", n_tokens

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
@given(n=st.integers(1, 3000), seed=st.integers(0, 2 ** 32), epoch=st.integers(0, 100))
def test_a_computed_order_visits_every_place_once(n, seed, epoch):
    order = computed_order(np.arange(n), n, seed, epoch)
    assert sorted(order.tolist()) == list(range(n))
    assert order[n // 2] == computed_order(np.array([n // 2]), n, seed, epoch)[0]


def test_a_computed_order_looks_random():
    "Neighbours, fixed points and repeats between epochs are as rare as chance has them."
    n = 100_000
    first, second = (computed_order(np.arange(n), n, 3, epoch) for epoch in (0, 1))
    assert (first == second).sum() < 12 and (first == np.arange(n)).sum() < 12 and (np.abs(np.diff(first)) == 1).sum() < 20
    assert abs(np.corrcoef(first, np.arange(n))[0, 1]) < 0.015 and abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.015
    counts = np.histogram(first[:n // 10], 20)[0]  # the first tenth of an epoch comes from everywhere
    assert ((counts - n / 200) ** 2 / (n / 200)).sum() < 44  # chi squared with 19 degrees of freedom: one in a thousand


def test_a_hundred_million_windows_need_no_memory(monkeypatch):
    "Batches of a stream of 10^11 symbols, and the same properties where order is computed for a small one."
    batches = Batches(Stream(10 ** 11), 1000, 8, 0)
    assert batches.n_windows > LARGEST_SORT and not batches._orders
    assert len(set(np.concatenate([batches.windows(step) for step in (0, 1, 10 ** 9)]).tolist())) == 24
    monkeypatch.setattr(batches_module, "LARGEST_SORT", 10)
    small = Batches(Stream(1001), 10, 16, 0)
    visited = np.concatenate([small.windows(step) for step in range(25)])
    assert all(sorted(visited[epoch * 100:(epoch + 1) * 100]) == list(range(100)) for epoch in range(4))


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
