"""The demo's model and trainer."""

import math
import time

import pytest
import torch
from torch import nn

import qnkernels as qnk
from qnkernels.recipes.training import Trainer, interleaved_seconds, perplexity, windows
from qnkernels.recipes.transformer import Cache, LanguageModel, Shape, causal_attention, generate

SHAPE = Shape(vocabulary=61, width=24, layers=2, heads=3, context=17)


def build(seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(SHAPE)


def some_tokens(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, SHAPE.vocabulary, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_attention_is_that_of_torch(tokens: int) -> None:
    q, k, v = torch.randn(3, 2, 3, tokens, 8, dtype=torch.float64).unbind()
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(causal_attention(q, k, v), expected, rtol=1e-12, atol=1e-12)


def test_logits_depend_on_the_past_only() -> None:
    model, tokens = build(), some_tokens(17)[None]
    changed = tokens.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % SHAPE.vocabulary
    torch.testing.assert_close(model(tokens)[:, :9], model(changed)[:, :9])
    assert not torch.allclose(model(tokens)[:, 9:], model(changed)[:, 9:])


def test_positions_matter() -> None:
    model = build()
    tokens = torch.tensor([[3, 5, 5, 7], [5, 3, 5, 7]])
    assert not torch.allclose(*model(tokens)[:, -1])


@pytest.mark.parametrize("split", [(17,), (16, 1), (1,) * 17, (5, 7, 5)])
def test_cache_gives_the_logits_of_the_whole_text(split: tuple[int, ...]) -> None:
    model, tokens = build(), torch.stack((some_tokens(17, 1), some_tokens(17, 2)))
    cache = Cache.empty(SHAPE, 2, tokens.device, torch.float32)
    with torch.no_grad():
        parts = [model(part, cache) for part in tokens.split(split, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-4, atol=1e-5)


def test_generate_is_greedy() -> None:
    model, text = build(), some_tokens(6)[None]
    generated = generate(model, text, 9)
    for _ in range(9):
        text = torch.cat((text, model(text)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generated, text[:, 6:])


def test_too_long_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens: expected at most 17 with the cached ones, got 18"):
        build()(some_tokens(18)[None])


def test_head_is_the_embedding() -> None:
    model = build()
    assert model.head.weight is model.embedding.weight
    assert sum(p.dim() > 1 for p in model.parameters()) == 1 + 4 * SHAPE.layers


def train(seed: int, p: float | None) -> tuple[LanguageModel, list[float], torch.Tensor]:
    model = build(seed)
    if p is not None:
        qnk.quantize_(model, qnk.ScalarNoiseConfig(bits=4, p=p))
    trainer = Trainer(model, some_tokens(300), batch=4, steps=6, rate=1e-2, seed=seed)
    losses: list[float] = []
    trainer.run(lambda _, loss: losses.append(loss))
    return model, losses, trainer.starts


@pytest.mark.parametrize("p", [None, 0.5, 1.0])
def test_a_seed_gives_the_same_training(p: float | None) -> None:
    model, losses, starts = train(5, p)
    again, losses_again, starts_again = train(5, p)
    assert losses == losses_again and torch.equal(starts, starts_again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert train(6, p)[1] != losses


def test_all_methods_see_the_same_windows_and_initial_weights() -> None:
    plain, qat = train(5, None), train(5, 1.0)
    assert torch.equal(plain[2], qat[2])
    assert plain[1] != qat[1]
    assert abs(plain[1][0] - qat[1][0]) < 0.05  # the first loss differs by the noise alone


def test_training_learns_a_repeating_text() -> None:
    tokens = some_tokens(7).repeat(60)
    trainer = Trainer(build(), tokens, batch=8, steps=60, rate=1e-2, seed=0)
    losses: list[float] = []
    trainer.run(lambda _, loss: losses.append(loss))
    assert losses[0] > 3.5 and losses[-1] < 0.6
    assert perplexity(trainer.model, tokens, limit=200, batch=3) < 2


def test_the_schedule_warms_up_and_decays() -> None:
    trainer = Trainer(build(), some_tokens(100), batch=1, steps=100, rate=1.0, seed=0)
    rates = []
    for trainer.step in range(100):
        rates.append(trainer.scheduled_rate())
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.02 + 0.98 / 2, abs=1e-9) and rates[99] < 0.03


def test_a_diverging_training_stops() -> None:
    model = build()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    trainer = Trainer(model, some_tokens(100), batch=1, steps=3, rate=1.0, seed=0)
    with pytest.raises(FloatingPointError, match="loss: expected a finite number at step 1, got nan"):
        trainer.run(lambda *_: None)


@pytest.mark.parametrize("limit", [10, 34, 1000])
def test_perplexity_is_exp_of_the_mean_loss(limit: int) -> None:
    model, tokens = build().double(), some_tokens(90)
    model.cos, model.sin = model.cos.double(), model.sin.double()
    count = max(1, min(limit, 89) // 17)
    starts = torch.linspace(0, 90 - 18, count).long()
    batch = torch.stack([tokens[start : start + 18] for start in starts])
    loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    assert perplexity(model, tokens, limit, batch=2) == pytest.approx(math.exp(loss.item()), rel=1e-6)


def test_windows() -> None:
    tokens = torch.arange(20, dtype=torch.int32)
    expected = torch.tensor([[0, 1, 2], [17, 18, 19]])
    assert torch.equal(windows(tokens, torch.tensor([0, 17]), 3), expected)


def test_interleaved_seconds_runs_jobs_in_turns() -> None:
    order: list[str] = []

    def job(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    jobs = {"slow": lambda: job("slow", 0.02), "fast": lambda: job("fast", 0.0)}
    seconds = interleaved_seconds(jobs, 0.0, torch.device("cpu"))
    assert order == ["slow", "fast"] * 6  # one round to warm up, and five
    assert seconds["slow"] >= 0.02 > seconds["fast"]
    interleaved_seconds(jobs, 0.3, torch.device("cpu"))
    assert len(order) > 12 + 12
