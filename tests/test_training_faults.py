"""A run that is killed, stopped, or denied its disk loses nothing and ends as if nothing had happened."""

import math
import os
import pkgutil
import random
import resource
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from helpers import (FORKS, command, error_in_fork, errors_in_forks, own_project, real_text, settings, small_run, start_forks, stlm,
                     tiny_run, train_in_fork)
from stlm.config import preset
from stlm.data.shards import prepare
from stlm.evaluate.bits import bits_per_byte
from stlm.foundation import StlmError, file_sha256
from stlm.infer.generate import generate
from stlm.lab.studies import score_run
from stlm.lab.watch import watchers
from stlm.model.accounting import account, training_memory
from stlm.pretrained import from_pretrained
from stlm.train import loop
from stlm.train.checkpoints import best_checkpoint, checkpoints, load_checkpoint
from stlm.train.loop import Diverged, Stopped, Trainer, Watcher, train, warn_of_memory
from stlm.train.records import Run, locked, read_log


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return own_project(tmp_path_factory.mktemp("faults") / "project")


@pytest.fixture(scope="module")
def overrides(project):
    return small_run(real_text(project))


@pytest.fixture(scope="module")
def uninterrupted(project, overrides):
    "The run that every other one must equal."
    code, _, errors = stlm("train", *settings(overrides), "--folder", project / "whole", cwd=project)
    assert code == 0, errors
    return Run(project / "whole")


def begin(project, overrides, folder, **options):
    return command("train", *settings(overrides), "--folder", folder, cwd=project, **options)


def wait_for_lines(process, log: Path, more_than: int) -> None:
    while process.poll() is None and len(read_log(log)) <= more_than:
        time.sleep(0.01)


def assert_same(run: Run, whole: Run) -> None:
    "The same weights to the bit, and the same losses at the steps that both logged."
    assert run.status == "finished"
    assert file_sha256(run.model_folder / "model.safetensors") == file_sha256(whole.model_folder / "model.safetensors")
    assert run.metrics["valid_bpb"] == whole.metrics["valid_bpb"] and run.metrics["bytes_seen"] == whole.metrics["bytes_seen"]
    expected = {line["step"]: line["valid_loss"] for line in read_log(whole.folder / "log.jsonl") if "valid_loss" in line}
    assert {line["step"]: line["valid_loss"] for line in read_log(run.folder / "log.jsonl") if "valid_loss" in line} == expected


EVERYTHING = {"train.optimizer": "muon", "train.cautious": True, "train.ema": 0.9, "train.accumulation": 4, "train.batch_schedule": "up",
              "model.dropout": 0.2, "train.dropout_schedule": "triangle", "train.weight_decay_schedule": "down"}


SCHEDULE_FREE = {"train.optimizer": "schedulefree", "train.schedule": "constant"}


@pytest.mark.parametrize(("changes", "times"), [({}, 20), (EVERYTHING, 6), (SCHEDULE_FREE, 4)],
                         ids=["adamw", "muon-and-schedules", "schedule-free"])
def test_killed_at_random_moments(project, overrides, tmp_path, changes, times):
    """Every other time while a checkpoint is written. Each process begins where the one before was killed."""
    overrides = tiny_run(overrides["data.corpus"]) | {"train.steps": 200, "train.checkpoint_every": 3, "train.eval_every": 50} | changes
    folder, chance, kills, writing = tmp_path / "killed", random.Random(0), 0, 0
    train_in_fork(overrides, tmp_path / "whole")
    for number in range(times):
        process = FORKS.Process(target=train_in_fork, args=(overrides, folder), daemon=True)
        process.start()
        wait_until(process, grown(folder / "log.jsonl"))
        time.sleep(chance.uniform(0, 0.1))
        if number % 2:
            hold_while_writing(process, folder)
            writing += bool(unfinished(folder))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills == times, "the run ended before it could be killed; make it longer"
    assert writing == times // 2, "no kill came while a checkpoint was written"
    train_in_fork(overrides, folder)
    assert_same(Run(folder), Run(tmp_path / "whole"))
    assert not list(folder.rglob("*.tmp")), "a killed writer's leftovers are removed"


def unfinished(folder: Path) -> list[Path]:
    "Checkpoints that are being written."
    return list((folder / "checkpoint").glob(".step-*.tmp"))


