"""benchmarks/gpu.py without a GPU: its shapes, its arithmetic, its JSON, and a dry run on the CPU."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not beside the tests", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks import gpu  # noqa: E402
from svpo_kernels.bench.machine import Rates, Work  # noqa: E402

H200 = Rates(copy_gbs=4300.0, read_gbs=4300.0, tflops=790.0)


def test_every_shape_of_the_contract_is_there() -> None:
    names = [name for name, _ in gpu.cases(gpu.FULL)]
    for kind in ("no grad", "frozen head", "trainable head"):
        for shape in ("D 4096, V 128256, f 1.0", "D 4096, V 128256, f 0.25", "D 2304, V 256000", "D 4096, V 151936"):
            assert any(kind in name and shape in name and "T 8192" in name for name in names), (kind, shape)
    for name in ("step_logps forward, 8192 x 128256 bfloat16", "step_logps forward + backward, 8192 x 128256 bfloat16",
                 "svpo_loss forward + backward, P 64", "prm_scores, 256 steps of 8192 rows, D 4096"):
        assert name in names


@pytest.mark.parametrize(
    ("trainable", "f", "floor"), [(False, 1.0, 21.8), (True, 1.0, 32.7), (False, 0.25, 5.45), (True, 0.25, 8.2)])
def test_floors_are_the_products(trainable: bool, f: float, floor: float) -> None:
    """The floors that DESIGN section 8 states at 790 TFLOP/s."""
    shape = gpu.HeadShape(8192, 4096, 128256, f, trainable, torch.bfloat16)
    assert H200.floor_ms(shape.work) == pytest.approx(floor, rel=5e-3)


def test_floors_are_the_bytes() -> None:
    for backward, floor in ((False, 0.49), (True, 1.47)):
        shape = gpu.rows.RowShape(8192, 128256, torch.bfloat16, backward)
        assert H200.floor_ms(shape.work) == pytest.approx(floor, rel=5e-3)


def test_rates_and_shares() -> None:
    row = gpu.figures(gpu.Row("case", "ours", ms=2.0), Work(read=4.3e9), H200)
    assert (row.rate, row.unit, row.share) == (pytest.approx(2150.0), "GB/s", pytest.approx(0.5))
    row = gpu.figures(gpu.Row("case", "ours", ms=4.0), Work(read=1e6, flops=7.9e11), H200)
    assert (row.rate, row.unit, row.share) == (pytest.approx(197.5), "TFLOP/s", pytest.approx(0.25))


def test_a_wrong_answer_is_not_timed() -> None:
    exact = torch.tensor([1.0, -2.0])
    assert gpu.judge([exact], [exact]) == 0 and gpu.judge([exact + 0.1], [exact]) == pytest.approx(0.05)
    assert gpu.judge([exact * math.nan], [exact]) == math.inf
    case = gpu.Case("case", torch.float32, Work(8.0), {"ours": lambda: [exact + 0.1], "peer": lambda: 1 / 0},
                    lambda: [exact])
    ours, peer = gpu.run_case(case, H200, "cpu", 0.001)
    assert ours.ms is None and "wrong" in ours.note and peer.ms is None and "ZeroDivisionError" in peer.note


def test_heads_of_ours_and_peers_agree() -> None:
    """Every variant but the compiled ones (minutes of Inductor) gives the fp64 answer on the tiny head."""
    for name, build in gpu.cases(gpu.TINY):
        if "linear" in name:
            case = build(name)
            exact = case.exact()
            for variant, function in case.variants.items():
                if "compile" not in variant and "CCE" not in variant:
                    assert gpu.judge(function(), exact) < 1e-5, (name, variant)


def test_the_race_of_clusters_turns_them_on() -> None:
    seen = []
    gpu._in_clusters(lambda: seen.append(gpu.cuda_head.CLUSTERS))()
    assert seen == [True] and not gpu.cuda_head.CLUSTERS


def test_dry_run_writes_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "new" / "dry.json"
    assert gpu.main(["--dry-run", "--only", "prm", "--seconds", "0.001", "--output", str(path)]) == 0
    kept = json.loads(path.read_text())
    assert {"device", "torch", "date", "command", "rates", "gpu", "skipped"} <= set(kept)
    ours = [row for row in kept["rows"] if row["variant"].startswith("ours")]
    assert len(ours) >= 2
    for row in ours:
        assert row["ms"] > 0 and row["share"] == pytest.approx(row["floor_ms"] / row["ms"]) and row["error"] < 1e-6
    assert "written:" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no CUDA device here" in capsys.readouterr().err
