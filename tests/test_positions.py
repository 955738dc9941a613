"What each way of marking positions promises of a whole model: order, distance, and reading further than it was trained to."
from typing import get_args

import pytest
import torch

from stlm.config import ConfigError, ModelConfig, PatchConfig, Positions, SharingConfig
from stlm.foundation import StlmError
from stlm.model.lm import LanguageModel, extend_context
from stlm.model.positions import make_positions

T, V = 16, 61
METHODS = {name: {"positions": name} for name in get_args(Positions)} | {"partial rope": {"rope_fraction": 0.5}}
every_method = pytest.mark.parametrize("method", METHODS)
unlimited = pytest.mark.parametrize("method", [name for name in METHODS if name != "learned"])


def small_model(method: str, **switches) -> LanguageModel:
    torch.manual_seed(0)
    # large weights, so that everything matters
    sizes = dict(vocab_size=V, context=T, n_layers=2, d_model=48, n_heads=6, n_kv_heads=2, d_ff=32, init_std=0.2)
    return LanguageModel(ModelConfig(**(sizes | METHODS[method] | switches))).eval()


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(1))


# Distance


def attention_scores(method: str, start: int) -> torch.Tensor:
    "(heads, T, T) scores among the same vectors, the first of them at position `start`."
    torch.manual_seed(0)
    config = ModelConfig(context=200, d_model=48, n_heads=6, n_kv_heads=6, init_std=1.0, **METHODS[method])
    positions, to_queries, to_keys = make_positions(config), torch.nn.Linear(48, 48), torch.nn.Linear(48, 48)
    x = positions.embed(torch.randn(1, T, 48), start)
    q, k = (positions.rotate(project(x).unflatten(-1, (6, 8)).transpose(1, 2), start) for project in (to_queries, to_keys))
    bias = positions.bias(T, start)
    return (q @ k.mT + (0 if bias is None else bias[..., start:]))[0].tril()


@torch.no_grad()
@every_method
@pytest.mark.parametrize("start", [1, 57, 200 - T])
def test_scores_depend_on_distance_alone_except_with_positions_in_the_embedding(method, start):
    moved = (attention_scores(method, start) - attention_scores(method, 0)).abs().max()
    assert moved > 0.1 if method in ("learned", "sinusoidal") else moved < 1e-4


# Order


@torch.no_grad()
@every_method
@pytest.mark.parametrize("n_layers", [1, 2])
def test_only_the_causal_mask_betrays_order_without_positions(method, n_layers):
    model, ids = small_model(method, n_layers=n_layers), random_ids(1, T)
    shuffled = torch.cat([ids[:, :-1].flip(1), ids[:, -1:]], dim=1)
    moved = (model(shuffled)[:, -1] - model(ids)[:, -1]).abs().max()
    assert moved < 1e-4 if method == "none" and n_layers == 1 else moved > 1e-2


# A part of each head


@torch.no_grad()
def test_partial_rope_is_a_method_of_its_own_between_rope_and_none():
    ids = random_ids(2, T)
    logits = {fraction: small_model("rope", rope_fraction=fraction)(ids) for fraction in (1.0, 0.5, 0.25)}
    assert torch.equal(logits[1.0], small_model("rope")(ids))
    assert all((one - other).abs().max() > 1e-2 for one, other in [(logits[1.0], logits[0.5]), (logits[0.5], logits[0.25])])
    assert (logits[0.25] - small_model("none")(ids)).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 1.0])
def test_partial_rope_is_causal_and_agrees_with_its_cache(fraction):
    model, ids = small_model("rope", rope_fraction=fraction), random_ids(2, T)
    logits, cache = model(ids), model.new_cache(2)
    stepped = torch.cat([model(piece, cache) for piece in ids.split([5, 1, 10], dim=1)], dim=1)
    torch.testing.assert_close(stepped, logits, rtol=1e-4, atol=1e-4)
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % V
    moved = (model(changed) - logits).abs().amax((0, 2))
    assert (moved[:9] == 0).all() and (moved[9:] > 0).all()


def test_partial_rope_is_one_graph_for_the_compiler():
    model, ids = small_model("partial rope"), random_ids(2, T)
    torch.testing.assert_close(torch.compile(model.nll, fullgraph=True, backend="eager")(ids, ids), model.nll(ids, ids))


@pytest.mark.parametrize("switches", [dict(rope_fraction=0.0), dict(rope_fraction=1.1), dict(rope_fraction=0.5, positions="alibi"),
                                      dict(rope_fraction=0.5, positions="none")], ids=str)
def test_an_impossible_share_is_refused(switches):
    with pytest.raises(ConfigError, match=r"model\.rope_fraction") as caught:
        ModelConfig(**switches)
    assert "\n" not in str(caught.value)


# Further than trained


@torch.no_grad()
@unlimited
def test_a_longer_context_changes_nothing_within_the_old_one(method):
    model, ids = small_model(method), random_ids(2, 5 * T)
    longer = extend_context(model, 5 * T)
    torch.testing.assert_close(longer(ids[:, :T]), model(ids[:, :T]))
    logits, cache = longer(ids), longer.new_cache(2)
    stepped = torch.cat([longer(piece, cache) for piece in ids.split(23, dim=1)], dim=1)
    torch.testing.assert_close(stepped, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[:, :T], model(ids[:, :T]), rtol=1e-4, atol=1e-4)  # nor does what comes after
    assert longer.state_dict().keys() == model.state_dict().keys() and model.config.context == T


@torch.no_grad()
def test_a_longer_context_keeps_mode_and_precision():
    model, ids = small_model("rope", sharing=SharingConfig(loop_layers=1, loops=3)).bfloat16().eval(), random_ids(1, T)
    model.set_looping(False)
    longer = extend_context(model, 5 * T)
    assert torch.equal(longer(ids), model(ids)) and longer.head_weight.dtype == torch.bfloat16 and not longer.training


@torch.no_grad()
@pytest.mark.parametrize("method", ["rope", "partial rope"])
def test_a_model_of_patches_reads_further_too(method):
    model, ids = small_model(method, patches=PatchConfig("stride", size=4, d_local=24, n_heads=2, d_ff=32, window=8)), random_ids(2, 5 * T)
    longer = extend_context(model, 5 * T)
    torch.testing.assert_close(longer(ids)[:, :T], model(ids[:, :T]), rtol=1e-4, atol=1e-4)


def test_learned_positions_end_where_training_ended():
    model = small_model("learned")
    with pytest.raises(StlmError, match=f"model.context={T}"):
        model(random_ids(1, T + 1))
    with pytest.raises(StlmError, match=r"model\.positions=learned") as caught:
        extend_context(model, 2 * T)
    assert "\n" not in str(caught.value)
