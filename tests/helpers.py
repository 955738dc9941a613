"""What several tests need: real text, a small run, a project of its own, and `stlm` as a process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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
