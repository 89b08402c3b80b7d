"""Searches of k-means with and without bounds on the distances: the same bits."""

import importlib
import math

import pytest
import torch
from numeric import assert_identical

import qnkernels as qnk

bounds = importlib.import_module("qnkernels.kmeans.bounds")  # the name is that of a function, too

GENERATOR = torch.Generator().manual_seed(1)
POINTS = torch.randn(12_000, 5, generator=GENERATOR)
WEIGHTS = torch.rand(12_000, generator=GENERATOR)
FAR = torch.cat((POINTS[:20], torch.full((30, 5), 60.0)))
SEARCHES = {
    "random": {},
    "weights": {"weights": WEIGHTS},
    "importance": {"importance": torch.tensor([0.0, 0.1, 1.0, 3.0, 0.5]), "weights": WEIGHTS},
    "refilled": {"init": FAR},
    "tolerance": {"tolerance": 1e-3},
}


@pytest.fixture
def force(monkeypatch):
    """force(with_bounds) makes searches take all steps so, or the first `patience` ones, whatever the time.
    Returns the list of the steps that were taken with bounds, by number.
    """

    def use(with_bounds: bool, patience: float = math.inf) -> list[int]:
        monkeypatch.setattr(bounds, "_firsts_in", lambda n_iter: 0.0 if with_bounds else math.inf)
        monkeypatch.setattr(bounds, "PATIENCE", patience)
        monkeypatch.setattr(bounds, "_time_of", lambda step, *arguments: 1e-9)  # no step is as fast as that
        taken = []

        def counted(self, *arguments):
            taken.append(self.steps + 1)
            return original(self, *arguments)

        monkeypatch.setattr(bounds._Bounds, "step", counted)
        return taken

    original = bounds._Bounds.step
    return use


def assert_same(one, two) -> None:
    assert_identical(one.centroids, two.centroids)
    assert_identical(one.codes, two.codes)
    assert one.objective == two.objective


@pytest.mark.parametrize("n_clusters", [50, 600])
@pytest.mark.parametrize("search", SEARCHES)
def test_bounds_change_no_bit(force, search, n_clusters):
    options = SEARCHES[search]
    if "init" in options and n_clusters != len(options["init"]):
        options = {"init": torch.cat((POINTS[: n_clusters - 30], FAR[20:]))}
    found = []
    for with_bounds in (False, True):
        taken = force(with_bounds)
        found.append(qnk.kmeans(POINTS, n_clusters, 12, **options))
        assert taken == (list(range(1, len(found[-1].objective) + 1)) if with_bounds else [])
    assert_same(*found)


def test_bounds_that_cost_too_much_are_given_up(force):
    force(False)
    expected = qnk.kmeans(POINTS, 50, 12)
    taken = force(True, patience=3)
    assert_same(qnk.kmeans(POINTS, 50, 12), expected)
    assert taken == [1, 2, 3, 4]


def test_few_points_few_clusters_and_single_steps_have_none(force):
    taken = force(True)
    qnk.kmeans(POINTS[:5000], 50, 3)
    qnk.kmeans(POINTS, 20, 3)
    qnk.kmeans(POINTS, 50, 1)
    qnk.kmeans(torch.ones(12_000, 2), 50, 3)  # all distances are 0
    assert taken == []


def test_the_longer_the_search_the_dearer_its_first_step_may_be():
    dearest = [n_iter / bounds._firsts_in(n_iter) for n_iter in range(1, 60)]
    assert dearest == sorted(dearest) and dearest[0] == 1.0 and dearest[-1] < 4.0