def hold_while_writing(process, folder: Path) -> None:
    "Freeze a run in the middle of a checkpoint, so that it cannot finish that before it is killed."
    while process.is_alive():
        wait_until(process, lambda: unfinished(folder))
        os.kill(process.pid, signal.SIGSTOP)
        wait_until(process, lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
        if unfinished(folder):
            return
        os.kill(process.pid, signal.SIGCONT)


def grown(log: Path) -> Callable[[], bool]: # call it: whether the log has more lines than now
    before = len(read_log(log))
    return lambda: len(read_log(log)) > before


def wait_until(process, condition: Callable[[], object]) -> None:
    while process.is_alive() and not condition():
        time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(project, overrides, uninterrupted, number):
    folder = project / number.name
    process = begin(project, overrides, folder)
    wait_for_lines(process, folder / "log.jsonl", 0)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    last = errors.strip().splitlines()[-1]
    assert process.returncode == 130 and last.startswith(f"stlm: stopped by {number.name} at step") and "resumes" in last
    assert Run(folder).status == "stopped" and checkpoints(folder / "checkpoint")
    code, _, errors = stlm("train", *settings(overrides), "--folder", folder, cwd=project)
    assert code == 0, errors
    assert_same(Run(folder), uninterrupted)


def test_full_disk(project, overrides, uninterrupted):
    folder = project / "full"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))"  # a checkpoint has more bytes
    code, _, errors = stlm("train", *settings(overrides), "--folder", folder, cwd=project, start=limit)
    assert code == 2 and "cannot write" in errors.strip().splitlines()[-1] and "unchanged" in errors
    assert not checkpoints(folder / "checkpoint") and not list(folder.rglob("*.tmp"))
    assert stlm("train", *settings(overrides), "--folder", folder, cwd=project)[0] == 0
    assert_same(Run(folder), uninterrupted)


def test_unwritable_folder(project, overrides):
    code, _, errors = stlm("train", *settings(overrides), "--folder", project / "settings.ini" / "run", cwd=project)
    assert code == 2 and errors.strip().splitlines()[-1].startswith("stlm: cannot write")


def train_where_nothing_can_be_written(overrides, folder):
    trainer = in_memory(overrides, folder)
    folder.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)  # nobody: to root every folder can be written
    trainer.fit()


def test_folder_that_becomes_read_only(overrides, tmp_path):
    error = error_in_fork(train_where_nothing_can_be_written, tiny_run(overrides["data.corpus"]), tmp_path)
    assert error.startswith(f"cannot write {tmp_path / 'log.jsonl'}: Permission denied")


def train_in_little_memory(overrides, folder):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, [pages * resource.getpagesize() + 2 ** 28] * 2)
    train_in_fork(overrides, folder)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell how much memory is in use")
@pytest.mark.parametrize(("sizes", "advice"), [
    ({"train.batch_size": 1024, "train.accumulation": 2},
     "512 windows of 512 symbols at once; begin a new run with train.accumulation=4 or train.checkpoint_activations=true"),
    ({"train.batch_size": 1, "train.accumulation": 1, "model.context": 400_000},
     "1 window of 400000 symbols at once; begin a new run with model.context below 400000")])
def test_out_of_memory(overrides, tmp_path, sizes, advice):
    overrides = tiny_run("pydocs") | {"data.max_bytes": 1_000_000, "model.context": 512} | sizes
    error = error_in_fork(train_in_little_memory, overrides, tmp_path / "large")
    assert error.startswith("out of memory") and advice in error and "\n" not in error


def test_memory_that_will_not_do(overrides, tmp_path, monkeypatch):
    config = preset("stlm-10m", {"train.device": "cpu", "train.precision": "fp32"})
    memory = training_memory(config.model, config.train.batch_size, config.train.accumulation, torch.float32)
    needed = memory.peak + memory.weights + memory.optimizer  # a checkpoint is written from a copy
    for free, words in ((0.9 * needed, f"needs about {needed / 1e9:.1f} GB"), (1.1 * needed, ""), (100 * needed, "")):
        monkeypatch.setattr("stlm.train.loop.free_memory_bytes", partial(float, free))
        with warnings.catch_warnings(record=True) as caught:
            warn_of_memory(config)
        assert [words in str(each.message) and "train.accumulation=24 or" in str(each.message) for each in caught] == [True] * bool(words)
    monkeypatch.setattr("stlm.train.loop.free_memory_bytes", lambda: 1_000_000)
    with pytest.warns(UserWarning, match="the system may end the run without a word: .* begin a new run with"):
        assert train(preset("demo-bpe", tiny_run(overrides["data.corpus"])), tmp_path / "run", show_progress=False).status == "finished"


