"""What changes while a run goes on reaches the model, survives a stop, meets the text that was asked for, and compiles nothing anew."""

import time
from dataclasses import asdict
from typing import get_args

import pytest
import torch

from helpers import real_text, small_run
from stlm.config import ConfigError, ModelConfig, PatchConfig, RunConfig, Shape, SharingConfig, TrainConfig, preset
from stlm.data.shards import Dataset, prepare
from stlm.model.layers import Dropout
from stlm.model.lm import LanguageModel
from stlm.model.pooling import PATCHES_AT_A_TIME, patches_to_run
from stlm.train.loop import Trainer, train_step
from stlm.train.optimizers import make_optimizer, orthogonalise
from stlm.train.records import Run, begin
from stlm.train.schedules import batch_parts, share

CHANGING = {"model.dropout": 0.3, "model.layer_drop": 0.4, "train.dropout_schedule": "triangle", "train.layer_drop_schedule": "late",
            "train.weight_decay_schedule": "down", "train.batch_schedule": "up", "train.accumulation": 4, "train.steps": 12,
            "model.value_residual": True, "model.residual_scalars": True, "train.schedule": "sqrt", "train.z_loss": 1e-3}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return real_text(tmp_path_factory.mktemp("text"))


def configured(corpus: str, **changes) -> RunConfig:
    overrides = small_run(corpus) | CHANGING | {"train.checkpoint_every": 100} | changes
    return preset("demo-bpe", overrides)


def dataset_of(config: RunConfig) -> Dataset:
    return prepare(config.data, show_progress=False)


def trainer_in(folder, config: RunConfig) -> Trainer:
    run = Run(folder)
    begin(run, config, {"data": "text"})
    return Trainer(config, run, dataset_of(config), show_progress=False)


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_what_has_decayed_to_nothing_slows_nothing():
    """Below 1e-38, where moments without gradients and unlikely probabilities end, a processor is a hundred times slower."""
    weights = torch.randn(4, 512, 128)
    decayed = weights.clone()
    decayed[:, ::20] *= 1e-39

    def seconds(given):
        start = time.process_time()
        orthogonalise(given)
        return time.process_time() - start

    assert not decayed[:, ::20].any() and decayed[:, 1].all()
    assert min(seconds(decayed) for _ in range(5)) < 4 * min(seconds(weights) for _ in range(5))  # 60 times, where they are as they come


def test_every_step_gets_what_the_schedules_say(corpus, tmp_path):
    config = configured(corpus)
    trainer, total, before = trainer_in(tmp_path / "run", config), 12, 0
    dropouts = [module for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)]
    assert len(dropouts) == 1 + config.model.n_layers
    for step in range(total):
        trainer.step()
        assert all(module.rate.item() == pytest.approx(0.3 * share("triangle", step, total, config.train)) for module in dropouts)
        assert trainer.model.body.core.layer_drop.rate.item() == pytest.approx(0.4 * share("late", step, total, config.train))
        decays = [group["weight_decay"] for group in trainer.optimizer.param_groups]
        assert decays == [pytest.approx(0.1 * (1 - step / (total - 1))), 0.0]
        tokens, before = trainer.progress.tokens - before, trainer.progress.tokens
        assert tokens == batch_parts(step, total, config.train) * 2 * config.model.context
    assert [batch_parts(step, total, config.train) for step in (0, 5, 11)] == [1, 2, 4]


@pytest.mark.parametrize("changes", [{}, {"train.checkpoint_activations": True}, {"train.dropout_schedule": "constant"}], ids=str)
def test_a_run_that_was_stopped_ends_with_the_same_weights(corpus, tmp_path, changes):
    config = configured(corpus, **changes)
    whole, first, second = (trainer_in(tmp_path / name, config) for name in ("whole", "stopped", "stopped"))
    for _ in range(12):
        whole.step()
    for _ in range(5):
        first.step()
    first.save()
    second.resume()
    while second.progress.step < 12:
        second.step()
    of_the_process = {"seconds": 0, "peak_memory": 0}
    assert asdict(second.progress) | of_the_process == asdict(whole.progress) | of_the_process
    assert all(torch.equal(*pair) for pair in zip(weights(whole), weights(second), strict=True))


