"""bench_kmeans.py, bench_pq_linear.py and bench_pq_decode.py: the contenders do the same work."""

import importlib

import pytest
import torch
from numeric import relative_error

CPU = torch.device("cpu")
kmeans, pq_linear, pq_decode = (
    importlib.import_module(f"bench_{name}") for name in ("kmeans", "pq_linear", "pq_decode")
)


def objective(points, centroids) -> float:
    return torch.cdist(points.double(), centroids.double()).amin(1).square().sum().item()


def test_our_objective_is_within_half_a_percent_of_every_peer():
    """After the same number of steps from the same centroids."""
    inputs = kmeans.make_inputs(6000, 8, 64, CPU, 3)
    ours = objective(inputs.points, kmeans.our_search(inputs, 12))
    for name, search in {"torch": kmeans.torch_search, **kmeans.searches("cpu")}.items():
        theirs = objective(inputs.points, search(inputs, 12))
        assert ours <= 1.005 * theirs, f"{name}: {theirs}, ours {ours}"


def test_one_step_of_ours_and_of_torch():
    inputs = kmeans.make_inputs(3000, 4, 20, CPU, 5)
    _, sums, mass, _ = kmeans.our_step(inputs)()
    means = sums.double() / 2.0**kmeans.EXPONENT / mass[:, None]
    for step in (kmeans.torch_step, kmeans.one_hot_step):
        found = step(inputs.points, inputs.start).double()
        torch.testing.assert_close(found, means, rtol=1e-4, atol=1e-5)


def test_the_steps_of_torch_are_the_same_in_chunks(monkeypatch):
    """Empty clusters stay where they were."""
    inputs = kmeans.make_inputs(1000, 4, 20, CPU, 5)
    inputs.start[7] = 1e3
    whole = kmeans.torch_step(inputs.points, inputs.start)
    assert torch.equal(whole[7], inputs.start[7])
    monkeypatch.setitem(kmeans.SCORES, "cpu", 20 * 64)
    for step in (kmeans.torch_step, kmeans.one_hot_step):
        torch.testing.assert_close(step(inputs.points, inputs.start), whole)


def test_the_peers_on_a_gpu(monkeypatch):
    """By name; what is not installed stays out of the list and is named as left out."""
    monkeypatch.setattr(kmeans, "version", lambda package: "1.0")
    monkeypatch.setattr(kmeans, "LEFT_OUT", [])
    torchs = {"torch", "torch one-hot", "torch.compile", "torch.compile one-hot"}
    for case in (one for one in kmeans.CASES if "cuda" in one.devices):
        peers = {one.name: one for one in case.contenders("cuda") if one.role == "peer"}
        assert set(peers) == torchs | {"flash-kmeans 1.0"}
        if case.op == "kmeans":  # each search waits for the device
            assert not any(one.capture for one in peers.values())
    monkeypatch.setattr(kmeans, "LEFT_OUT", ["flash-kmeans"])
    assert all("flash" not in one.name for case in kmeans.CASES for one in case.contenders("cuda"))


def test_the_ceiling_of_kmeans_computes_every_product(monkeypatch):
    inputs = kmeans.make_inputs(1000, 4, 20, CPU, 5)
    monkeypatch.setitem(kmeans.CHUNK, "cpu", 20 * 64)
    shapes = []
    monkeypatch.setattr(torch, "mm", lambda rows, table, out: shapes.append((*rows.shape, *out.shape)))
    kmeans.products(2, inputs)()
    assert shapes == 2 * ([(64, 4, 64, 20)] * 15 + [(40, 4, 40, 20)])


def test_slow_contenders_stay_out_of_the_large_cases():
    names = {str(case): {one.role for one in case.contenders("cpu")} for case in kmeans.CASES}
    large = next(roles for case, roles in names.items() if case.startswith("kmeans_step: step 10000000x8"))
    small = next(roles for case, roles in names.items() if case.startswith("kmeans_step: step 100000x8"))
    assert "reference" not in large and "peer" not in large and {"reference", "peer"} <= small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_centroids", [16, 256, 1024])
def test_the_peers_of_pq_linear_compute_the_same_function(dtype, n_centroids):
    inputs = pq_linear.make_inputs((64, 256), 16, 8, n_centroids, dtype, CPU, 7)
    exact = pq_linear.dense(torch.float32, inputs)()
    for contender in pq_linear.contenders(16, dtype, "cpu"):
        if contender.name != "copy_ codes":
            assert relative_error(contender.prepare(inputs)(), exact) < 0.03, contender.name
    assert torch.equal(pq_linear.copy_codes(inputs)(), inputs.codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_training_step_of_pq_linear_runs(dtype):
    inputs = pq_linear.make_inputs((64, 256), 16, 8, 32, dtype, CPU, 7)
    for contender in pq_linear.step_contenders(dtype, "cpu"):
        contender.prepare(inputs)()


@pytest.mark.parametrize("tokens", [0, 5])
def test_the_contenders_of_pq_decode_compute_the_same_function(tokens):
    inputs = pq_decode.make_inputs((40, 24), 4, 16, tokens, torch.float32, CPU, 7)
    found = (pq_decode.embedding_contenders if tokens else pq_decode.decode_contenders)("cpu")
    expected = inputs.table[inputs.indices] if tokens else inputs.table
    for contender in found:
        if contender.role != "ceiling":
            assert torch.equal(contender.prepare(inputs)(), expected), contender.name
    assert inputs.out.shape == expected.shape
