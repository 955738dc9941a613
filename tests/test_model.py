"""Every combination of the model's switches: no leak from the future, cache = full pass, gradients everywhere, nothing below chance."""

import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from stlm.config import Ffn, ModelConfig, Norm, PatchConfig, Positions, Sharing, SharingConfig
from stlm.foundation import StlmError
from stlm.infer.generate import Sampling, steps
from stlm.infer.scoring import token_logprobs
from stlm.model import lm
from stlm.model.accounting import account, training_memory
from stlm.model.lm import LanguageModel

T, V = 16, 61
COMBINATIONS = [
    # norms on queries and keys and the tied head come and go in steps of 7 and 11, so that they meet every value of the others
    dict(n_kv_heads=n_kv_heads, positions=positions, norm=norm, ffn=ffn, qk_norm=number % 7 < 4, tied_head=number % 11 < 6)
    for number, (n_kv_heads, positions, norm, ffn) in enumerate(itertools.product(
        (1, 3, 6), get_args(Positions), get_args(Norm), get_args(Ffn)))
] + [
    # the switches: each alone, each with a shared and looped stack, and all together
    switches | sharing for sharing in ({}, dict(n_layers=5, sharing=SharingConfig("all", "cycle", lora_rank=2, loop_layers=5)))
    for switches in (dict(zero_init=True), dict(embedding_norm=True, positions="learned"), dict(residual_scalars=True),
                     dict(value_residual=True), dict(value_residual=True, n_kv_heads=6, positions="alibi"), dict(logit_softcap=5.0),
                     dict(zero_init=True, embedding_norm=True, residual_scalars=True, value_residual=True, logit_softcap=5.0))
] + [
    # every pattern of both parts; everything else of sharing comes and goes beside it in steps that share no divisor
    dict(sharing=SharingConfig(ffn, attention, times=2 + number % 2, free_ends=number % 3 // 2, lora_rank=number % 4, lora_scale=2.0,
                               loop_layers=number % 7 // 2, loops=2 + number % 8 // 6),
         n_layers=5, positions=get_args(Positions)[(number + number // 5) % 5], qk_norm=number % 11 < 6,
         embedding_rank=number % 9 // 6 * 7, tied_head=number % 13 < 7)
    for number, (ffn, attention) in enumerate(itertools.product(get_args(Sharing), get_args(Sharing)))
]


SHARED = SharingConfig("all", "reverse", free_ends=1, lora_rank=3, loop_layers=2)  # something of everything


def small_model(**switches) -> LanguageModel:
    torch.manual_seed(0)
    # six heads: no power of two, so that ALiBi's second series of slopes takes part; large weights, so that everything matters
    sizes = dict(vocab_size=V, context=T, n_layers=2, d_model=24, n_heads=6, d_ff=32, init_std=0.2)
    model = LanguageModel(ModelConfig(**(sizes | dict(n_kv_heads=2) | switches)))
    for parameter in model.parameters():
        if not parameter.any():  # they start at zero, where they would have no part in anything
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def test_no_position_sees_the_future():
    ids = random_ids(1, T)
    for switches in COMBINATIONS:
        model = small_model(**switches).eval()
        logits = model(ids)
        for position in (0, 5, T - 1):
            changed = ids.clone()
            changed[:, position] = (changed[:, position] + 7) % V
            moved = (model(changed) - logits).abs().amax(-1)[0]  # (T,)
            assert (moved[:position] == 0).all(), (switches, position)
            assert (moved[position:] > 0).all(), (switches, position)  # and the past is seen


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * T, [9, 1, 4, 1, 1], [T]], ids=["one by one", "pieces", "at once"])
def test_the_cache_agrees_with_the_full_pass(pieces):
    ids = random_ids(2, T)
    for switches in COMBINATIONS:
        model = small_model(**switches).eval()
        cache = model.new_cache(2, T)
        logits = torch.cat([model(piece, cache) for piece in ids.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(logits, model(ids), rtol=1e-4, atol=1e-4, msg=lambda text, s=switches: f"{s}: {text}")
        assert cache.length == T


def test_every_parameter_is_counted_once_and_gets_a_gradient():
    ids = random_ids(2, T + 1)
    for switches in COMBINATIONS:
        model = small_model(**switches)
        model.nll(ids[:, :-1], ids[:, 1:]).mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, (switches, name)
        assert sum(parameter.numel() for parameter in model.parameters()) == account(model.config).unique_parameters, switches
        assert sum(tensor.numel() for tensor in model.state_dict().values()) == account(model.config).unique_parameters  # no aliases
        assert (model.head_weight is model.body.embedding.weight) == model.config.tied_head


@torch.no_grad()
@pytest.mark.parametrize("positions", get_args(Positions))
@pytest.mark.parametrize("norm", get_args(Norm))
def test_random_symbols_cost_no_less_than_chance(positions, norm):
    model = small_model(positions=positions, norm=norm).eval()
    ids = random_ids(256, T + 1)
    bits = model.nll(ids[:, :-1], ids[:, 1:]).double() / math.log(2)
    noise = 3 * bits.std() / bits.numel() ** 0.5
    assert bits.mean() >= math.log2(V) - noise


@torch.no_grad()
@pytest.mark.parametrize("switches", [{}, dict(qk_norm=True), dict(positions="alibi"), dict(norm="layernorm", ffn="gelu"),
                                      dict(embedding_norm=True, residual_scalars=True, value_residual=True, logit_softcap=5.0),
                                      dict(n_layers=4, sharing=SHARED, embedding_rank=8)], ids=str)
def test_bfloat16_stays_causal_and_close(switches):
    model, ids = small_model(**switches).eval(), random_ids(1, T)
    exact = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        logits, changed = model(ids), ids.clone()
        changed[:, 9:] = (changed[:, 9:] + 7) % V
        assert torch.equal(model(changed)[:, :9], logits[:, :9])
        cache = model.new_cache(1, T)
        stepped = torch.cat([model(piece, cache) for piece in ids.split([6, 1, 9], dim=1)], dim=1)
    scale = exact.std().item()
    torch.testing.assert_close(logits.float(), exact, rtol=0, atol=0.2 * scale)
    torch.testing.assert_close(stepped.float(), exact, rtol=0, atol=0.2 * scale)


def test_dropout_acts_on_the_embedding_and_on_both_branches():
    model, ids = small_model(dropout=0.5), random_ids(1, T)
    seen = []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, inputs, output: seen.append((output == 0).float().mean().item()))
    model(ids)
    assert len(seen) == 1 + 2 * model.config.n_layers and all(0.4 < share < 0.6 for share in seen)
    model.vary_dropout().fill_(0)
    assert torch.equal(model(ids), model.eval()(ids))


def test_dropout_acts_within_patches_too():
    patches = PatchConfig("stride", size=4, max_size=4, encoder="patch", encoder_layers=1, decoder="parallel", decoder_layers=2,
                          unpooling="linear", d_local=16, n_heads=2, d_ff=32)
    plain, model = small_model(patches=patches), small_model(patches=patches, dropout=0.5)
    assert sum(isinstance(module, torch.nn.Dropout) for module in model.body.unpooling.modules()) == 2
    assert sum(isinstance(module, torch.nn.Dropout) for module in model.body.grid.modules()) == 1
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.eval()(random_ids(1, T)), plain(random_ids(1, T)))


@torch.no_grad()
@pytest.mark.parametrize("sharing", [dict(ffn="all"), dict(attention="repeat", lora_rank=2, lora_scale=0.5),
                                     dict(ffn="cycle", attention="all", free_ends=1, lora_rank=4, loop_layers=3, loops=3)], ids=str)
def test_what_is_shared_may_as_well_be_written_out(sharing):
    """A model whose layers are all its own, given the shared weights with their corrections, computes the same."""
    model, ids = small_model(n_layers=5, sharing=SharingConfig(**sharing), qk_norm=True), random_ids(2, T)
    layers, sharing = model.body.core.plan, model.config.sharing
    written_out = small_model(n_layers=len(layers), qk_norm=True)
    written_out.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "core." not in name or "core.norm" in name},
                                strict=False)
    for number, layer in enumerate(layers):
        own, block = written_out.body.core, model.body.core.blocks[layer.block]
        own.blocks[number].load_state_dict({k: v for k, v in block.state_dict().items() if "lora" not in k})
        for network, stored, lora in [(own.attentions[number], model.body.core.attentions[layer.attention], block.attention_lora),
                                      (own.ffns[number], model.body.core.ffns[layer.ffn], block.ffn_lora)]:
            network.load_state_dict(stored.state_dict())
            for name, low_rank in (lora or {}).items():
                getattr(network, name).weight += sharing.lora_scale * low_rank.b.weight @ low_rank.a.weight
    if model.body.core.iterations is not None:
        model.body.core.iterations.zero_()  # the model written out knows no passes
    torch.testing.assert_close(model(ids), written_out(ids), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_corrections_are_for_shared_networks_alone_and_begin_without_effect():
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, context=T, n_layers=6, d_model=24, n_heads=6, n_kv_heads=2, d_ff=32)
    model = LanguageModel(ModelConfig(**sizes, sharing=SharingConfig(ffn="all", free_ends=1, lora_rank=4))).eval()
    assert [block.ffn_lora is not None for block in model.body.core.blocks] == [False, True, True, True, True, False]
    assert all(block.attention_lora is None for block in model.body.core.blocks)
    plain = LanguageModel(ModelConfig(**sizes, sharing=SharingConfig(ffn="all", free_ends=1))).eval()
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "lora" not in name})
    assert torch.equal(model(random_ids(2, T)), plain(random_ids(2, T)))