@pytest.mark.parametrize("shape", get_args(Shape))
def test_a_changing_batch_reads_the_text_that_was_asked_for_window_by_window(corpus, tmp_path, shape):
    config = configured(corpus, **{"train.batch_schedule": shape, "train.steps": 0, "train.bytes": 20_000})
    trainer, plain = (trainer_in(tmp_path / name, c) for name, c in {
        "run": config, "plain": configured(corpus, **{"train.batch_schedule": "constant", "train.steps": 40})}.items())
    seen = torch.cat([trainer.batches.batch(step).inputs for step in range(trainer.plan.steps)])
    expected = torch.cat([plain.batches.batch(step).inputs for step in range(40)])
    assert torch.equal(seen, expected[:len(seen)])  # the same order, whatever the sizes
    full = config.train.batch_size * config.model.context
    assert abs(seen.numel() * trainer.dataset.split("train").bytes_per_token - 20_000) <= full
    trainer.fit()
    assert trainer.progress.tokens == seen.numel() and abs(trainer.progress.bytes - 20_000) <= full
    assert sum(line["step"] == trainer.plan.steps for line in trainer.run.log().to_dict("records"))


def test_a_batch_in_parts_is_a_batch(corpus, tmp_path):
    """Small batches of a schedule are weighted like large ones: the gradient is the mean over the windows that are there."""
    config = configured(corpus, **{"model.dropout": 0.0, "model.layer_drop": 0.0, "train.dropout_schedule": "constant",
                                   "train.layer_drop_schedule": "constant", "train.clip": 0.0})
    trainer = trainer_in(tmp_path / "run", config)
    batch = trainer.batches.batch(8)
    assert len(batch.inputs) == 6
    loss, *_ = train_step(trainer.model.objective, trainer.optimizer, batch, config.train, trainer.device, torch.float32)
    gradients = [parameter.grad.clone() for parameter in trainer.model.parameters()]
    other = trainer_in(tmp_path / "other", config)
    nats = other.model.objective(batch.inputs, batch.targets)[1]
    nats.backward()
    torch.testing.assert_close(loss, nats.detach())
    for one, parameter in zip(gradients, other.model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"train.checkpoint_activations": True}], ids=str)
def test_no_step_of_a_schedule_compiles_anything_anew(corpus, tmp_path, changes):
    torch.compiler.reset()
    trainer = trainer_in(tmp_path / "run", configured(corpus, **{"train.compile": "on", "model.n_layers": 2} | changes))
    trainer.step()
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    losses = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(11):
            trainer.step()
            losses.append(trainer.interval.nats.item() / trainer.interval.tokens)
    assert compiled >= 1 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert losses[-1] < losses[0]


def test_loops_that_begin_midway_are_compiled_before_the_clock_runs(corpus, tmp_path):
    torch.compiler.reset()
    loops = {"model.n_layers": 2, "model.sharing.loop_layers": 1, "train.loop_start": 0.5, "train.steps": 4, "train.compile": "on"}
    trainer = trainer_in(tmp_path / "run", preset("demo-bpe", small_run(corpus) | loops))
    trainer.warm_up()
    assert not trainer.model.body.core.looping
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(4):
            trainer.step()
            assert trainer.model.body.core.looping == (step >= 2)


@pytest.mark.parametrize(("at_a_time", "context"), [(1, 128), (8, 512)])
def test_the_warm_up_compiles_for_any_number_of_patches(corpus, tmp_path, monkeypatch, at_a_time, context):
    """Code that is made in the second step would be time of training, also where the first two batches run over equally many patches."""
    torch.compiler.reset()
    monkeypatch.setitem(PATCHES_AT_A_TIME, "cpu", at_a_time)
    sizes = {"model.n_layers": 1, "model.context": context, "model.patches.ngram": 0, "train.batch_size": 2, "train.steps": 5,
             "train.seed": 3}
    trainer = trainer_in(tmp_path / "run", preset("demo-pooled", small_run(corpus) | {"train.compile": "on"} | sizes))
    patches = [int(patches_to_run(trainer.model.cuts(trainer.batches.batch(step).inputs).ends)) for step in range(5)]
    assert len(set(patches)) > 1 and (at_a_time == 1 or patches[0] == patches[1])
    trainer.warm_up()
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(5):
        trainer.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled >= 1


