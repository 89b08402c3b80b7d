"""calibrate: exact ranges by each observer, which layers are seen, and that a model is left as it was."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import qnkernels as qnk
from qnkernels import functional as F
from qnkernels.observers import BINS, Histogram, Percentile

BATCHES = ([[-1.0, 3.0], [0.5, 0.25]], [[2.0, -5.0]])


def identity(columns: int = 2) -> nn.Linear:
    return nn.Linear(columns, 1)


def range_of(layer: nn.Module) -> tuple[float, float]:
    return layer.input_range.low, layer.input_range.high


def calibrated(batches, layer: nn.Module | None = None, **options) -> tuple[float, float]:
    layer = layer or identity()
    with qnk.calibrate(layer, **options):
        for batch in batches:
            layer(torch.as_tensor(batch))
    return range_of(layer)


def test_minmax_is_over_everything_seen():
    assert calibrated(BATCHES, observer="minmax") == (-5.0, 3.0)


def test_ema_minmax_moves_with_each_call():
    assert calibrated(BATCHES, observer="ema_minmax", momentum=0.25) == (-2.0, 2.75)
    assert calibrated(BATCHES, momentum=1.0) == (-5.0, 2.0)
    low, high = calibrated([*BATCHES, [[1.0, 0.0]]])  # the defaults
    assert low == pytest.approx(-1.4 * 0.9) and high == pytest.approx(2.9 * 0.9 + 0.1)


def test_percentile_is_the_edge_of_its_bin():
    """Magnitudes below 16 in bins of 1/256: 90 of them 0.5, in bin 128, and 10 of them 8."""
    values = torch.tensor([0.5, -0.5] * 45 + [8.0] * 10).reshape(-1, 2)
    batches = values[torch.randperm(50)].split(7)
    assert calibrated(batches, observer="percentile", percentile=90) == (-0.5, 129 / 256)
    assert calibrated(batches, observer="percentile", percentile=90.1) == (-0.5, 8.0)
    assert calibrated([-x for x in batches], observer="percentile", percentile=90) == (-129 / 256, 0.5)
    assert calibrated(batches, observer="percentile", percentile=100.0) == (-0.5, 8.0)
    assert calibrated([torch.zeros(3, 2)], observer="percentile") == (0.0, 0.0)


def test_percentile_of_many_values():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 200, generator=generator) * 3
    low, high = calibrated(x.split(60), identity(200), observer="percentile", percentile=99.0)
    exact = np.quantile(x.abs().numpy(), 0.99, method="inverted_cdf")
    assert low == -high and exact <= high <= exact + 16 / BINS


def test_histograms_grow_by_powers_of_two_and_keep_every_count():
    """Batch by batch from denormal numbers to the largest fp32: the same counts as of all at once."""
    generator = torch.Generator().manual_seed(1)
    exponents = [-149, -130, -101, -100, -99, -12, 0, 1, 5, 4, 30, 127]
    batches = [torch.randn(40, generator=generator) * 0.3 * 2.0**exponent for exponent in exponents]
    for count in range(1, len(batches) + 1):
        grown, whole = Histogram(), Histogram()
        for batch in batches[:count]:
            grown.observe(batch)
        whole.observe(torch.cat(batches[:count]))
        assert torch.equal(grown.counts, whole.counts) and grown.width == whole.width
        assert int(grown.counts.sum()) == 40 * count
        assert BINS * grown.width > torch.cat(batches[:count]).abs().max()
    x = torch.cat(batches).double().numpy()
    for sign, values in enumerate((x[x >= 0], -x[x < 0])):
        expected, _ = np.histogram(values, BINS, (0, BINS * grown.width))
        np.testing.assert_array_equal(grown.counts[sign].numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_histogram_has_the_least_error_of_all_shrunk_ranges(dtype):
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(64, 300, generator=generator) ** 3).to(dtype)
    layer = nn.Linear(300, 1, dtype=dtype)
    low, high = calibrated(x.split(5), layer, observer="histogram")

    def error(low: float, high: float) -> float:
        scale, zero_point = F.quantization_parameters(torch.tensor(low), torch.tensor(high), 8)
        rounded = F.fake_quantize(x.float(), scale, zero_point, 8)
        return (rounded.double() - x.double()).square().sum().item()

    extremes = x.min().item(), x.max().item()
    assert extremes[0] < low < 0 < high < extremes[1]
    best = min(error(extremes[0] * k / 64, extremes[1] * k / 64) for k in range(1, 65))
    assert error(low, high) <= 1.01 * best
    assert error(low, high) <= 1.01 * error(*(end.item() for end in F.histogram_range(x)))


def test_histogram_of_data_that_one_range_fits():
    assert calibrated([[[0.0, 1.0]], [[1.0, 0.0]]], observer="histogram") == (0.0, 1.0)
    assert calibrated([torch.zeros(3, 2)], observer="histogram") == (0.0, 0.0)
    assert calibrated([[[-2.0, -2.0]]], observer="histogram") == (-2.0, 0.0)


class Model(nn.Module):
    """Layers called once, several times, by keyword, with no data, and never."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.shared = nn.Linear(8, 8)
        self.keyword = nn.Linear(8, 8)
        self.empty = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        x = x + self.conv(x[:, None]).mean(1)
        x = self.shared(self.shared(x))
        self.empty(x[:0])
        return self.keyword(input=torch.relu(x))


TOKENS = torch.arange(9).reshape(3, 3)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(3)
    return Model().eval()