def test_what_is_switched_off_draws_the_same_weights():
    """Scalars and zeros come after all random numbers: a switch changes what it is about, and no other weight."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, context=T, n_layers=3, d_model=24, n_heads=6, n_kv_heads=2, d_ff=32)
    plain = LanguageModel(ModelConfig(**sizes)).state_dict()
    for switch in ("zero_init", "embedding_norm", "residual_scalars", "value_residual"):
        torch.manual_seed(0)
        other = LanguageModel(ModelConfig(**sizes, **{switch: True})).state_dict()
        different = {name for name in other if name not in plain or not torch.equal(other[name], plain[name])}
        assert different and all(other[name].ndim < 2 or not other[name].any() for name in different), switch


@torch.no_grad()
def test_no_logit_exceeds_the_cap_wherever_logits_come_from():
    capped, ids = small_model(logit_softcap=0.5).eval(), random_ids(2, T)
    plain = small_model().eval()  # the same weights
    expected = 0.5 * torch.tanh(plain(ids) / 0.5)
    torch.testing.assert_close(capped(ids), expected)
    assert plain(ids).abs().max() > 0.6
    nats = F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, -1)
    torch.testing.assert_close(capped.nll(ids[:, :-1], ids[:, 1:]), nats)
    scored = token_logprobs(capped, ids.tolist(), [1, 1])
    torch.testing.assert_close(torch.tensor(np.stack(scored)), -nats)
    written = list(steps(capped, ids[0, :4].tolist(), Sampling(max_tokens=4, seed=0), eot_id=-1))
    whole = [*ids[0, :4].tolist(), *(step.symbol for step in written)]
    again = token_logprobs(capped, [whole], [4])[0]
    np.testing.assert_allclose([step.logprob for step in written], again, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patches", [{}, dict(patches=PatchConfig(patcher="gate", d_local=16, n_heads=2, d_ff=24, window=8))], ids=str)
def test_z_loss_is_added_to_what_is_descended_on_and_not_to_the_nats(patches):
    model, ids = small_model(logit_softcap=5.0, **patches), random_ids(2, T + 1)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    loss, nats = model.objective(inputs, targets)
    with_z, same_nats = model.objective(inputs, targets, z_loss=0.1)
    assert torch.equal(nats, same_nats)
    torch.testing.assert_close(with_z - loss, 0.1 * model(inputs).logsumexp(-1).square().mean(), rtol=1e-4, atol=1e-5)
    before = model(inputs).logsumexp(-1).square().mean()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    (with_z - loss).backward()
    optimizer.step()
    assert model(inputs).logsumexp(-1).square().mean() < before


@torch.no_grad()
def test_too_long_an_input_is_one_clear_line():
    model = small_model()
    with pytest.raises(StlmError, match=f"model.context={T}") as caught:
        model(random_ids(1, T + 1))
    assert "\n" not in str(caught.value)
    cache = model.new_cache(1, 2 * T)
    model(random_ids(1, T), cache)
    with pytest.raises(StlmError, match=f"model.context={T}"):
        model(random_ids(1, 1), cache)
    assert cache.length == T  # a refused call leaves the cache as it was


def test_vectors_at_chosen_places_are_those_of_the_whole_and_no_part_of_training():
    model = small_model(layer_drop=0.5)
    at = torch.tensor([0, 3, T - 1, T, T + 5])
    ids = random_ids(2, T)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().hidden(ids, at=at), model.hidden(ids).flatten(0, 1)[at])
    with pytest.raises(StlmError, match="not in training"):
        model.train().hidden(ids, at=at)


def test_the_attention_weights_are_never_stored():
    """Only the flash kernel is allowed, which computes them tile by tile: where it cannot be used, torch raises an error."""
    ids = random_ids(1, T)
    for switches in COMBINATIONS:
        model = small_model(**switches)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            model.nll(ids, ids).mean().backward()
            with torch.no_grad():
                cache = model.new_cache(1, T)
                for piece in ids.split([9, 1, 6], dim=1):
                    model(piece, cache)


@pytest.mark.parametrize("positions", get_args(Positions))
def test_the_model_is_one_graph_for_the_compiler(positions):
    switches = dict(embedding_norm=True, residual_scalars=True, value_residual=True, logit_softcap=5.0)
    model, ids = small_model(positions=positions, qk_norm=True, n_layers=4, sharing=SHARED, **switches), random_ids(2, T)
    torch.compiler.reset()  # each test compiles anew; without this, PyTorch gives up after eight
    compiled = torch.compile(model.nll, fullgraph=True, backend="eager")  # raises where the graph would break
    for on in (False, True):
        model.set_looping(on)
        torch.testing.assert_close(compiled(ids, ids), model.nll(ids, ids))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("switches", [{}, dict(logit_softcap=15.0, tied_head=False)], ids=str)
def test_compiled_pieces_of_a_large_vocabulary_have_the_gradient_of_the_whole(monkeypatch, switches, precision):
    torch.manual_seed(0)
    torch.compiler.reset()
    model = LanguageModel(ModelConfig(vocab_size=1000, context=32, n_layers=1, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, **switches))
    ids = torch.randint(1000, (4, 33))
    targets = ids[:, 1:].where(torch.rand(4, 32) < 0.8, -100)

    def graded(objective, precision):
        model.zero_grad()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss, nats = objective(ids[:, :-1], targets, z_loss=0.01)
        (3 * loss).backward()
        return {"loss": loss.detach(), "nats": nats.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}

    whole = graded(model.objective, torch.float32)
    monkeypatch.setattr(lm, "MOST_LOGITS", 30_000)
    for objective in (model.objective, torch.compile(model.objective)):
        pieces = graded(objective, precision)
        for name, expected in whole.items():
            error = (pieces[name] - expected).norm() / expected.norm()
            assert error < (1e-5 if precision == torch.float32 else 2e-2), name


def test_the_logits_of_a_large_vocabulary_are_never_all_there():
    config = ModelConfig(vocab_size=50_000, context=512, n_layers=1, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)
    logits = 4 * config.vocab_size * 64 * config.context
    memory = training_memory(config, 64, dtype=torch.float32)
    assert memory.peak < logits / 2 and memory.activations < logits / 10