def test_a_python_number_would_compile_anew():
    """What the tensor is for: the same change of the module's own number is refused."""
    torch.compiler.reset()
    model = small_model(dropout=0.3)
    ids = torch.randint(50, (2, 16))
    objective = torch.compile(model.objective, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        rate = model.vary_dropout()
        for value in (0.3, 0.1, 0.0):
            rate.fill_(value)
            objective(ids, ids)
        torch.compiler.reset()
        model = small_model(dropout=0.3)
        objective = torch.compile(model.objective, backend="eager")
        objective(ids, ids)
        for dropout in (module for module in model.modules() if isinstance(module, Dropout)):
            dropout.p = 0.1
        with pytest.raises(Exception, match="Recompiling"):
            objective(ids, ids)


# --- Layers that are skipped, or computed again -------------------------------------------------------------------------------------------

POOLED = PatchConfig(patcher="space", d_local=16, n_heads=2, d_ff=24, window=8)
FAMILIES = {
    "flat": dict(),
    "switches": dict(value_residual=True, residual_scalars=True, embedding_norm=True, qk_norm=True, n_kv_heads=1, logit_softcap=20.0),
    "shared and looped": dict(sharing=SharingConfig("all", "cycle", lora_rank=2, loop_layers=2), value_residual=True, positions="alibi"),
    "pooled": dict(patches=POOLED, value_residual=True, residual_scalars=True),
    "gate": dict(patches=PatchConfig(patcher="gate", d_local=16, n_heads=2, d_ff=24, window=8)),
    "paper's": dict(patches=PatchConfig(patcher="stride", size=4, max_size=4, encoder="patch", decoder="parallel", unpooling="linear",
                                        d_local=16, n_heads=2, d_ff=24)),
}


def small_model(**switches) -> LanguageModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, context=32, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, init_std=0.1)
    return LanguageModel(ModelConfig(**sizes | switches))


def gradients_of(model: LanguageModel, objective=None) -> dict[str, torch.Tensor]:
    ids = torch.randint(257, (4, 33), generator=torch.Generator().manual_seed(1))
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    loss, _ = (objective or model.objective)(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("rates", [dict(), dict(dropout=0.2, layer_drop=0.3)], ids=["plain", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_computed_again_have_the_same_gradients(family, rates):
    model = small_model(**FAMILIES[family] | rates)
    if rates:
        model.vary_dropout()
    expected = gradients_of(model)
    model.set_checkpointing(True)
    found = gradients_of(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_compiled_layers_computed_again_have_the_same_gradients():
    torch.compiler.reset()
    model = small_model(**FAMILIES["switches"], dropout=0.2, layer_drop=0.3)
    model.vary_dropout()
    plain = gradients_of(model, torch.compile(model.objective))
    torch.compiler.reset()
    model.set_checkpointing(True)
    again = gradients_of(model, torch.compile(model.objective, fullgraph=True))
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_stochastic_depth_skips_whole_layers_of_single_texts_and_is_off_in_use():
    model, plain = small_model(layer_drop=0.9), small_model()
    ids = torch.randint(257, (64, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model.eval()(ids), plain.eval()(ids))
        entered, left = [], []
        model.train()
        for block in model.body.core.blocks:
            block.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
        model.body.core.norm.register_forward_pre_hook(lambda module, inputs: left.append(inputs[0]))
        torch.manual_seed(0)
        model.hidden(ids)
    pairs = zip(entered, [*entered[1:], *left], strict=True)
    skipped = [(before == after).flatten(1).all(1).float().mean().item() for before, after in pairs]
    assert all(abs(share - expected) < 0.2 for share, expected in zip(skipped, (0.3, 0.6, 0.9), strict=True)), skipped


@pytest.mark.parametrize("overrides", [
    {"train.dropout_schedule": "up"}, {"train.layer_drop_schedule": "late"}, {"train.batch_schedule": "up"},
    {"train.weight_decay": 0, "train.weight_decay_schedule": "down"}, {"train.schedule_turn": 0}, {"model.layer_drop": 1},
    {"model.logit_softcap": -1}, {"train.z_loss": -1}, {"train.schedule": "sqrt", "train.cooldown": 0.99},
    {"train.dropout_schedule": "sideways"}], ids=str)
def test_what_would_do_nothing_or_cannot_be_is_one_clear_line(overrides):
    with pytest.raises(ConfigError, match=list(overrides)[-1].replace(".", r"\.")) as caught:
        preset("demo-bpe", overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [dict(optimizer="muon"), dict(cautious=True), dict()], ids=str)
def test_a_loaded_optimizer_lies_where_its_parameters_do(changes):
    config = TrainConfig(steps=1, **changes)
    sizes = ModelConfig(vocab_size=50, context=8, n_layers=1, d_model=16, n_heads=2, n_kv_heads=2, d_ff=32)
    models = {device: LanguageModel(sizes).to(device) for device in ("cpu", "meta")}  # another device, without having one
    optimizers = {device: make_optimizer(model, config) for device, model in models.items()}
    models["cpu"].objective(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long))[0].backward()
    optimizers["cpu"].step()
    optimizers["meta"].load_state_dict(optimizers["cpu"].state_dict())
    states = optimizers["meta"].state
    assert states and all(tensor.device == parameter.device for parameter, state in states.items() for tensor in state.values())