def test_no_compiler(project, overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    changes = tiny_run(overrides["data.corpus"]) | {"train.compile": "on"}
    code, _, errors = stlm("train", *settings(changes), "--folder", tmp_path / "run", cwd=project)
    assert code == 2 and "Traceback" not in errors, errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("stlm: torch.compile failed (InvalidCxxCompiler: No working C++ compiler found")
    assert last.endswith("; begin a new run with --set train.compile=off")


@pytest.mark.parametrize(("name", "asks"), [("samples", "stlm.lab.watch.generate"), ("statistics", "stlm.lab.dynamics.norm")])
def test_who_waits_for_the_device_takes_no_time_from_training(overrides, tmp_path, monkeypatch, name, asks):
    "A device as a queue: a step adds 50 ms of work to it and returns at once, and what asks for a number waits for all of it."
    idle_from, do, ask = 0.0, loop.train_step, pkgutil.resolve_name(asks)

    def queued(*arguments):
        nonlocal idle_from
        done = do(*arguments)
        idle_from = max(idle_from, time.perf_counter()) + 0.05
        return done

    def wait(device=None):
        time.sleep(max(0.0, idle_from - time.perf_counter()))

    monkeypatch.setattr(loop, "train_step", queued)
    monkeypatch.setattr(loop, "synchronize", wait)
    monkeypatch.setattr(asks, lambda *arguments, **options: (wait(), ask(*arguments, **options))[1])
    config = preset("demo-bpe", tiny_run(overrides["data.corpus"]) | {"train.steps": 20, "train.log_every": 20})
    run = train(config, tmp_path / "run", show_progress=False, watchers=watchers(f"{name}:2"))
    assert run.metrics["train_seconds"] > 0.9 * 20 * 0.05


def test_two_processes_on_one_folder(overrides, tmp_path):
    with locked(Run(tmp_path)):
        assert error_in_fork(train_in_fork, overrides, tmp_path) == f"{tmp_path} is being trained by another process"


class StopAt(Watcher):
    def __init__(self, step):
        self.step = step

    def started(self, trainer):
        self.trainer = trainer

    def stepped(self):
        if self.trainer.progress.step == self.step:
            self.trainer.request("stop")


def test_a_stop_at_a_checkpoint_does_not_write_it_again(overrides, tmp_path, monkeypatch):
    written = count_writes(monkeypatch)
    config = preset("demo-bpe", tiny_run(overrides["data.corpus"]) | {"train.checkpoint_every": 5})
    for step, there in ((10, [5, 10]), (12, [5, 10, 12])):
        with pytest.raises(Stopped, match=f"at step {step} "):
            train(config, tmp_path / "run", show_progress=False, watchers=[StopAt(step)])
        assert written == there


def count_writes(monkeypatch, before=lambda: None):
    "The steps of the checkpoints that were written, as a list that grows; `before` is called by the thread that writes."
    from stlm.train import checkpoints as module
    written, write = [], module._write

    def counted(folder, contents, state, keep):
        before()
        written.append(state["step"])
        return write(folder, contents, state, keep)
    monkeypatch.setattr(module, "_write", counted)
    return written


class AskAndGoOn(Watcher):
    """Asks for a checkpoint after the second step, which is not written before the fourth."""
    def __init__(self):
        self.went_on, self.written_after = threading.Event(), []

    def started(self, trainer):
        self.trainer = trainer

    def stepped(self):
        if self.trainer.progress.step == 2:
            self.trainer.request("checkpoint")
        if self.trainer.progress.step == 4:
            self.went_on.set()

    def write(self):
        self.written_after.append(self.went_on.wait(10))


def test_a_checkpoint_that_is_asked_for_does_not_hold_up_the_run(overrides, tmp_path, monkeypatch):
    watcher = AskAndGoOn()
    written = count_writes(monkeypatch, watcher.write)
    changes = {"train.steps": 6, "train.checkpoint_every": 6, "train.eval_every": 6}
    train(preset("demo-bpe", tiny_run(overrides["data.corpus"]) | changes), tmp_path / "run", show_progress=False, watchers=[watcher])
    assert written == [2, 6] and watcher.written_after == [True, True]


def test_data_that_changed_under_a_run_is_refused(overrides, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    shutil.copy(overrides["data.corpus"].removeprefix("file:"), text)
    config = preset("demo-bpe", tiny_run(f"file:{text}"))
    with pytest.raises(Stopped, match="at step 10 "):
        train(config, tmp_path / "run", show_progress=False, watchers=[StopAt(10)])
    whole = text.read_text()
    text.write_text(whole.replace("License", "licence"))
    with monkeypatch.context() as patched, pytest.raises(StlmError, match=r"the data of .*run changed since the run began"):
        patched.setattr(loop, "prepare", lambda *_, **__: pytest.fail("it takes long, and would be for nothing"))
        train(config, tmp_path / "run", show_progress=False)
    text.write_text(whole)
    assert train(config, tmp_path / "run", show_progress=False).status == "finished"


def test_data_that_changed_after_a_run_is_refused(overrides, tmp_path):
    text = tmp_path / "text.txt"
    shutil.copy(overrides["data.corpus"].removeprefix("file:"), text)
    config, whole = preset("demo-bpe", tiny_run(f"file:{text}") | {"train.steps": 3}), text.read_text()
    run = train(config, tmp_path / "run", show_progress=False)
    scores = score_run(run, 2000)
    text.write_text(whole.replace("License", "licence"))
    for repeat in (lambda: train(config, run.folder, show_progress=False), lambda: score_run(run, 2000)):
        with pytest.raises(StlmError, match=r"data\.corpus=file:.*text\.txt holds another text; delete the folder .* or choose another"):
            repeat()
    text.unlink()
    assert train(config, run.folder, show_progress=False).metrics == run.metrics, "a text that is gone does not make a run useless"
    assert score_run(run, 2000).equals(scores)


@pytest.mark.parametrize("name", ["hub:me/stories", "mix:1*hub:me/stories,1*file:licence.txt"])
def test_a_data_set_of_the_hub_that_was_edited_does_not_end_a_run(overrides, tmp_path, monkeypatch, name):
    texts = Path(overrides["data.corpus"].removeprefix("file:")).read_text().split("\n\n")
    (tmp_path / "me" / "stories").mkdir(parents=True)
    pd.DataFrame({"text": texts}).to_parquet(tmp_path / "me" / "stories" / "0.parquet")  # a hub, played by a folder
    (tmp_path / "licence.txt").write_text("\n\n".join(text.upper() for text in texts))
    monkeypatch.chdir(tmp_path)
    config = preset("demo-bpe", tiny_run(name) | {"train.steps": 15})
    for number, number_of_cache in enumerate((0, 0, 1)):  # the last time with a new cache, as on another machine
        monkeypatch.setenv("STLM_CACHE", str(tmp_path / f"cache {number_of_cache}"))
        monkeypatch.setattr(HfApi, "dataset_info", lambda *_, sha=f"commit {number}", **__: SimpleNamespace(sha=sha))
        with pytest.raises(Stopped) if number < 2 else nullcontext():
            train(config, tmp_path / "run", show_progress=False, watchers=[StopAt(5 + 5 * number)])
    assert Run(tmp_path / "run").status == "finished" and "commit 0" in str(Run(tmp_path / "run").environment)


def test_a_segmenter_belongs_to_its_text(overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("STLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loop, "SEGMENTER_BYTES", 5_000)
    text = tmp_path / "text.txt"
    shutil.copy(overrides["data.corpus"].removeprefix("file:"), text)
    config = preset("demo-bpe", tiny_run(f"file:{text}") | {"model.patches.patcher": "entropy", "train.steps": 1})
    for number in range(2):
        train(config, tmp_path / f"run {number}", show_progress=False)
        text.write_text(text.read_text().replace("License", "licence"))
    segmenters = [Run(path.parent) for path in (tmp_path / "cache" / "segmenters").glob("*/metrics.json")]
    assert ({run.environment["data"] for run in segmenters}
            == {Run(tmp_path / f"run {number}").environment["data"] for number in range(2)} and len(segmenters) == 2)


def test_best_checkpoint_stays(overrides, tmp_path):
    grows = {"train.lr": 3.0, "train.schedule": "constant", "train.warmup": 1.0, "train.clip": 0}  # until the model comes apart
    changes = {"train.steps": 60, "train.eval_every": 8, "train.checkpoint_every": 5, "train.keep": 1} | grows
    run = train(preset("demo-bpe", tiny_run(overrides["data.corpus"]) | changes), tmp_path / "run", show_progress=False)
    measured = {line["step"]: line["valid_bpb"] for line in read_log(run.folder / "log.jsonl") if "valid_bpb" in line}
    best = min(measured, key=measured.get)
    assert best < 56 and measured[60] > 2 * measured[best], "it gets much worse with this learning rate"
    assert [path.name for path in checkpoints(run.checkpoint_folder)] == [f"step-{step:09d}" for step in (best, 60)]
    assert best_checkpoint(run.checkpoint_folder).name == f"step-{best:09d}"


def in_memory(overrides, folder):
    config = preset("demo-bpe", overrides)
    return Trainer(config, Run(folder), prepare(config.data, show_progress=False), show_progress=False)


class OnlyWaitingCopies(TorchFunctionMode):
    """Refuses copies that nobody waits for; only CUDA keeps their order."""
    def __torch_function__(self, function, types, arguments=(), options=None):
        assert not (options or {}).get("non_blocking"), function
        return function(*arguments, **(options or {}))


def test_nothing_is_copied_ahead_without_cuda(overrides, tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr("stlm.train.checkpoints.synchronize", waited.append)
    trainer = in_memory(tiny_run(overrides["data.corpus"]), tmp_path)
    with OnlyWaitingCopies():
        trainer.step()
        trainer.save()
    assert waited == [torch.device("cpu")], "the thread that writes reads no copy that is under way"


def break_steps(trainer, broken):
    """Let the loss be no number in some steps."""
    whole = trainer.objective
    trainer.objective = lambda *batch: tuple(part * (math.nan if trainer.progress.step in broken else 1.0) for part in whole(*batch))


def test_steps_that_are_no_numbers_can_be_skipped(overrides, tmp_path):
    trainer = in_memory(tiny_run(overrides["data.corpus"]) | {"train.nonfinite": "skip", "train.steps": 30}, tmp_path)
    break_steps(trainer, {0, 11, 12})
    weights = {}
    for step in range(13):
        trainer.step()
        weights[step] = [p.detach().clone() for p in trainer.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(weights[10], weights[12], strict=True)), "a skipped step changes nothing"
    assert not any(torch.equal(a, b) for a, b in zip(weights[9], weights[10], strict=True))
    trainer.save()
    again = in_memory(tiny_run(overrides["data.corpus"]) | {"train.nonfinite": "skip", "train.steps": 30}, tmp_path)
    again.resume()
    assert again.progress == trainer.progress and again.progress.skipped == 3 and again.progress.skipped_in_a_row == 2
    again.fit()
    again.finish()
    lines = [line for line in read_log(tmp_path / "log.jsonl") if "loss" in line]
    assert again.run.metrics["skipped_steps"] == 3 == lines[-1]["skipped"] and all(math.isfinite(line["loss"]) for line in lines)


def test_too_many_skipped_steps_end_the_run(overrides, tmp_path):
    trainer = in_memory(tiny_run(overrides["data.corpus"]) | {"train.nonfinite": "skip", "train.steps": 150}, tmp_path)
    break_steps(trainer, set(range(20, 150)))
    with pytest.raises(Diverged, match="100 steps in a row had no finite gradient, up to step 120 "):
        trainer.fit()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize("damage", ["half a file", "one digit"])
def test_damaged_checkpoint_gives_way_to_the_one_before(project, overrides, uninterrupted, damage):
    config, folder = preset("demo-bpe", overrides), project / damage
    process = begin(project, overrides, folder)
    wait_for_lines(process, folder / "log.jsonl", 4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    newest = (damage_newest if damage == "half a file" else change_newest)(Run(folder))
    with pytest.warns(UserWarning, match=newest):
        train(config, folder, show_progress=False)
    assert_same(Run(folder), uninterrupted)


def damage_newest(run: Run) -> str:
    "Shorten the newest checkpoint of a run; its name."
    newest = checkpoints(run.checkpoint_folder)[-1]
    (newest / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:-7])
    return newest.name


def change_newest(run: Run) -> str:
    "Change a digit of the position in the newest checkpoint of a run; its name."
    newest = checkpoints(run.checkpoint_folder)[-1]
    text, step = (newest / "state.json").read_text(), int(newest.name.removeprefix("step-"))
    (newest / "state.json").write_text(text.replace(f'"step": {step}', f'"step": {step + 1}'))
    return newest.name


def train_to(overrides, folder, step):
    train_in_fork(overrides, folder, watchers=[StopAt(step)])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_damaged_checkpoint_does_not_take_the_place_of_later_ones(overrides, tmp_path, processes):
    """A run that fell back and is stopped before it comes to the damaged step again goes on where it was stopped."""
    run = Run(tmp_path / "run")
    overrides = tiny_run(overrides["data.corpus"]) | {"train.steps": 60, "train.checkpoint_every": 10, "train.keep": 1}
    for step, there in ((40, [30, 40]), (35, [30, 35]), (38, [30, 38])):  # the first validation is the best there is until the end
        errors = errors_in_forks(processes, train_to, overrides, run.folder, step)
        assert all(f"at step {step} of 60" in error for error in errors), errors
        assert [path.name for path in checkpoints(run.checkpoint_folder)] == [f"step-{number:09d}" for number in there]
        if step == 40:
            damage_newest(run)
    for folder in (run.folder, tmp_path / "whole"):
        assert errors_in_forks(processes, train_in_fork, overrides, folder) == [""] * processes
    assert_same(run, Run(tmp_path / "whole"))


def train_with_segmenter(cache, overrides, folder):
    os.environ["STLM_CACHE"] = str(cache)
    loop.SEGMENTER_BYTES = 20_000
    train_in_fork(overrides, folder)


def test_two_runs_that_need_the_same_segmenter(overrides, tmp_path):
    overrides = tiny_run(overrides["data.corpus"]) | {"data.tokenizer": "bytes", "model.patches.patcher": "entropy", "train.steps": 3}
    forks = [start_forks(1, train_with_segmenter, tmp_path / "cache", overrides | {"train.seed": seed}, tmp_path / str(seed))[0]
             for seed in (0, 1)]
    assert [pipe.recv() for _, pipe in forks] == ["", ""], "the second waits for the first"
    for process, _ in forks:
        process.join()
    assert [Run(tmp_path / seed).status for seed in "01"] == ["finished"] * 2
    assert len(list((tmp_path / "cache" / "segmenters").glob("*/metrics.json"))) == 1


def test_another_configuration_is_refused(project, overrides, uninterrupted):
    folder = project / "other"
    process = begin(project, overrides, folder)
    wait_for_lines(process, folder / "log.jsonl", 0)
    process.kill()
    process.communicate()
    code, _, errors = stlm("train", *settings(overrides | {"train.lr": 0.5}), "--folder", folder, cwd=project)
    assert code == 2 and "train.lr is 0.003 there, 0.5 here" in errors


def test_a_loss_that_is_no_number_stops_before_the_checkpoint(project, overrides, tmp_path):
    config = preset("demo-bpe", overrides | {"model.init_std": 1e38})
    with pytest.raises(Diverged, match=r"not finite at step \d+ with train.lr=\S+; try a lower"):
        train(config, tmp_path / "infinite", show_progress=False)
    assert not checkpoints(tmp_path / "infinite" / "checkpoint")


def test_divergence_keeps_the_last_good_checkpoint(project, overrides, tmp_path):
    config = preset("demo-bpe", overrides)
    trainer = Trainer(config, Run(tmp_path), prepare(config.data, show_progress=False), show_progress=False)
    trainer.step()
    trainer.save()
    with torch.no_grad():
        next(trainer.model.parameters()).mul_(float("nan"))
    trainer.step()
    with pytest.raises(Diverged, match="the last good state is in"):
        trainer.save()
    state = load_checkpoint(tmp_path / "checkpoint", trainer.model, trainer.optimizer)
    assert state["step"] == 1 and all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_accumulation_changes_memory_and_not_the_result(project, overrides, tmp_path):
    losses = []
    for parts in (1, 4):
        exact = {"train.precision": "fp32", "model.dropout": 0.0}  # bfloat16 would round the parts differently
        config = preset("demo-bpe", overrides | exact | {"train.accumulation": parts, "train.steps": 10})
        losses.append(train(config, tmp_path / str(parts), show_progress=False).metrics["valid_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


POOLED = {"model.patches.d_local": 32, "model.patches.n_heads": 2, "model.patches.d_ff": 48, "model.patches.window": 16,
          "model.patches.ngram": 3, "model.patches.ngram_buckets": 64, "train.local_lr": 2.0,
          "train.steps": 30, "train.checkpoint_every": 5, "train.eval_every": 10}
PATCHERS = {"space": {}, "stride": {"model.patches.pooling": "mean"}, "gate": {}, "entropy": {"model.patches.size": 4},
            "marks": {"data.tokenizer": "bytes+bpe:300", "model.patches.decoder": "parallel", "model.patches.encoder": "patch",
                      "model.patches.max_size": 8, "model.patches.unpooling": "linear", "model.patches.ngram": 0}}


@pytest.mark.parametrize("patcher", PATCHERS)
def test_pooled_models_are_trained_like_all_others(project, overrides, tmp_path, monkeypatch, patcher):
    """Trained, stopped and resumed to the same bits, saved, loaded, scored exactly, and made to write."""
    monkeypatch.setattr("stlm.train.loop.SEGMENTER_BYTES", 4000)
    config = preset("demo-bpe", overrides | POOLED | PATCHERS[patcher] | {"model.patches.patcher": patcher})
    (tmp_path / "stopped").mkdir()
    whole = train(config, tmp_path / "whole", show_progress=False)
    first = Trainer(config, Run(tmp_path / "stopped"), prepare(config.data, show_progress=False), show_progress=False)
    for _ in range(17):
        first.step()
    first.save()
    begun = Trainer(config, Run(tmp_path / "stopped"), prepare(config.data, show_progress=False), show_progress=False)
    untrained = begun.symbols_per_patch
    begun.resume()
    assert (begun.symbols_per_patch == first.symbols_per_patch) and (patcher != "gate" or first.symbols_per_patch != untrained)
    again = train(config, tmp_path / "stopped", show_progress=False)
    assert file_sha256(again.model_folder / "model.safetensors") == file_sha256(whole.model_folder / "model.safetensors")
    assert whole.metrics["valid_bpb"] < 6 and whole.metrics["account"]["symbols_per_patch"] > 1

    model, tokenizer = from_pretrained(whole.model_folder, "cpu")
    texts = ["Licensed under the Apache License.", "naïve 🙂 text"]
    bits = bits_per_byte(model, tokenizer, texts)
    assert bits.n_bytes == sum(len(text.encode()) for text in texts) and bits.bits_per_byte > 0
    written = generate(model, tokenizer, "The licence", max_tokens=30, seed=1)
    assert written and written == generate(model, tokenizer, "The licence", max_tokens=30, seed=1)
    if patcher == "entropy":
        trained = {name: p.clone() for name, p in first.model.body.patcher.named_parameters()}
        assert all(torch.equal(p, trained[name]) for name, p in model.body.patcher.named_parameters()), "a segmenter is frozen, and saved"
        assert 2 < whole.metrics["account"]["symbols_per_patch"] < 8, "the threshold was set for patches of 4"


def test_peak_memory_is_that_of_the_whole_run(overrides, tmp_path, monkeypatch):
    """A run is not smaller because it was stopped once."""
    config = preset("demo-bpe", tiny_run(overrides["data.corpus"]) | {"train.steps": 6})
    (tmp_path / "run").mkdir()
    first = Trainer(config, Run(tmp_path / "run"), prepare(config.data, show_progress=False), show_progress=False)
    first.step()
    with monkeypatch.context() as before:
        before.setattr("stlm.train.loop.peak_memory_bytes", lambda device: 10**13)
        first.save()
    assert train(config, tmp_path / "run", show_progress=False).metrics["peak_memory_bytes"] == 10**13
    whole = train(config, tmp_path / "whole", show_progress=False)
    assert 10**7 < whole.metrics["peak_memory_bytes"] < 10**11


OPTIMIZERS = {"AdamW with caution": {"train.optimizer": "adamw", "train.cautious": True},
              "Muon and an average": {"train.optimizer": "muon", "train.ema": 0.9, "train.schedule": "linear"},
              "schedule-free": {"train.optimizer": "schedulefree", "train.schedule": "constant"}}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_goes_on_to_the_same_bits(overrides, tmp_path, kind):
    """Killed between two validations, and however often it was scored: looking at a run changes nothing in it."""
    config = preset("demo-bpe", tiny_run(overrides["data.corpus"]) | OPTIMIZERS[kind] | {"train.steps": 24, "train.eval_every": 5})
    (tmp_path / "stopped").mkdir()
    whole = train(config, tmp_path / "whole", show_progress=False)
    first = Trainer(config, Run(tmp_path / "stopped"), prepare(config.data, show_progress=False), show_progress=False)
    for _ in range(17):
        first.step()
        if first.progress.step % 5 == 0:
            first.validate()
    first.save()
    again = train(config, tmp_path / "stopped", show_progress=False)
    assert file_sha256(again.model_folder / "model.safetensors") == file_sha256(whole.model_folder / "model.safetensors")
    for _ in range(3):
        first.validate()
    while first.progress.step < 24:
        first.step()
    first.save()
    ends = [checkpoints(tmp_path / name / "checkpoint")[-1] / "model.safetensors" for name in ("stopped", "whole")]
    assert file_sha256(ends[0]) == file_sha256(ends[1])
    raw = load_file(ends[1])
    scored = load_file(whole.model_folder / "model.safetensors")
    averages = kind != "AdamW with caution"
    assert averages == any(not torch.equal(raw[name], scored[name]) for name in scored)


COMPILED = {"demo-bpe": {"data.tokenizer": "bpe:300"}, "demo-pooled": {}}


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_run_goes_on_to_the_same_bits(overrides, tmp_path, name):
    """What goes on compiles anew, in the middle of the text and for other patches than the run began with."""
    text = {field: value for field, value in overrides.items() if field.startswith("data.") and field != "data.tokenizer"}
    sizes = {"model.n_layers": 1, "train.steps": 12, "train.eval_bytes": 2000, "train.compile": "on"}
    config = preset(name, text | sizes | COMPILED[name])
    for folder, stops in (("whole", ()), ("stopped", (7,)), ("stopped", ())):
        torch.compiler.reset()
        with pytest.raises(Stopped) if stops else nullcontext():
            train(config, tmp_path / folder, show_progress=False, watchers=list(map(StopAt, stops)))
    assert_same(Run(tmp_path / "stopped"), Run(tmp_path / "whole"))


SHARED = {"model.n_layers": 4, "model.sharing.ffn": "all", "model.sharing.attention": "cycle", "model.sharing.free_ends": 1,
          "model.sharing.lora_rank": 2, "model.sharing.loop_layers": 2, "model.embedding_rank": 16,
          "train.loop_start": 0.5, "train.steps": 12, "train.checkpoint_every": 5, "train.eval_every": 5}


@pytest.mark.parametrize("stop", [4, 6, 8], ids=["before the loops", "as they begin", "after"])
def test_loops_that_begin_midway_survive_a_stop(project, overrides, tmp_path, stop):
    config = preset("demo-bpe", overrides | SHARED)
    (tmp_path / "stopped").mkdir()
    whole = train(config, tmp_path / "whole", show_progress=False)
    first = Trainer(config, Run(tmp_path / "stopped"), prepare(config.data, show_progress=False), show_progress=False)
    states = []
    for _ in range(stop):
        first.step()
        states.append(first.model.body.core.looping)
    assert states == [step >= 6 for step in range(stop)]
    first.save()
    again = train(config, tmp_path / "stopped", show_progress=False)
    assert file_sha256(again.model_folder / "model.safetensors") == file_sha256(whole.model_folder / "model.safetensors")
    assert again.metrics["valid_bpb"] == whole.metrics["valid_bpb"]


def test_what_is_shared_stays_shared(project, overrides, tmp_path):
    """After training, resuming, loading and moving there is one tensor for each that the configuration calls for, and no copy of it."""
    config = preset("demo-bpe", overrides | SHARED)
    run = train(config, tmp_path / "run", show_progress=False)
    trainer = Trainer(config, Run(tmp_path / "run"), prepare(config.data, show_progress=False), show_progress=False)
    load_checkpoint(run.checkpoint_folder, trainer.model, trainer.optimizer)
    optimized = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in trainer.model.parameters()} and len(optimized) == len(trainer.optimizer.state)
    loaded, _ = from_pretrained(run.model_folder, "cpu")
    for model in (trainer.model, loaded, loaded.to(torch.float64), loaded.to("cpu", torch.bfloat16)):
        core = model.body.core
        assert model.head_weight is model.body.embedding.weight and core.looping
        assert (len(core.blocks), len(core.attentions), len(core.ffns), len(core.plan)) == (4, 3, 3, 6)
        tensors = [p.data_ptr() for p in model.parameters()]
        assert len(set(tensors)) == len(tensors) == len(model.state_dict())
        assert sum(p.numel() for p in model.parameters()) == account(config.model).unique_parameters
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor.to(torch.bfloat16), loaded.state_dict()[name]), name


def test_training_learns(uninterrupted):
    log = uninterrupted.log()
    assert log["loss"].dropna().iloc[0] > 4 and uninterrupted.metrics["valid_bpb"] < 5
