"""IPQ: which layers a stage takes, options, finetuning, resuming, fairseq's files, two processes."""

import os
import subprocess
import sys
from pathlib import Path

import helpers_ipq
import pytest
import torch
from helpers_ipq import STAGES, TOKENS, finetune, make_model
from torch import nn

import qnkernels as qnk
from qnkernels.matching import resolve
from qnkernels.nn import BlockNoise, NoisyLinear, PQEmbedding, PQLinear
from qnkernels.nn.pq_weight import PQLayer

FAIRSEQ = Path(__file__).parent / "data" / "fairseq_transformer.yaml"
OPTIONS = dict(block_size={"fc": 8, "attn": 4, "*": 2}, n_centroids={"attn": 8, "*": 16}, n_iter=3)


def quantized(model: nn.Module) -> dict[str, PQLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PQLayer)}


def test_stages_take_their_layers_in_order_and_yield_after_each():
    model = make_model()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    ipq = qnk.IPQ(model, STAGES, **OPTIONS)
    assert len(ipq) == 3 and not quantized(model)
    seen = []
    for stage in ipq:
        names = [layer.name for layer in stage.layers]
        seen.append(names)
        assert sorted(quantized(model)) == sorted(name for names in seen for name in names)
        assert (stage.number, stage.total, stage.pattern) == (len(seen), 3, STAGES[len(seen) - 1])
        assert stage.size == qnk.compressed_size(model)
        for layer in stage.layers:
            new = model.get_submodule(layer.name)
            weight = weights.get(
                f"{layer.name}.weight", weights["decoder.embed_tokens.embeddings.0.0.weight"]
            )
            distance = (new.weight - weight).norm().item()
            # the objective is that of fp32 codewords
            assert layer.objective == pytest.approx(distance, rel=2e-3, abs=1e-3)
            assert layer.error == pytest.approx(layer.objective / weight.norm().item(), rel=1e-5)
            assert layer.shape == tuple(new.weight.shape) and layer.type == type(new).__name__
    layers = [f"decoder.layers.{i}" for i in range(2)]
    embeddings = "decoder.embed_tokens.embeddings"
    assert seen[0] == [f"{layer}.fc{i}" for layer in layers for i in (1, 2)]
    # the tied output comes along, though its name is not found by the pattern
    assert seen[1] == [
        f"{embeddings}.0.0", "decoder.output", f"{embeddings}.0.1", f"{embeddings}.1.0", f"{embeddings}.1.1"
    ]  # fmt: skip
    assert len(seen[2]) == 8 and all("self_attn" in name for name in seen[2])
    assert model.decoder.output.codes is model.decoder.embed_tokens.embeddings[0][0].codes
    sizes = {name: (layer.block_size, layer.n_centroids) for name, layer in quantized(model).items()}
    assert sizes["decoder.layers.1.fc2"] == (8, 16) and sizes["decoder.output"] == (2, 16)
    assert sizes["decoder.layers.0.self_attn.q_proj"] == (4, 8)
    assert all(layer.codebook_dtype == torch.float16 for layer in quantized(model).values())
    assert list(ipq) == []


def test_codes_are_those_of_the_config():
    model, other = make_model(), make_model()
    for _ in qnk.IPQ(model, [r"fc"], 4, 8, n_iter=5, seed=3, codebook_grad="sum", codebook_dtype=None):
        pass
    config = qnk.PQConfig(4, 8, n_iter=5, seed=3, codebook_grad="sum")
    qnk.quantize_(other, config, lambda module, name: "fc" in name)
    assert repr(model) == repr(other)
    for (name, tensor), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected), name


def test_size_so_far_is_that_of_the_file(tmp_path):
    model = make_model()
    sizes = [qnk.compressed_size(model)]
    for stage in qnk.IPQ(model, STAGES, **OPTIONS):
        qnk.save_compressed(model, tmp_path / "m")
        assert stage.size < sizes[-1] and 0 < os.path.getsize(tmp_path / "m") - stage.size < 20_000
        sizes.append(stage.size)


def test_finetuning_in_between_is_seen_by_the_next_stage():
    model = qnk.quantize_(make_model(), qnk.ProductNoiseConfig(block_size=4, p=0.2))
    losses = []
    for number, stage in enumerate(qnk.IPQ(model, STAGES, **OPTIONS)):
        noisy = [name for name, layer in model.named_modules() if isinstance(layer, NoisyLinear)]
        expected = {0: 11, 1: 8, 2: 0}[number]
        assert len(noisy) == expected and all(
            isinstance(model.get_submodule(name).noise, BlockNoise) for name in noisy
        )
        books = {name: layer.codebook.detach().clone() for name, layer in quantized(model).items()}
        codes = {name: layer.codes.clone() for name, layer in quantized(model).items()}
        waiting = {
            name: model.get_submodule(name).weight.detach().clone() for name in noisy if "self_attn" in name
        }
        losses += finetune(model)
        for name, layer in quantized(model).items():
            assert not torch.equal(layer.codebook, books[name]) and torch.equal(layer.codes, codes[name])
        for name, weight in waiting.items():
            assert not torch.equal(model.get_submodule(name).weight, weight)
        assert stage.number == number + 1
    assert losses[-1] < losses[0]