@pytest.mark.parametrize("noisy", [False, True])
def test_every_layer_is_seen_and_the_model_stays_as_it_is(model, noisy):
    if noisy:
        qnk.quantize_(model, qnk.ScalarNoiseConfig())
    state, inputs = copy.deepcopy(model.state_dict()), []
    expected = model(TOKENS)
    spies = [
        layer.register_forward_pre_hook(lambda layer, args: inputs.append((layer, args[0].detach())))
        for layer in (model.conv, model.shared)
    ]
    with qnk.calibrate(model, observer="minmax") as nothing:
        assert torch.equal(model(TOKENS), expected) and nothing is None
    for spy in spies:
        spy.remove()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    for layer, calls in ((model.conv, 1), (model.shared, 2)):
        seen = [x for which, x in inputs if which is layer]
        assert len(seen) == calls
        assert range_of(layer) == (min(x.min() for x in seen), max(x.max() for x in seen))
    assert model.keyword.input_range.low == 0.0
    for layer in (model.table, model.empty, model.unused):
        assert not hasattr(layer, "input_range")
    assert copy.deepcopy(model).shared.input_range == model.shared.input_range


def test_a_second_calibration_starts_anew(model):
    with qnk.calibrate(model, observer="minmax"):
        model(TOKENS)
        model.unused(torch.full((1, 8), 100.0))
    with qnk.calibrate(model, "minmax", filter_fn=lambda module, name: name != "shared"):
        model.keyword(torch.full((1, 8), 2.0))
    assert range_of(model.keyword) == (2.0, 2.0)
    assert not hasattr(model.unused, "input_range") and not hasattr(model.conv, "input_range")
    assert hasattr(model.shared, "input_range")  # not among the layers of the second


def test_filter_fn_sees_layers_and_names(model):
    class Other(nn.Linear):
        pass

    model.other, seen = Other(8, 8), []
    with qnk.calibrate(model, filter_fn=lambda module, name: seen.append((name, module)) or name == "conv"):
        pass
    assert seen == [(n, getattr(model, n)) for n in ("conv", "shared", "keyword", "empty", "unused")]


def test_two_at_once_for_different_layers_only(model):
    convs = qnk.calibrate(model, "minmax", filter_fn=lambda module, name: name == "conv")
    others = qnk.calibrate(model, "percentile", filter_fn=lambda module, name: name != "conv")
    with convs, others:
        model(TOKENS)
        message = "layer 'conv': model: expected layers that no other calibration observes, got one that is"
        with pytest.raises(ValueError, match=message), qnk.calibrate(model):
            pass
    assert hasattr(model.conv, "input_range") and hasattr(model.shared, "input_range")


def test_an_exception_leaves_no_hook_and_no_range(model):
    with qnk.calibrate(model):
        model(TOKENS)
    with pytest.raises(KeyError), qnk.calibrate(model):
        model(TOKENS)
        raise KeyError("data")
    assert not any(layer._forward_pre_hooks or hasattr(layer, "input_range") for layer in model.modules())


@pytest.mark.parametrize("observer", ["minmax", "ema_minmax", "percentile", "histogram"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_input_that_is_not_finite_names_the_layer(model, observer, value):
    def run() -> None:
        model(TOKENS)
        with torch.no_grad():
            model.table.weight[4, 2] = value
        model(TOKENS)

    message = "layer 'conv': input: expected finite values, got 1 of 72 NaN or infinite"
    with pytest.raises(ValueError, match=message), qnk.calibrate(model, observer):
        run()
    assert not model.conv._forward_pre_hooks and not hasattr(model.shared, "input_range")


def test_what_autocast_makes_of_the_input_is_observed():
    layer = identity()
    with torch.autocast("cpu", torch.bfloat16):
        assert calibrated([[[-1.001, 2.003]]], layer, observer="minmax") == (-1.0, 2.0)


def test_training_goes_on_while_it_is_observed():
    layer, x = identity(), torch.randn(5, 2, requires_grad=True)
    with qnk.calibrate(layer, observer="histogram"):
        layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None


def test_fused_encoder_shows_its_layers():
    torch.manual_seed(4)
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(block, 2).eval()
    x, mask = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        fused = model(x, src_key_padding_mask=mask)
        with qnk.calibrate(model):
            observed = model(x, src_key_padding_mask=mask)
        assert torch.equal(model(x, src_key_padding_mask=mask), fused)
    torch.testing.assert_close(observed[~mask], fused[~mask])
    for layer in model.layers:
        assert hasattr(layer.linear1, "input_range") and layer.linear2.input_range.low == 0.0


@pytest.mark.parametrize(
    ("options", "message", "error"),
    [
        ({"observer": "mean"}, "observer: expected one of .*, got 'mean'", ValueError),
        ({"momentum": 0.0}, r"momentum: expected a rate in \(0, 1\], got 0.0", ValueError),
        ({"momentum": "fast"}, "momentum: expected a number, got 'fast'", TypeError),
        ({"percentile": 0}, r"percentile: expected a number in \(0, 100\], got 0", ValueError),
        ({"percentile": 100.1}, r"percentile: expected a number in \(0, 100\], got 100.1", ValueError),
        ({"percentile": True}, "percentile: expected a number, got True", TypeError),
    ],
)
def test_options(options, message, error):
    with pytest.raises(error, match=message), qnk.calibrate(identity(), **options):
        pass


def test_a_model_without_layers_warns():
    message = "calibrate found no layer to observe in ReLU"
    with pytest.warns(UserWarning, match=message), qnk.calibrate(nn.ReLU()):
        pass


def test_percentile_ranks_are_exact():
    """99.99 of 10,000 values is the 9,999th, whatever 99.99 is in binary."""
    observer = Percentile(99.99)
    x = torch.zeros(10_000)
    x[-1] = 1.0
    observer.observe(x)
    assert observer.range() == (0.0, 2 / BINS)
