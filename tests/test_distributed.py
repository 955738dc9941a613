"""Several processes train the same model as one: the same curve, one folder, and nothing lost when one of them dies."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import psutil
import pytest
import torch
from safetensors.torch import load_file

from helpers import command, errors_in_forks, real_text, settings, start_forks, stlm, tiny_run, train_in_fork
from stlm.config import TrainConfig, preset
from stlm.foundation import StlmError, file_sha256
from stlm.train import distributed, loop
from stlm.train.checkpoints import checkpoints
from stlm.train.distributed import connected, share_of
from stlm.train.loop import train_in_processes
from stlm.train.records import Run, locked, read_log
from stlm.train.schedules import batch_starts
from test_training_faults import POOLED, SHARED, train_to


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    text = real_text(tmp_path_factory.mktemp("text"))
    return tiny_run(text) | {"train.batch_size": 8, "train.steps": 30, "train.eval_every": 10, "model.dropout": 0.0}


@pytest.fixture(scope="module")
def alone(overrides, tmp_path_factory):
    "The run on one process that every other one must equal but for rounding."
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert errors_in_forks(1, train_in_fork, overrides, folder) == [""]
    return Run(folder)


def assert_same_curve(run: Run, other: Run) -> None:
    "The same lines at the same steps, after the same text; losses and weights to rounding."
    assert run.status == "finished"
    lines, others = (read_log(one.folder / "log.jsonl") for one in (run, other))
    assert len(lines) == len(others)
    for line, expected in zip(lines, others, strict=True):
        assert all(line[name] == expected[name] for name in ("step", "tokens", "bytes"))
        for name in {"loss", "bpb", "grad_norm", "valid_loss", "valid_bpb"} & expected.keys():
            assert line[name] == pytest.approx(expected[name], rel=1e-4), name
    weights, expected = (load_file(one.model_folder / "model.safetensors") for one in (run, other))
    assert all(torch.allclose(weights[name], expected[name], rtol=1e-3, atol=1e-4) for name in expected)
    assert run.metrics["valid_bytes"] == other.metrics["valid_bytes"]


def test_who_is_asked_to_stop_may_finish_a_step(monkeypatch):
    "torchelastic kills after 30 seconds, and a step on a processor may take longer: nothing would be saved."
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    given = []
    monkeypatch.setattr(distributed, "_run_once", lambda *_: given.append(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) or [])
    assert distributed.launch([], 2) == 0 and float(given[0]) == distributed.SILENCE.total_seconds()
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    assert distributed.launch([], 2) == 0 and given[1] == "5"


@pytest.mark.parametrize("processes", [2, 4])
def test_the_number_of_processes_does_not_change_the_curve(overrides, alone, tmp_path, processes):
    assert errors_in_forks(processes, train_in_fork, overrides, tmp_path / "run") == [""] * processes
    assert_same_curve(Run(tmp_path / "run"), alone)


def test_a_run_goes_on_with_another_number_of_processes(overrides, alone, tmp_path):
    overrides = overrides | {"train.log_every": 10}  # stopping writes a line, as the end of every tenth step does
    for processes, step in ((2, 10), (1, 20)):
        errors = errors_in_forks(processes, train_to, overrides, tmp_path / "run", step)
        assert all(f"at step {step} of 30" in error for error in errors), errors
    assert errors_in_forks(4, train_in_fork, overrides, tmp_path / "run") == [""] * 4
    assert errors_in_forks(1, train_in_fork, overrides, tmp_path / "whole") == [""]
    assert_same_curve(Run(tmp_path / "run"), Run(tmp_path / "whole"))


def test_a_signal_to_one_process_stops_all_after_the_same_step(overrides, tmp_path):
    overrides = overrides | {"model.dropout": 0.2, "train.steps": 100}
    (_, first_pipe), (second, second_pipe) = start_forks(2, train_in_fork, overrides, tmp_path / "run")
    while not read_log(tmp_path / "run" / "log.jsonl"):
        time.sleep(0.01)
    os.kill(second.pid, signal.SIGTERM)
    errors = [first_pipe.recv(), second_pipe.recv()]
    assert errors[0].startswith("stopped by another process at step ") and errors[1] == errors[0].replace("another process", "SIGTERM")
    assert errors_in_forks(2, train_in_fork, overrides, tmp_path / "run") == ["", ""]
    assert errors_in_forks(2, train_in_fork, overrides, tmp_path / "whole") == ["", ""]
    weights = [Run(tmp_path / name).model_folder / "model.safetensors" for name in ("run", "whole")]
    assert file_sha256(weights[0]) == file_sha256(weights[1]), "bit for bit with the same number of processes, dropout included"


KINDS = {"Muon": {"train.optimizer": "muon", "train.steps": 12},
         "a batch that grows": {"train.batch_schedule": "up", "train.accumulation": 4, "train.steps": 12},
         "loops that begin midway": SHARED | {"train.batch_size": 8},
         "a gate": POOLED | {"model.patches.patcher": "gate", "train.steps": 12, "train.batch_size": 8},
         "a segmenter": POOLED | {"model.patches.patcher": "entropy", "model.patches.size": 4, "train.steps": 12, "train.batch_size": 8}}


def train_small_segmenter(overrides, folder):
    loop.SEGMENTER_BYTES = 4000
    train_in_fork(overrides, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_shared(overrides, tmp_path, kind):
    overrides = overrides | KINDS[kind]
    for processes in (2, 1):
        assert errors_in_forks(processes, train_small_segmenter, overrides, tmp_path / str(processes)) == [""] * processes
    assert_same_curve(Run(tmp_path / "2"), Run(tmp_path / "1"))


def train_by_a_clock_of_its_own(overrides, folder):
    step, loop.PACE_SHARE = loop.Trainer.step, 0.5

    def slower(trainer):
        step(trainer)
        trainer.progress.seconds += 0.02 * trainer.world.rank
    loop.Trainer.step = slower
    train_in_fork(overrides, folder)


def test_processes_agree_on_the_pace(overrides, tmp_path):
    """However different their clocks are: each takes as many steps to measure it, and then as many as fit."""
    timed, run = {name: value for name, value in overrides.items() if name != "train.steps"} | {"train.seconds": 2}, Run(tmp_path / "run")
    assert errors_in_forks(2, train_by_a_clock_of_its_own, timed, run.folder) == ["", ""]
    assert run.metrics["steps"] == run.pace["steps"] == max(1, int(2 / run.pace["seconds_per_step"]))
    assert run.pace["seconds_per_step"] > 0.01, "the mean of both clocks"


def test_what_cannot_be_shared_is_refused(overrides, tmp_path):
    errors = errors_in_forks(3, train_in_fork, overrides, tmp_path / "run")
    assert errors == ["train.batch_size=8 cannot be shared by 3 processes; take a multiple of that"] * 3
    shrinking = overrides | {"train.batch_schedule": "down", "train.accumulation": 8}
    errors = errors_in_forks(2, train_in_fork, shrinking, tmp_path / "shrinking")
    assert errors[0].startswith("train.batch_schedule=down changes the batch by 1 windows") and errors[0] == errors[1]
    with locked(Run(tmp_path / "taken")):
        errors = errors_in_forks(2, train_in_fork, overrides, tmp_path / "taken")
    assert errors[0].endswith("is being trained by another process") and errors[1].startswith("another process of this run ended early")


def second_of(launcher) -> psutil.Process:
    "The second of the processes that a launcher has started."
    workers = psutil.Process(launcher.pid).children(recursive=True)
    return next(process for process in workers if process.environ().get("RANK") == "1")


def test_one_process_dies_and_the_run_goes_on(overrides, alone, tmp_path):
    longer = overrides | {"train.steps": 200, "model.dropout": 0.2}
    launcher = command("train", *settings(longer), "--folder", tmp_path / "run", "--processes", 2, "--restarts", 1, cwd=tmp_path)
    while launcher.poll() is None and len(read_log(tmp_path / "run" / "log.jsonl")) < 3:
        time.sleep(0.01)
    second_of(launcher).kill()
    output, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, errors
    assert output.count("bits per byte") == 1 and "another process of this run ended early" in errors
    assert errors.count("stlm: one process was ended by SIGKILL; the system does so where memory is short") == 1
    assert errors_in_forks(2, train_in_fork, longer, tmp_path / "whole") == ["", ""]
    weights = [Run(tmp_path / name).model_folder / "model.safetensors" for name in ("run", "whole")]
    assert file_sha256(weights[0]) == file_sha256(weights[1])


def test_a_request_to_stop_is_not_undone_by_restarts(overrides, tmp_path):
    run, longer = Run(tmp_path / "run"), overrides | {"train.steps": 2000}
    launcher = command("train", *settings(longer), "--folder", run.folder, "--processes", 2, "--restarts", 1, cwd=tmp_path)
    while launcher.poll() is None and len(read_log(run.folder / "log.jsonl")) < 3:
        time.sleep(0.01)
    second_of(launcher).terminate()
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 130 and errors.count("stlm: stopped by another process at step ") == 1, errors
    assert run.status == "stopped" and checkpoints(run.checkpoint_folder)


def test_an_error_that_would_come_again_is_not_retried(overrides, tmp_path):
    taken = tmp_path / "taken"
    with locked(Run(taken)):
        code, _, errors = stlm("train", *settings(overrides), "--folder", taken, "--processes", 2, "--restarts", 2, cwd=tmp_path)
    assert code == 2 and errors.count("is being trained by another process") == 1, errors


def prepare_slowly_and_train(overrides, folder, silence, preparation):
    distributed.SILENCE, prepare = timedelta(seconds=silence), loop.prepare
    loop.prepare = lambda *a, **b: time.sleep(0 if int(os.environ["RANK"]) else preparation) or prepare(*a, **b)
    train_in_fork(overrides, folder)


def test_a_process_that_falls_silent_is_missed_and_one_that_prepares_is_not(overrides, tmp_path):
    log = tmp_path / "run" / "log.jsonl"
    forks = start_forks(2, prepare_slowly_and_train, overrides | {"train.steps": 10 ** 6}, tmp_path / "run", 8, 10)
    (first, pipe), (second, _) = forks
    while first.is_alive() and len(read_log(log)) < 3:
        time.sleep(0.01)
    os.kill(second.pid, signal.SIGSTOP)
    said = pipe.recv() if pipe.poll(60) else "nothing"
    for process, _ in forks:
        process.kill()
    assert said.startswith("another process of this run ended early") and len(read_log(log)) >= 3


def free_place() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start_host(place, overrides, folder, *options) -> subprocess.Popen:
    "What one of several hosts runs."
    agent = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", "1", "--rdzv-backend", "c10d",
             "--rdzv-endpoint", place, "--rdzv-id", "pair", "-m", "stlm", "train", *settings(overrides), "--folder", str(folder)]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(agent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_two_hosts(overrides, alone, tmp_path):
    place = free_place()
    hosts = [start_host(place, overrides, tmp_path / "run", "--nnodes", "2") for _ in range(2)]
    outputs = [host.communicate(timeout=180)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert_same_curve(Run(tmp_path / "run"), alone)


def listens(process, place: str) -> bool:
    "Whether the list of all that take part is kept by this process."
    return any(one.status == psutil.CONN_LISTEN and one.laddr.port == int(place.split(":")[1]) for one in process.net_connections())


def test_one_host_goes_on_when_the_other_is_lost(overrides, tmp_path):
    place, run, overrides = free_place(), Run(tmp_path / "run"), overrides | {"train.steps": 200}
    patience = "keep_alive_interval=1,last_call_timeout=10"  # seconds; a first host waits as long for a second
    options = ["--nnodes", "1:2", "--max-restarts", "3", "--rdzv-conf", patience]
    hosts = [start_host(place, overrides, run.folder, *options) for _ in range(2)]
    while len(read_log(run.folder / "log.jsonl")) < 3:
        assert all(host.poll() is None for host in hosts)
        time.sleep(0.01)
    before = read_log(run.folder / "log.jsonl")
    stays, lost = sorted((psutil.Process(host.pid) for host in hosts), key=lambda process: not listens(process, place))
    for process in [lost, *lost.children(recursive=True)]:
        process.kill()
    outputs = {host.pid: host.communicate(timeout=180)[0] for host in hosts}
    assert "another process of this run ended early" in outputs[stays.pid], outputs
    assert {host.pid: host.returncode for host in hosts} == {stays.pid: 0, lost.pid: -signal.SIGKILL}, outputs
    assert run.status == "finished" and read_log(run.folder / "log.jsonl")[0] == before[0], "it went on, and did not begin anew"


def test_a_lost_host_comes_back(overrides, tmp_path):
    """Each host counts its restarts for itself, and one that comes back has counted none."""
    place, log = free_place(), tmp_path / "run" / "log.jsonl"
    options = ["--nnodes", "1:2", "--max-restarts", "3", "--rdzv-conf", "keep_alive_interval=1,last_call_timeout=10"]
    endless = overrides | {"train.steps": 10 ** 6}
    hosts = [start_host(place, endless, log.parent, *options) for _ in range(2)]

    def wait_until(true, what):
        end = time.monotonic() + 150
        while not true():
            assert time.monotonic() < end, what
            time.sleep(0.01)

    def wait_for_more(what):
        before = len(read_log(log))
        wait_until(lambda: len(read_log(log)) >= before + 3, what)

    def kill(host):
        for process in [psutil.Process(host.pid), *psutil.Process(host.pid).children(recursive=True)]:
            process.kill()
        host.communicate()

    try:
        wait_for_more("both do not begin")
        kill(hosts.pop(listens(psutil.Process(hosts[0].pid), place)))
        wait_for_more("one alone does not go on")
        hosts.append(start_host(place, endless, log.parent, *options))
        wait_until(psutil.Process(hosts[-1].pid).children, "the other one does not come back")  # by then the first has ended its process
        wait_for_more("both do not go on")
    finally:
        for host in hosts:
            kill(host)


def test_hosts_that_could_not_come_back_are_told(monkeypatch):
    elastic = {"GROUP_WORLD_SIZE": 2, "TORCHELASTIC_MAX_RESTARTS": 3, "TORCHELASTIC_USE_AGENT_STORE": True}
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, **elastic}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(StlmError, match=r"^2 hosts with restarts .*: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"), connected():
        pass


def test_parts_of_a_batch_that_grows_have_one_size():
    """Another size would be compiled anew in the middle of a run."""
    whole = TrainConfig(steps=12, batch_size=24, accumulation=6, batch_schedule="up")
    own = share_of(whole, 4)
    windows = [later - earlier for earlier, later in itertools.pairwise(batch_starts(12, whole))]
    assert min(windows) == 4 and max(windows) == 24
    assert {count // 4 % (own.batch_size // own.accumulation) for count in windows} == {0}


def test_from_a_notebook(overrides, alone, tmp_path, capfd):
    config = preset("demo-bpe", overrides)
    run = train_in_processes(config, 2, tmp_path / "run")
    assert run.config == config and "training" in capfd.readouterr().err
    assert_same_curve(run, alone)
    with pytest.raises(StlmError, match=r"holds another run \(train.lr is 0.003 there, 0.5 here\)"):
        train_in_processes(preset("demo-bpe", overrides | {"train.lr": 0.5}), 2, tmp_path / "run", show_progress=False)
