"""A run that is killed, stopped, or denied its disk loses nothing and ends as if nothing had happened."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch

from helpers import command, own_project, real_text, settings, small_run, stlm
from stlm.config import preset
from stlm.data.shards import prepare
from stlm.evaluate.bits import bits_per_byte
from stlm.foundation import file_sha256
from stlm.infer.generate import generate
from stlm.model.accounting import account
from stlm.pretrained import from_pretrained
from stlm.train.checkpoints import checkpoints, load_checkpoint
from stlm.train.loop import Diverged, Trainer, train
from stlm.train.records import Run, read_log


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


def test_killed_at_random_moments(project, overrides, uninterrupted):
    folder, chance, kills = project / "killed", random.Random(0), 0
    for _ in range(4):
        process = begin(project, overrides, folder)
        wait_for_lines(process, folder / "log.jsonl", len(read_log(folder / "log.jsonl")))
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 2, "the run ended before it could be killed; make it longer"
    code, _, errors = stlm("train", *settings(overrides), "--folder", folder, cwd=project)
    assert code == 0, errors
    assert_same(Run(folder), uninterrupted)
    assert not list(folder.rglob("*.tmp")), "a killed writer's leftovers are removed"


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


def test_damaged_checkpoint_gives_way_to_the_one_before(project, overrides, uninterrupted):
    config, folder = preset("demo-bpe", overrides), project / "damaged"
    process = begin(project, overrides, folder)
    wait_for_lines(process, folder / "log.jsonl", 4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    newest = checkpoints(folder / "checkpoint")[-1]
    (newest / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:-7])
    with pytest.warns(UserWarning, match=newest.name):
        train(config, folder, show_progress=False)
    assert Run(folder).status == "finished"


def test_another_configuration_is_refused(project, overrides, uninterrupted):
    begin(project, overrides, project / "taken").kill()
    folder = project / "other"
    process = begin(project, overrides, folder)
    wait_for_lines(process, folder / "log.jsonl", 0)
    process.kill()
    process.communicate()
    code, _, errors = stlm("train", *settings(overrides | {"train.lr": 0.5}), "--folder", folder, cwd=project)
    assert code == 2 and "train.lr is 0.003 there, 0.5 here" in errors


def test_a_loss_that_is_no_number_stops_before_the_checkpoint(project, overrides, tmp_path):
    config = preset("demo-bpe", overrides | {"model.init_std": 1e38})
    with pytest.raises(Diverged, match=r"not finite at step \d+ with train.lr"):
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
    with pytest.raises(Diverged):
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
