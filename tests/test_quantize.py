"""quantize_ and remove_noise_: what is turned, what stays, and that nothing is left half done."""

import copy

import pytest
import torch
from torch import nn

import qnkernels as qnk
from qnkernels.nn import (
    Int4Linear,
    Int8Linear,
    IntConv2d,
    IntEmbedding,
    NoisyConv2d,
    NoisyEmbedding,
    NoisyLinear,
)

NOISES = [qnk.ScalarNoiseConfig(bits=4, activations=True), qnk.ProductNoiseConfig(block_size=4)]


class Model(nn.Module):
    """A little of everything, with tied embeddings and a module that is reached by two names."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.conv = nn.Conv2d(1, 4, 2)
        self.norm = nn.LayerNorm(16)
        self.body = nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 16, bias=False))
        self.again = self.body[0]
        self.head = nn.Linear(16, 12, bias=False)
        self.register_buffer("count", torch.arange(3))
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = x + self.conv(torch.nn.functional.pad(x[:, None], (0, 1, 0, 1))).mean(1)
        return self.head(x + self.body(self.norm(x)))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 12, (2, 6))


@pytest.mark.parametrize("config", NOISES, ids=["scalar", "product"])
def test_noise_is_added_and_removed_in_place(config, tokens):
    torch.manual_seed(0)
    model = Model().eval()
    before = {name: type(module) for name, module in model.named_modules()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    plain = model(tokens)
    model.body[0].weight.requires_grad_(False)
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))

    assert qnk.quantize_(model, config) is model
    assert type(model.embedding) is NoisyEmbedding and type(model.conv) is NoisyConv2d
    assert type(model.body[0]) is NoisyLinear and model.again is model.body[0]
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert list(model.state_dict()) == list(state)
    assert model.head.weight is model.embedding.weight and not model.body[0].weight.requires_grad
    assert not any(module.training for module in model.modules())
    model.train()(tokens).sum().backward()
    assert model.body[0].weight.grad is None and model.head.weight.grad is not None and calls == [1]
    model.load_state_dict(state)

    assert qnk.remove_noise_(model.eval()) is model
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert torch.equal(model(tokens), plain)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters


def test_noise_is_replaced_by_a_second_call(tokens):
    model = Model()
    for _ in range(2):
        qnk.quantize_(model, qnk.ScalarNoiseConfig(bits=3, activations=True))
    names = [name for name, _ in model.named_modules()]
    assert sum(name.endswith("noise") for name in names) == 10  # five layers, weights and activations
    qnk.quantize_(model, qnk.ProductNoiseConfig(block_size=2, p=0.25))
    assert model.head.noise.block_size == 2 and model.head.activation_noise is None
    assert type(model.head) is NoisyLinear
    qnk.remove_noise_(qnk.remove_noise_(model))
    assert type(model.head) is nn.Linear


def test_filter_and_exact_types():
    class MyLinear(nn.Linear):
        pass

    model = nn.ModuleDict(
        {"a": nn.Linear(4, 4), "b": MyLinear(4, 4), "c": nn.Linear(4, 4), "d": nn.LSTM(4, 4)}
    )
    seen = []

    def only_a(module: nn.Module, name: str) -> bool:
        seen.append((name, module))
        return name == "a"

    qnk.quantize_(model, qnk.ScalarNoiseConfig(), only_a)
    assert seen == [("a", model["a"]), ("c", model["c"])]
    assert [type(module) for module in model.values()] == [NoisyLinear, MyLinear, nn.Linear, nn.LSTM]
    with pytest.warns(UserWarning, match="Int8WeightOnlyConfig found no layer to turn in ModuleDict"):
        qnk.quantize_(model, qnk.Int8WeightOnlyConfig(), lambda module, name: False)


def test_root_module():
    linear = nn.Linear(4, 4)
    assert qnk.quantize_(linear, qnk.ScalarNoiseConfig()) is linear and type(linear) is NoisyLinear
    assert qnk.quantize_(linear, qnk.Int8WeightOnlyConfig()) is linear and type(linear) is Int8Linear
    assert linear(torch.ones(1, 4)).shape == (1, 4)


@pytest.mark.parametrize(
    ("config", "kind"),
    [(qnk.Int8WeightOnlyConfig(), Int8Linear), (qnk.Int4WeightOnlyConfig(group_size=4), Int4Linear)],
    ids=["int8", "int4"],
)
@pytest.mark.parametrize("noisy", [False, True])
def test_weights_are_packed_in_place(config, kind, noisy, tokens):
    torch.manual_seed(1)
    model = Model().eval()
    references = [model.embedding, model.body[0], model.head]
    bias, calls = model.body[0].bias, []
    model.body[0].register_forward_hook(lambda *_: calls.append(1))
    model.body[0].note = "kept"
    model.embedding.register_parameter("bias", nn.Parameter(torch.ones(2)))
    model.head.noise_meter = nn.Identity()
    if noisy:
        qnk.quantize_(model, qnk.ScalarNoiseConfig())
    weights = {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if hasattr(module, "weight")
    }
    assert qnk.quantize_(model, config) is model
    assert references == [model.embedding, model.body[0], model.head] and model.again is model.body[0]
    assert [type(module) for module in references] == [IntEmbedding, kind, kind]
    assert model.body[0].bias is bias and model.body[0].note == "kept" and not model.head.training
    assert list(dict(model.embedding.named_parameters())) == ["bias"]
    assert list(dict(model.head.named_children())) == ["noise_meter"]
    assert "weight" not in dict(model.body[0].named_parameters()) and not list(model.body[0].children())
    step = model.body[0].scale.max()
    assert (model.body[0].weight - weights["body.0"]).abs().max() <= step
    assert model(tokens).isfinite().all() and calls == [1]
    assert type(model.conv) is IntConv2d
    assert (model.conv.weight - weights["conv"]).abs().max() <= model.conv.scale.max()


def test_export_of_per_tensor_noise_computes_what_noise_does_in_eval(tokens):
    torch.manual_seed(2)
    model = Model()
    qnk.quantize_(model, qnk.ScalarNoiseConfig(bits=4))
    model.train()(tokens)
    noisy = model.eval()(tokens)
    qnk.quantize_(model, qnk.Int4WeightOnlyConfig(group_size=None, per="tensor"))
    torch.testing.assert_close(model(tokens), noisy, rtol=1e-5, atol=1e-5)


def test_tied_weights_share_their_codes_even_after_moves_and_copies(tokens):
    model = qnk.quantize_(Model(), qnk.Int8WeightOnlyConfig())
    for turned in (model, model.bfloat16(), copy.deepcopy(model)):
        for name in ("weight_packed", "scale", "zero_point"):
            assert getattr(turned.head, name) is getattr(turned.embedding, name)
    untied = qnk.quantize_(Model(tied=False), qnk.Int8WeightOnlyConfig())
    assert untied.head.weight_packed is not untied.embedding.weight_packed


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            qnk.ProductNoiseConfig(block_size=5),
            r"layer 'embedding': block_size: expected a divisor of the 16 .*, got 5",
        ),
        (
            qnk.ProductNoiseConfig(block_size=16),
            r"layer 'conv': block_size: expected a divisor of the 4 .*, got 16",
        ),
        (
            qnk.ScalarNoiseConfig(per="group", group_size=8),
            r"layer 'conv': group_size: expected a divisor of the 4",
        ),
        (
            qnk.Int8WeightOnlyConfig(group_size=16),
            r"layer 'conv': group_size: expected a divisor of the 4 .*, got 16",
        ),
        (
            qnk.Int4WeightOnlyConfig(),
            r"layer 'embedding': group_size: expected a divisor of the 16 columns .*, got 128",
        ),
    ],
)
def test_nothing_is_changed_when_one_layer_cannot_be(config, message):
    model = Model()
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        qnk.quantize_(model, config)
    assert [type(module) for module in model.modules()] == types


@pytest.mark.parametrize("config", [*NOISES, qnk.Int8WeightOnlyConfig()])
def test_bad_weights_name_the_layer(config):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 1] = float("nan")
    with pytest.raises(
        ValueError, match="layer '1': weight: expected finite values, got 1 of 16 NaN or infinite"
    ):
        qnk.quantize_(model, config)
    model[1] = nn.Linear(4, 0)
    with pytest.raises(ValueError, match="layer '1': weight: expected at least one element"):
        qnk.quantize_(model, config)
    model[1] = nn.Linear(4, 4).double()
    with pytest.raises(
        TypeError, match=r"layer '1': weight: expected float32, bfloat16 or float16, got torch.float64"
    ):
        qnk.quantize_(model, config)
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="the model itself: weight: expected at least one element"):
        qnk.quantize_(nn.Linear(4, 0), config)


def test_weight_computed_by_a_hook_cannot_be_packed():
    layer = nn.Linear(4, 4)
    del layer.weight
    layer.weight = torch.ones(4, 4)
    with pytest.raises(
        ValueError, match="weight: expected a parameter of the layer, got a tensor computed by a hook"
    ):
        qnk.quantize_(layer, qnk.Int8WeightOnlyConfig())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: qnk.ScalarNoiseConfig(bits=1), "bits: expected an integer"),
        (lambda: qnk.ScalarNoiseConfig(p=2.0), "p: expected a rate"),
        (lambda: qnk.ScalarNoiseConfig(p_activations=-1.0), "p_activations: expected a rate"),
        (lambda: qnk.ScalarNoiseConfig(group_size=8), "group_size: expected None with per='tensor', got 8"),
        (lambda: qnk.ProductNoiseConfig(kind="median"), "kind: expected one of"),
        (lambda: qnk.ProductNoiseConfig(block_size=2.0), "block_size: expected an integer"),
        (lambda: qnk.Int8WeightOnlyConfig(observer="max"), "observer: expected one of"),
        (
            lambda: qnk.Int4WeightOnlyConfig(per="tensor"),
            "group_size: expected None with per='tensor', got 128",
        ),
    ],
)
def test_configs_check_their_fields(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_config_of_another_type():
    with pytest.raises(
        TypeError, match="config: expected one of the config classes of qnkernels, got 'int8'"
    ):
        qnk.quantize_(nn.Linear(2, 2), "int8")


def test_fused_encoder_does_not_bypass_the_layers():
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=mask)
        qnk.quantize_(model, qnk.ScalarNoiseConfig(bits=2))
        noisy = model(x, src_key_padding_mask=mask)
        slow = copy.deepcopy(model)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            expected = slow(x, src_key_padding_mask=mask)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        keep = ~mask
        torch.testing.assert_close(noisy[keep], expected[keep])
        assert (noisy - plain)[keep].abs().max() > 0.1
        qnk.remove_noise_(model)
        torch.testing.assert_close(model(x, src_key_padding_mask=mask), plain, rtol=0, atol=0)
