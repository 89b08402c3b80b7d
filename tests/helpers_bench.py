"""Rows as a run gives them, for tests."""

import report


def recorded(contender="cpu", role="ours", seconds=0.002, ratio=1.25, **changes):
    facts = {
        **{"op": "fake_quantize", "case": "forward 4x4", "shape": "4x4", "dtype": "float32", "timer": "wall"},
        **{"contender": contender, "role": role, "calls": 7, "moved_bytes": 4_000_000, "operations": 0},
        **{"ceiling": "copy_", "ratio_to_ceiling": ratio, "target": 2.0 if role == "ours" else None},
        **{"peer_target": None, "target_peer": None},
        "medians": {contender: seconds},
        "size": 16,
        "other_load": 0.011,
    }
    stats = {"median": seconds, "q1": 0.9 * seconds, "q3": 1.1 * seconds, "min": 0.8 * seconds, "rounds": 5}
    return {"extra_info": {**facts, **changes}, "stats": stats}


MEASURED_ON = {
    **{"device": "A Processor x2", "threads": "2", "python": "3.12.1", "torch": "2.13.0", "triton": "3.7.1"},
    **{"qnkernels": "0.1.0", "cuda": "", "driver": "", "commit": "abc1234", "date": "2026-01-02"},
}
ON_GPU = {**MEASURED_ON, "device": "NVIDIA Something", "cuda": "13.0", "driver": "580.1"}


def rows(measured_on=MEASURED_ON, **changes):
    benchmarks = [
        recorded(**changes),
        recorded("eager", "peer", 0.02, 12.5),
        recorded("copy_", "ceiling", 0.0016, 1.0),
    ]
    return report.rows_from_json({"machine_info": {"measured_on": measured_on}, "benchmarks": benchmarks})
