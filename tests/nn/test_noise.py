"""The state of the noise: which forward observes, what eval uses, what is refused."""

import copy
import pickle

import pytest
import torch

from qnkernels import functional
from qnkernels.nn import ActivationNoise, BlockNoise, ScalarNoise


@pytest.mark.parametrize("every", [0, 1, 3])
def test_range_is_refreshed_every_so_many_forwards(every):
    weight = torch.randn(6, 4)
    noise = ScalarNoise(weight, update_every=every)
    last_seen = None
    for forward in range(8):
        weight = weight * 1.5
        noise(weight)
        if forward == 0 or (every and forward % every == 0):
            last_seen = weight
        assert noise.step == forward + 1
        assert torch.equal(noise.low, last_seen.min()) and torch.equal(noise.high, last_seen.max())


@pytest.mark.parametrize("write", [lambda t, value: t.fill_(value), lambda t, value: t.data.fill_(value)])
@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_scale_follows_range_and_bits_and_outlives_a_change(per, write):
    """However they are changed: what is kept from one forward to the next is that of the same values."""
    weight = torch.randn(6, 4)
    noise = ScalarNoise(weight, bits=8, per=per, update_every=0)
    seen = []
    for name, value in ((None, None), (None, None), ("bits", 4), ("low", -7.0), ("high", 9.0), ("bits", 8)):
        if name is not None:
            write(getattr(noise, name), value)
        found = noise.quantizer(weight)
        expected = functional.quantization_parameters(noise.low, noise.high, noise.bits)
        assert torch.equal(found["scale"], expected[0]) and torch.equal(found["zero_point"], expected[1])
        assert found["bits"] == noise.bits
        seen.append((found, [found[key].clone() for key in ("scale", "zero_point", "bits")]))
    for found, values in seen:
        for key, value in zip(("scale", "zero_point", "bits"), values, strict=True):
            assert torch.equal(found[key], value)


def test_a_forward_that_refreshes_nothing_refuses_what_others_refuse():
    noise = ActivationNoise(p=0.0)
    y = torch.randn(4, 8)
    noise(y)
    for wrong, error in ((y.double(), TypeError), (y.to("meta"), ValueError), (y.int(), TypeError)):
        with pytest.raises(error):
            noise(wrong)
    assert noise.step == 1


@pytest.mark.parametrize("training", [True, False])
def test_inference_mode_leaves_nothing_that_training_cannot_use(training):
    weight = torch.nn.Parameter(torch.randn(8, 16))
    noise = ScalarNoise(weight, bits=4).train(training)
    with torch.inference_mode():
        noise(weight)
    noise(weight).sum().backward()
    assert weight.grad is not None


def test_what_is_kept_is_not_pickled_and_tracers_see_the_ops():
    weight = torch.randn(8, 16)
    noise = ScalarNoise(weight, bits=4)
    for _ in range(2):
        noise(weight)
    assert noise._kept is not None
    torch.manual_seed(1)
    expected = noise(weight)
    for copied in (pickle.loads(pickle.dumps(noise)), copy.deepcopy(noise)):
        assert copied._kept is None
        torch.manual_seed(1)
        assert torch.equal(copied(weight), expected) and copied.step == noise.step + 1
    counted = noise.step.clone()
    traced = torch.fx.symbolic_trace(noise.eval(), concrete_args={"dtype": None})
    assert torch.equal(traced(weight), noise(weight)) and noise.step == counted


def test_ema_moves_by_the_momentum_and_eval_uses_it():
    first, second = torch.randn(5, 8), torch.randn(5, 8) * 3
    noise = ScalarNoise(first, bits=4, observer="ema_minmax", per="channel", update_every=1, momentum=0.25)
    noise(first)
    noise(second)
    low = first.amin(1) + (second.amin(1) - first.amin(1)) * 0.25
    high = first.amax(1) + (second.amax(1) - first.amax(1)) * 0.25
    torch.testing.assert_close(noise.low, low)
    torch.testing.assert_close(noise.high, high)
    noise.eval()
    scale, zero_point = functional.quantization_parameters(noise.low, noise.high, 4)
    expected = functional.fake_quantize(second, scale, zero_point, 4, axis=0)
    assert torch.equal(noise(second), expected)


