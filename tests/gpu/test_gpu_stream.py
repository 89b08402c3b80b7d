"""How the ops behave on a device: graphs, streams, no waiting, the right device, torch.compile."""

import pytest
import torch

import qnkernels as qnk
from qnkernels import functional as F

pytestmark = pytest.mark.needs_cuda


def weight_and_range(device, shape=(515, 264)):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    return x, torch.tensor(0.02, device=device), torch.tensor(128.0, device=device)


def reference(x, s, z, p, seed):
    with qnk.backend("reference"):
        return F.fake_quantize(x.cpu(), s.cpu(), z.cpu(), 8, p=p, seed=int(seed))


@pytest.mark.of("fake_quantize")
def test_a_replayed_graph_draws_fresh_noise(device, backend):
    x, s, z = weight_and_range(device)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with qnk.backend(backend), torch.cuda.stream(stream):
        for _ in range(3):  # compiles and warms up outside the capture
            F.fake_quantize(x, s, z, 8, p=0.5, seed=torch.randint(0, 2**62, (), device=device))
        with torch.cuda.graph(graph, stream=stream):
            seed = torch.randint(0, 2**62, (), device=device)
            y = F.fake_quantize(x, s, z, 8, p=0.5, seed=seed)
    seen = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y.cpu(), reference(x, s, z, 0.5, seed))
        seen.append(int(seed))
    assert len(set(seen)) == 3


@pytest.mark.of("fake_quantize")
def test_bits_may_change_between_replays(device, backend):
    x, s, z = weight_and_range(device)
    bits, graph = torch.tensor(8, device=device), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with qnk.backend(backend), torch.cuda.stream(stream):
        F.fake_quantize(x, s, z, bits)
        with torch.cuda.graph(graph, stream=stream):
            y = F.fake_quantize(x, s, z, bits)
    for n in (4, 8, 3):
        bits.fill_(n)
        graph.replay()
        torch.cuda.synchronize()
        with qnk.backend("reference"):
            assert torch.equal(y.cpu(), F.fake_quantize(x.cpu(), s.cpu(), z.cpu(), n))


@pytest.mark.of("fake_quantize")
def test_the_current_stream_is_used(device, backend):
    """The input is written late on a side stream; a kernel elsewhere would read the old one."""
    x, s, z = weight_and_range(device)
    new = x * 1.5
    stream = torch.cuda.Stream()
    with qnk.backend(backend):
        F.fake_quantize(x, s, z, 8, p=0.5, seed=1)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            x.copy_(new)
            y = F.fake_quantize(x, s, z, 8, p=0.5, seed=1)
    stream.synchronize()
    assert torch.equal(y.cpu(), reference(new, s, z, 0.5, 1))


OPS = {
    "minmax": lambda a: F.minmax(a["x"], 0),
    "histogram_range": lambda a: F.histogram_range(a["x"], 8),
    "quantization_parameters": lambda a: F.quantization_parameters(a["low"], a["high"], a["bits"]),
    "update_range_": lambda a: F.update_range_(a["x"], a["low"], a["high"], a["step"], 8, "ema_minmax", 2),
    "fake_quantize": lambda a: torch.ops.qnkernels.fake_quantize(*noise(a), None, None, None, True),
    "fake_quantize_backward": lambda a: (
        torch.ops.qnkernels.fake_quantize_backward(a["x"], *noise(a), None, None, a["outside"]),
        torch.ops.qnkernels.fake_quantize_backward(a["x"], *noise(a)),
    ),
    "block_noise": lambda a: (
        F.block_noise(a["x"], 8, 0.1, a["seed"], "mean"),
        F.block_noise(a["x"], 8, 0.1, a["seed"], "centroid", codebook=a["codebook"]),
    ),
    "int_linear": lambda a: F.int_linear(a["x"], a["codes"], a["scale"]),
    "int_linear_backward": lambda a: torch.ops.qnkernels.int_linear_backward(
        a["x"][:, :64].contiguous(), a["codes"], a["scale"], None, 8
    ),
    "int_embedding": lambda a: F.int_embedding(a["indices"], a["codes"], a["scale"]),
    "kmeans_assign": lambda a: torch.ops.qnkernels.kmeans_assign(a["points"], a["codebook"]),
    "kmeans_update": lambda a: torch.ops.qnkernels.kmeans_update(a["points"], a["nearest"], 64, 40),
    "kmeans_step": lambda a: torch.ops.qnkernels.kmeans_step(a["points"], a["codebook"], 40, 0, 40),
    "pq_decode": lambda a: F.pq_decode(a["blocks"], a["codebook"]),
    "pq_decode_backward": lambda a: torch.ops.qnkernels.pq_decode_backward(a["x"], a["blocks"], 64, True),
    "pq_linear": lambda a: F.pq_linear(a["x"], a["blocks"], a["codebook"]),
    "pq_linear_backward": lambda a: torch.ops.qnkernels.pq_linear_backward(
        a["x"] @ a["x"].t(), a["x"], a["blocks"], a["codebook"], True, True, True
    ),
    "pq_embedding": lambda a: F.pq_embedding(a["indices"], a["blocks"], a["codebook"]),
    "pq_embedding_backward": lambda a: torch.ops.qnkernels.pq_embedding_backward(
        a["x"][:64], a["indices"], a["blocks"], 64, True
    ),
}


