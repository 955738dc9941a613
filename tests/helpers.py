"""What several tests need: real text, a small run, a project of its own, and `stlm` as a process."""

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from stlm.foundation import StlmError

ROOT = Path(__file__).resolve().parents[1]

# Processes that start in milliseconds: forked from one that has imported PyTorch and run nothing.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["stlm.train.loop", "torch._dynamo"])  # an optimizer imports the second at its first step


def real_text(folder: Path) -> str:
    "A corpus of English that is there without a network: the licence, paragraph by paragraph, as `file:PATH`."
    path = folder / "licence.txt"
    shutil.copy(ROOT / "LICENSE", path)
    return f"file:{path}"


def small_run(corpus: str) -> dict[str, object]:
    "Overrides for a run that takes a second or two, and has many checkpoints."
    return {"data.corpus": corpus, "data.tokenizer": "bytes", "data.valid_fraction": 0.2, "data.test_fraction": 0.2,
            "model.n_layers": 2, "model.d_model": 64, "model.n_heads": 4, "model.n_kv_heads": 2, "model.d_ff": 128, "model.context": 64,
            "model.dropout": 0.1, "train.steps": 120, "train.batch_size": 8, "train.accumulation": 2, "train.log_every": 7,
            "train.eval_every": 30, "train.eval_bytes": 2000, "train.checkpoint_every": 5, "train.lr": 3e-3}


def tiny_run(corpus: str) -> dict[str, object]:
    "Overrides for a run of a few milliseconds a step, in single precision."
    sizes = {"model.d_model": 32, "model.d_ff": 64, "model.context": 32, "train.batch_size": 4}
    return small_run(corpus) | sizes | {"train.precision": "fp32"}


def train_in_fork(overrides: dict[str, object], folder: Path, **options: object) -> None:
    "What a forked process does: `train`, without the measurement of the machine, which takes longer than the run."
    from stlm.config import preset
    from stlm.train import loop
    loop.peak_flops = lambda *_: 1e9
    loop.train(preset("demo-bpe", overrides), folder, show_progress=False, **options)


def error_in_fork(work: Callable[..., None], *arguments: object) -> str:
    "Do something in a forked process; the text of its `StlmError`, or empty where there was none."
    return errors_in_forks(1, work, *arguments)[0]


def errors_in_forks(count: int, work: Callable[..., None], *arguments: object) -> list[str]:
    "The same in several processes that train together."
    forks = start_forks(count, work, *arguments)
    texts = [pipe.recv() for _, pipe in forks]
    for process, _ in forks:
        process.join()
    return texts


def start_forks(count: int, work: Callable[..., None], *arguments: object) -> list[tuple[BaseProcess, Connection]]:
    "Begin something in several processes that train together; each pipe brings the text of an error, or an empty one."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forks = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        here, there = FORKS.Pipe(duplex=False)
        environment = {name: str(value) for name, value in place.items()}
        process = FORKS.Process(target=_send_error, args=(there, environment, work, *arguments), daemon=True)
        process.start()
        there.close()
        forks.append((process, here))
    return forks


def _send_error(pipe: Connection, place: dict[str, str], work: Callable[..., None], *arguments: object) -> None:
    os.environ.update(place)
    try:
        work(*arguments)
        pipe.send("")
    except StlmError as error:
        pipe.send(str(error))


def settings(overrides: dict[str, object]) -> list[str]:
    "Overrides as the command line takes them."
    return [part for name, value in overrides.items() for part in ("--set", f"{name}={value}")]


def own_project(folder: Path) -> Path:
    "A project folder with the experiments and nothing else, so that tests leave the real runs and reports alone."
    (folder / "nbs").mkdir(parents=True)
    shutil.copy(ROOT / "settings.ini", folder)
    shutil.copytree(ROOT / "nbs" / "experiments", folder / "nbs" / "experiments")
    return folder


def command(*arguments: object, cwd: Path, start: str = "") -> subprocess.Popen:
    "Start `stlm`; `start` is Python to run before it, such as a limit on resources."
    code = f"import sys; {start}\nfrom stlm.cli import main; sys.argv = ['stlm', *sys.argv[1:]]; main()"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COVERAGE_PROCESS_START": ""}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)


def stlm(*arguments: object, cwd: Path, start: str = "") -> tuple[int, str, str]:
    "Run `stlm` to its end: exit status, output, errors."
    process = command(*arguments, cwd=cwd, start=start)
    output, errors = process.communicate(timeout=600)
    return process.returncode, output, errors