def test_a_saved_stage_is_resumed(tmp_path):
    model = make_model()
    for stage in qnk.IPQ(model, STAGES, **OPTIONS):
        finetune(model)
        qnk.save_compressed(model, tmp_path / str(stage.number))
    fresh = make_model(seed=5)
    numbers = []
    for stage in qnk.IPQ(fresh, STAGES, **OPTIONS, resume=tmp_path / "1"):
        numbers.append(stage.number)
        finetune(fresh)
    assert numbers == [2, 3]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], tensor, rtol=1e-3, atol=1e-3)
    noisy = qnk.quantize_(make_model(seed=6), qnk.ProductNoiseConfig(block_size=4))
    next(iter(qnk.IPQ(noisy, STAGES, **OPTIONS, resume=tmp_path / "2")))
    assert not any(isinstance(layer, NoisyLinear) for layer in noisy.modules())


def test_resuming_gives_exactly_what_going_on_gives(tmp_path):
    """Without a codebook that is rounded only where it is used, the file holds all there is."""
    model, fresh = make_model(), make_model(seed=5)
    for stage in qnk.IPQ(model, STAGES, **OPTIONS, codebook_dtype=None):
        if stage.number == 1:
            qnk.save_compressed(model, tmp_path / "1")
        finetune(model)
    ipq = qnk.IPQ(fresh, STAGES, **OPTIONS, codebook_dtype=None, resume=tmp_path / "1")
    finetune(fresh)
    for _ in ipq:
        finetune(fresh)
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_fairseq_configuration_is_read_as_it_is():
    from_file, from_table = make_model(), make_model()
    stages = list(qnk.IPQ.from_fairseq(from_file, FAIRSEQ, n_iter=2))
    assert [len(stage.layers) for stage in stages] == [4, 5, 8]
    sizes = {layer.name: layer.block_size for stage in stages for layer in stage.layers}
    assert sizes["decoder.layers.0.fc1"] == 8 and sizes["decoder.layers.0.self_attn.k_proj"] == 4
    assert sizes["decoder.embed_tokens.embeddings.1.0"] == 8
    assert sizes["decoder.embed_tokens.embeddings.1.1"] == 4
    table = {
        "n_centroids": {
            "Linear": ("in_features", {"*": 16}),
            "Embedding": ("embedding_dim", {8: 4, "*": 16}),
        },
        "block_sizes": {
            "Linear": ("fuzzy_name", {"fc": 8, "attn": 4, "emb": 4}),
            "Embedding": ("fuzzy_name", {"emb": 8}),
        },
        "layers_to_quantize": [r"decoder\.layers\.\d+\.fc[12]", r"embed_tokens\.embeddings\.[01]\.0"],
    }
    stages = list(qnk.IPQ.from_fairseq(from_table, table, n_iter=2))
    assert {layer.name: layer.n_centroids for layer in stages[1].layers} == {
        "decoder.embed_tokens.embeddings.0.0": 16,
        "decoder.output": 16,
        "decoder.embed_tokens.embeddings.1.0": 4,
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "config: expected a table with the key layers_to_quantize"),
        ({"layers_to_quantize": ["fc"], "n_iter": 3}, r"config: expected the keys .*, got \['n_iter'\]"),
        (
            {
                "layers_to_quantize": ["emb"],
                "block_sizes": {"Linear": {"key": "in_features", "value": {"*": 4}}},
            },
            "layer '.*embeddings.0.0': block_size: expected an entry for Embedding layers, got entries",
        ),
        (
            {"layers_to_quantize": ["fc"], "block_sizes": {"Linear": {"key": "in_features"}}},
            "layer '.*fc1': block_size: expected a key and a table of values",
        ),
        (
            {"layers_to_quantize": ["fc"], "block_sizes": {"Linear": {"key": "width", "value": {"*": 4}}}},
            "layer '.*fc1': block_size: expected an attribute of Linear layers or .* as key, got 'width'",
        ),
        (
            {
                "layers_to_quantize": ["fc"],
                "block_sizes": {"Linear": {"key": "in_features", "value": {"7": 4}}},
            },
            r"layer '.*fc1': block_size: expected a value for in_features=16, or '\*', got \['7'\]",
        ),
    ],
)
def test_fairseq_configurations_that_cannot_be(config, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        qnk.IPQ.from_fairseq(model, config)
    assert not quantized(model)


def test_options_by_attribute_of_a_convolution():
    table = {"Conv2d": {"key": "kernel_size", "value": {"(3,3)": 9, "(1, 1)": 4}}}
    assert resolve("block_size", table, "a", nn.Conv2d(4, 4, 3)) == 9
    noisy = qnk.nn.NoisyConv2d(4, 4, 1)
    assert resolve("block_size", table, "a", noisy) == 4
    assert resolve("block_size", 7, "a", noisy) == 7
    # the order in the table decides, and "*" comes last wherever it stands
    assert resolve("block_size", {"*": 1, "attn": 4, "fc": 8}, "attn.fc", noisy) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stages=[]), r"stages: expected a list of regular expressions, got \[\]"),
        (dict(stages="fc"), "stages: expected a list of regular expressions, got 'fc'"),
        (dict(stages=["fc["]), r"stages: expected regular expressions, got 'fc\['"),
        (
            dict(stages=["fc", "nothing"]),
            "stages: expected patterns that each find a layer .*, got 'nothing'",
        ),
        (dict(stages=["fc[12]", "fc1"]), "stages: expected patterns that each find a layer .*, got 'fc1'"),
        (
            dict(stages=["fc"], block_size=5),
            "layer '.*fc1': block_size: expected a divisor of the 16 .*, got 5",
        ),
        (
            dict(stages=["fc"], block_size={"emb": 8}),
            r"layer '.*fc1': block_size: expected a fragment of the name",
        ),
        (
            dict(stages=["fc"], n_centroids=1),
            r"layer '.*fc1': n_centroids: expected an integer in \[2, 65536\]",
        ),
        (dict(stages=["fc"], codebook_grad="max"), "layer '.*fc1': codebook_grad: expected one of"),
    ],
)
def test_refuses_before_anything_is_quantized(options, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        qnk.IPQ(model, **options)
    assert not quantized(model)


def test_refuses_to_untie_a_weight():
    class Product(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

    model = nn.ModuleDict({"emb": nn.Embedding(8, 4)})
    model["out"] = Product(model["emb"].weight)
    with pytest.raises(
        ValueError, match=r"layer 'emb': weight: expected one that only .*, got that of Product 'out'"
    ):
        qnk.IPQ(model, ["emb"], 4)


def test_int8_rounds_codewords_and_activations(tmp_path):
    model = make_model()
    for stage in qnk.IPQ(model, STAGES, **OPTIONS, int8=True):
        finetune(model)
        qnk.save_compressed(model.eval(), tmp_path / str(stage.number))
        model.train()
    for layer in quantized(model).values():
        assert layer.codebook_dtype == torch.int8 and layer.activations
    model.eval()
    loaded = qnk.load_compressed(make_model(seed=8), tmp_path / "3").eval()
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), model(TOKENS))
    plain = make_model()
    list(qnk.IPQ(plain, STAGES, **OPTIONS))
    # a byte less per entry of a codebook, a scale more, and the range of the activations of each layer
    books = {id(layer.codebook): layer.codebook.numel() - 4 for layer in quantized(plain).values()}
    ranges = 16 * len(quantized(plain))
    assert qnk.compressed_size(plain) - qnk.compressed_size(model) == sum(books.values()) - ranges