def noise(a):
    return a["x"], a["s"], a["z"], a["bits"], 0.5, a["seed"]


def arguments(device):
    x, s, z = weight_and_range(device)
    integer = {"dtype": torch.int64, "device": device}
    return {
        **{
            "x": x,
            "s": s,
            "z": z,
            "low": torch.zeros((), device=device),
            "high": torch.zeros((), device=device),
        },
        **{"step": torch.zeros((), **integer), "seed": torch.full((), 5, **integer)},
        **{"bits": torch.full((), 8, **integer), "indices": torch.arange(64, device=device)},
        "outside": torch.arange(-(-x.numel() // 2048), device=device).to(torch.uint8) % 2,
        "codes": torch.randint(0, 256, (64, 264), dtype=torch.uint8, device=device),
        "scale": torch.rand(64, 1, device=device),
        "points": x.reshape(-1, 8),
        "nearest": torch.randint(0, 64, (x.numel() // 8,), dtype=torch.int32, device=device),
        "blocks": torch.randint(0, 64, (len(x), 33), dtype=torch.uint8, device=device),
        "codebook": torch.randn(64, 8, device=device),
    }


@pytest.mark.parametrize(
    ("op", "backend"), [(op, backend) for op in OPS for backend in ("triton", "cuda")], ids=lambda v: v
)
def test_nothing_waits_for_the_device(device, op, backend, record_property):
    try:
        kernels = qnk.backends.kernels(backend)
    except qnk.BackendUnavailable as error:
        pytest.skip(str(error))
    if op not in kernels:
        pytest.skip(f"{backend} has no {op}")
    record_property("op", op)
    record_property("backend", backend)
    given = arguments(device)
    with qnk.backend(backend):
        OPS[op](given)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            OPS[op](given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@pytest.mark.of("fake_quantize")
def test_tensors_on_another_gpu_than_the_current_one(device, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, s, z = weight_and_range(torch.device("cuda:1"))
    with torch.cuda.device(0), qnk.backend(backend):
        y = F.fake_quantize(x, s, z, 8, p=0.5, seed=1)
    assert y.device == x.device and torch.equal(y.cpu(), reference(x, s, z, 0.5, 1))


@pytest.mark.of("fake_quantize")
def test_one_compilation_serves_all_precisions(device, backend):
    x, s, z = weight_and_range(device)

    @torch.compile(fullgraph=True)
    def double_noise(x, bits, seed):
        return 2 * F.fake_quantize(x, s, z, bits, p=0.5, seed=seed)

    with qnk.backend(backend):
        for n, seed in ((8, 1), (4, 2), (8, 3)):
            given = torch.tensor(n, device=device), torch.tensor(seed, device=device)
            actual = double_noise(x, *given)
            with qnk.backend("reference"):
                expected = 2 * F.fake_quantize(x.cpu(), s.cpu(), z.cpu(), n, p=0.5, seed=seed)
            assert torch.equal(actual.cpu(), expected)