@pytest.mark.parametrize("observer", ["minmax", "ema_minmax", "histogram"])
def test_eval_changes_no_state_and_observes_for_itself_before_training(observer):
    weight = torch.randn(7, 6)
    noise = ScalarNoise(weight, bits=3, observer=observer).eval()
    find = functional.minmax if observer != "histogram" else lambda x: functional.histogram_range(x, 3)
    for w in (weight, weight * 2):
        scale, zero_point = functional.quantization_parameters(*find(w), 3)
        assert torch.equal(noise(w), functional.fake_quantize(w, scale, zero_point, 3))
    assert noise.step == 0 and noise.low == 0 and noise.high == 0


def test_state_is_not_saved():
    assert not ScalarNoise(torch.ones(2, 2)).state_dict() and not ActivationNoise().state_dict()


def test_same_seed_same_noise():
    weight = torch.randn(9, 16)
    for noise in (ScalarNoise(weight, bits=2), BlockNoise(weight, block_size=4, p=0.5)):
        torch.manual_seed(3)
        first, second = noise(weight), noise(weight)
        torch.manual_seed(3)
        assert torch.equal(noise(weight), first)
        assert not torch.equal(first, second)


def test_activations_in_training_are_observed_and_noised_at_their_own_rate():
    torch.manual_seed(0)
    y = torch.randn(64, 64)
    observed = ActivationNoise(bits=2)
    assert observed(y) is y
    assert torch.equal(observed.low, y.min()) and torch.equal(observed.high, y.max()) and observed.step == 1
    noised = ActivationNoise(bits=2, p=0.25)(y)
    assert (noised != y).double().mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 4096) ** 0.5)


def test_activations_in_eval_use_the_range_that_training_observed():
    y = torch.randn(5, 7)
    noise = ActivationNoise(bits=4)
    noise(y)
    noise.eval()
    scale, zero_point = functional.quantization_parameters(y.min(), y.max(), 4)
    wider = y * 10
    assert torch.equal(noise(wider), functional.fake_quantize(wider, scale, zero_point, 4))
    assert noise(wider).max() <= y.max() * 1.2 and noise.step == 1
    fresh = ActivationNoise(bits=4).eval()
    scale, zero_point = functional.quantization_parameters(wider.min(), wider.max(), 4)
    assert torch.equal(fresh(wider), functional.fake_quantize(wider, scale, zero_point, 4))
    assert fresh.step == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, r"bits: expected an integer in \[2, 16\], got 1"),
        ({"bits": 17}, r"bits: expected an integer in \[2, 16\], got 17"),
        ({"bits": 8.0}, r"bits: expected an integer in \[2, 16\], got 8.0"),
        ({"p": 1.5}, r"p: expected a rate in \[0, 1\], got 1.5"),
        ({"p": float("nan")}, r"p: expected a rate in \[0, 1\], got nan"),
        ({"observer": "mean"}, "observer: expected one of .*, got 'mean'"),
        ({"per": "row"}, "per: expected one of .*, got 'row'"),
        ({"per": "group"}, "group_size: expected an integer of at least 1, got None"),
        (
            {"per": "group", "group_size": 5},
            "group_size: expected a divisor of the 8 weights of a row, got 5",
        ),
        ({"group_size": 4}, "group_size: expected None with per='tensor', got 4"),
        ({"update_every": -1}, "update_every: expected an integer of at least 0, got -1"),
        ({"momentum": 0.0}, r"momentum: expected a rate in \(0, 1\], got 0.0"),
    ],
)
def test_scalar_noise_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ScalarNoise(torch.ones(4, 8), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size: expected an integer of at least 1, got 0"),
        ({"block_size": 3}, "block_size: expected a divisor of the 8 weights of a row, got 3"),
        ({"p": -0.1}, r"p: expected a rate in \[0, 1\], got -0.1"),
        ({"kind": "max"}, "kind: expected one of .*, got 'max'"),
    ],
)
def test_block_noise_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        BlockNoise(torch.ones(4, 8), **options)