def test_weights_of_16_bits_keep_their_dtype():
    model = make_model().bfloat16()
    for _ in qnk.IPQ(model, ["fc"], n_centroids=4, n_iter=2):
        pass
    layer = model.decoder.layers[0].fc1
    assert layer.codebook.dtype == torch.bfloat16 and layer.codebook_dtype is None


def test_a_stage_prints_what_it_did():
    torch.manual_seed(1)
    model = nn.ModuleDict({"fc": nn.Linear(8, 4), "emb": nn.Embedding(6, 4)})
    (stage,) = qnk.IPQ(model, ["fc"], 4, 2)
    layer = stage.layers[0]
    assert str(stage) == (
        f"stage 1 of 1, fc: 1 layer, {stage.size / 1e6:.3f} MB so far\n"
        f"  fc (PQLinear, 4 x 8): blocks of 4, 2 centroids, objective {layer.objective:.4g}, "
        f"relative error {layer.error:.4f}"
    )
    assert type(model["fc"]) is PQLinear and type(model["emb"]) is nn.Embedding


def test_hooks_and_references_stay():
    model = make_model()
    embedding, calls = model.decoder.embed_tokens.embeddings[0][0], []
    embedding.register_forward_hook(lambda *_: calls.append(1))
    list(qnk.IPQ(model, STAGES, **OPTIONS))
    model(TOKENS)
    assert type(embedding) is PQEmbedding and calls == [1]


def test_two_processes_end_with_the_codes_of_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([sys.executable, helpers_ipq.__file__, str(rank), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    (stages, first, *_), (_, second, *_) = results
    model = make_model()
    assert [str(stage) for stage in qnk.IPQ(model, STAGES, 8, 16, n_iter=4)] == stages
    for name, tensor in model.state_dict().items():
        assert torch.equal(first[name], tensor), name
        if name.endswith(("codes", "codebook")):
            assert torch.equal(second[name], tensor), name
    layer = helpers_ipq.wide_layer()
    losses = [layer(helpers_ipq.data_of(rank)).square().mean() for rank in range(2)]
    sum(losses).backward()  # twice, averaged over two processes
    for *_, codes, grad in results:
        assert codes.dtype == torch.uint16 and torch.equal(codes, layer.codes)
        torch.testing.assert_close(grad, layer.codebook.grad, rtol=1e-4, atol=1e-6)
