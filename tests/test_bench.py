"""`svpo bench`: what it measures, what it refuses to time, what it leaves behind, and when a comparison fails."""

from __future__ import annotations

import json
import sys
import threading
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from svpo_kernels.bench import instructions, peers, plots, prm, results, step_logps, suite, training, trees
from svpo_kernels.bench import linear_step_logps as head
from svpo_kernels.bench.machine import Rates, Work
from svpo_kernels.bench.peers import HeadInputs, HeadShape
from svpo_kernels.bench.race import Result, error_against, peak_memory
from svpo_kernels.cli import main as cli

pytestmark = pytest.mark.usefixtures("one_thread", "eagerly")

runner = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"})
RATES = Rates(copy_gbs=20.0, read_gbs=10.0, tflops=0.1)
SHAPE = HeadShape(24, 16, 101, 0.5)


@pytest.fixture
def eagerly():
    """Compiled peers run uncompiled: what they cost is not tested here, and compiling takes longer than the rest."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def invoke(*words):
    return runner.invoke(cli.app, ["bench", *(str(word) for word in words)])


def saved(path, rows, **about):
    results.write(path, {"device": "d", "command": "c", **about}, rows)
    return path


def race_of(ours, peer=10.0, case="a", **more):
    return Result(case, "ours", "ms", {"ours": ours, "peer": peer}, **more)


def test_quick_leaves_table_json_and_names_what_is_missing(tmp_path):
    done = invoke("--quick", "--scale", "tiny", "--output-dir", tmp_path)
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "results.json").read_text())
    assert {"device", "python", "torch", "date", "command", "rates", "peers"} <= data.keys()
    assert [row["curves"]["shape"][3] for row in data["results"]] == [1.0, 0.25]
    for row in data["results"]:
        timed = row["medians"].keys() - {"bare products"}
        assert {"ours", "eager, all rows", "torch.compile, all rows"} <= timed
        assert timed == row["memory"].keys() == row["errors"].keys()
        assert row["floors"] == ["bare products"] and row["floor_ms"] > 0
        assert max(row["errors"].values()) < 1e-4
        assert "Liger" in row["skipped"]
    assert "eager, gathered rows" in data["results"][1]["medians"]
    text = (tmp_path / "results.md").read_text()
    assert "Skipped: Liger: " in text and "## Where a peer wins" in text
    assert "skipped: Liger" in done.output and "floors: copy" in done.output
    again = invoke("--compare", tmp_path / "results.json", "--with", tmp_path / "results.json")
    assert again.exit_code == 0 and "2 cases compared, 0 worse" in again.output


@pytest.mark.parametrize("words, message", [
    (["--ops", "step_logps,stepp"], "ops must be of linear_step_logps, step_logps"),
    (["--scale", "huge"], "scale must be auto or one of tiny, cpu, gpu, got 'huge'"),
    (["--with", "new.json"], "--with NEW.json needs --compare OLD.json"),
    (["--compare", "nowhere.json"], "nowhere.json is not a file of results"),
    (["--noise", "-1"], "noise must be at least 0, got -1.0"),
])
def test_mistakes_end_in_one_line(words, message):
    done = invoke(*words)
    assert done.exit_code == 1 and message in done.output and len(done.output.strip().splitlines()) == 1


@pytest.mark.parametrize("now, spread, words, code", [
    (1.0, 0.0, [], 0), (1.14, 0.0, [], 0), (0.5, 0.0, [], 0), (1.16, 0.0, [], 3), (1.16, 0.3, [], 0),
    (1.16, 0.0, ["--noise", "0.2"], 0), (1.01, 0.0, ["--noise", "0"], 3), (float("nan"), 0.0, [], 3)])
def test_compare_fails_above_the_noise_band(tmp_path, now, spread, words, code):
    old = saved(tmp_path / "old.json", [race_of(1.0), race_of(1.0, case="gone")])
    new = saved(tmp_path / "new.json", [race_of(now, spread={"ours": spread}), race_of(9.0, case="added")])
    done = invoke("--compare", old, "--with", new, *words)
    assert done.exit_code == code, done.output
    assert "1 cases compared" in done.output and ("WORSE" in done.output) == (code == 3)


def test_compare_needs_a_common_case_and_names_another_machine(tmp_path):
    old = saved(tmp_path / "old.json", [race_of(1.0)])
    other = saved(tmp_path / "other.json", [race_of(1.0, case="b")])
    done = invoke("--compare", old, "--with", other)
    assert done.exit_code == 1 and "no case in common" in done.output
    moved = saved(tmp_path / "moved.json", [race_of(1.0)], device="e")
    assert "note: device was d, is e" in invoke("--compare", old, "--with", moved).output


def test_one_convention_of_ratios():
    result = Result("a", "ours", "ms", {"ours": 2.0, "peer": 6.0, "floor": 1.0}, floors=["floor"],
                    targets={"peer": ">= 3", "floor": "<= 1.9"}, work=vars(Work(read=2e6, write=1e6)), floor_ms=0.5)
    assert (result.ratio("peer"), result.ratio("floor")) == (3.0, 2.0)
    assert (result.reached("peer"), result.reached("floor")) == (True, False)
    assert result.share("ours") == 0.25 and result.rate("ours") == (1.5, "GB/s")
    assert Result.from_row(json.loads(json.dumps(result.row()))) == result
    assert results.losses([result, race_of(10.0, peer=5.0, case="b")]) == [("b", "peer", 2.0)]


def test_floor_is_the_longer_of_bytes_and_products():
    assert RATES.floor_ms(Work(read=10e6)) == pytest.approx(1.0)
    assert RATES.floor_ms(Work(read=20e6, write=10e6)) == pytest.approx(1.0 + 1.0)
    assert RATES.floor_ms(Work(read=10e6, flops=1e9)) == pytest.approx(10.0)
    assert SHAPE.work.flops == 3 * 2 * 12 * 16 * 101


def test_a_wrong_peer_is_named_and_not_timed(monkeypatch):
    def wrong(hidden, weight, labels):
        return peers.eager(hidden, weight, labels) * 1.01

    def broken(hidden, weight, labels):
        raise NotImplementedError("not on this device")

    found = {"eager": peers.eager, "wrong": wrong, "broken": broken}
    monkeypatch.setattr(head, "peers", lambda device: (dict(found), {"absent": "absent is not installed"}))
    (result,) = head.run(SHAPE, RATES, rounds=3)
    assert result.medians.keys() == {"ours", "eager, all rows", "eager, gathered rows", "bare products"}
    assert result.skipped["absent"] == "absent is not installed"
    for rows in ("all", "gathered"):
        assert result.skipped[f"wrong, {rows} rows"].startswith("wrong answer: error 1.0")
        assert result.skipped[f"broken, {rows} rows"] == "NotImplementedError: not on this device"


def test_our_own_wrong_answer_is_an_error(monkeypatch):
    monkeypatch.setattr(HeadInputs, "ours", lambda self, **options: self.all_rows(lambda *x: 2 * peers.eager(*x)))
    with pytest.raises(AssertionError, match="linear_step_logps: trainable head, T 24, .* error .* against fp64"):
        list(head.run(SHAPE, RATES))


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_peers_agree_with_fp64(trainable):
    inputs = HeadInputs(HeadShape(24, 16, 101, 0.5, trainable))
    exact = inputs.exact()
    assert len(exact) == 2 + trainable and exact[0].dtype == torch.float64
    for name, function in peers.peers("cpu")[0].items():
        for variant in (inputs.all_rows(function), inputs.gathered(function)):
            assert error_against(exact, inputs.backward(variant)) < 1e-5, name


def test_an_error_that_is_nan_is_infinite():
    exact = torch.ones(3, dtype=torch.float64)
    assert error_against([exact], [torch.tensor([1.0, float("nan"), 1.0])]) == float("inf")
    assert error_against([exact], [torch.tensor([1.0, 1.5, 1.0])]) == 0.5


def test_peak_memory_sees_what_was_freed_again():
    mebibytes, kept = peak_memory(lambda: float(torch.ones(64 << 18).sum()))  # 64 MiB
    assert kept == 64 << 18 and 60 < mebibytes < 80


@pytest.mark.slow
def test_every_family_runs_and_every_plot_is_drawn(tmp_path):
    names = [name for name in suite.FAMILIES if name != "training"]
    console = Console(file=(tmp_path / "log").open("w"), width=160)
    data = suite.run_bench(quick=False, ops=",".join(names), scale="tiny", output_dir=tmp_path, command="c",
                           console=console)
    families = {row["family"] for row in data["results"]}
    assert families == {"linear_step_logps", "step_logps", "svpo_loss", "step_policy_loss", "prm", "tree shapes",
                        "trees"}
    for name in ("head", "floors", "savings", "trees"):
        assert 1_000 < (tmp_path / f"{name}.png").stat().st_size < 200_000, name
    assert not (tmp_path / "training.png").exists()


def test_training_four_ways_is_one_curve(tmp_path):
    pytest.importorskip("trl")
    found = list(training.run(training.cases("tiny")[0], RATES))
    curves = found[0].curves
    assert list(curves) == [training.TRL, *training.WAYS] and {len(own) for own in curves.values()} == {2}
    assert np.ptp([own[1] for own in curves.values()]) < 1e-5 and curves[training.TRL][1] < 0.69
    tokens, flops = found[1].medians, found[2].medians
    assert tokens[training.TRL] == tokens[training.PAIRS] > tokens[training.PACKED]
    assert flops[training.PACKED] < flops[training.ONCE] <= flops[training.PAIRS] <= flops[training.TRL]
    (plot,) = plots.draw(found, tmp_path)
    assert plot.name == "training.png" and 1_000 < plot.stat().st_size < 200_000


def test_training_refuses_curves_that_differ(monkeypatch):
    """A way that trains something else must not get a time."""
    pytest.importorskip("trl")
    made = training.trl_way

    def changed(case, folder):
        way = made(case, folder)
        way.trainer.args.learning_rate *= 2
        return way

    monkeypatch.setattr(training, "trl_way", changed)
    with pytest.raises(AssertionError, match="the losses differ by"):
        list(training.run(training.cases("tiny")[0], RATES))


class _Trainer:
    """Trains three steps, and says so; raises in step `fails` when told to."""

    def __init__(self, name, log, fails=None):
        self.name, self.log, self.fails = name, log, fails

    def add_callback(self, callback):
        self.callback = callback

    def train(self):
        for step in range(3):
            self.callback.on_step_begin(None, None, None)
            if step == self.fails:
                raise RuntimeError(f"{self.name} failed")
            self.log.append((step, self.name))
            self.callback.on_step_end(None, None, None)


def _ways(log, **fails):
    return {name: training.Way(_Trainer(name, log, fails.get(name)), training.Ran(), lambda _: None) for name in "abc"}


def test_ways_take_their_steps_in_turn():
    log = []
    found = training.train_in_turn(_ways(log))
    assert log == [(step, name) for step in range(3) for name in "abc"]
    assert all(len(ran.seconds) == 3 and ran.mebibytes >= 0 for ran in found.values())


@pytest.mark.parametrize("fails", [0, 1])
def test_a_way_that_fails_is_raised_after_the_others_and_leaves_no_thread(fails):
    """In its first step it is being weighed."""
    log, before = [], threading.active_count()
    with pytest.raises(RuntimeError, match="b failed"):
        training.train_in_turn(_ways(log, b=fails))
    assert log == [(step, name) for step in range(3) for name in "abc" if name != "b" or step < fails]
    assert threading.active_count() == before


@pytest.mark.parametrize("device, there, why", [
    ("cpu", True, "its operators are kernels that need a GPU"), ("cuda", False, "is not installed"),
    ("cuda", True, None)])
def test_gpu_peers_are_taken_where_they_can_run(monkeypatch, device, there, why):
    """Without a GPU: names, packages and reasons; heads are imported when they are called."""
    names = {name: package for name, _, package in peers.GPU_PEERS}
    assert names == {"Liger": "liger_kernel", "flash-attn": "flash-attn", "quack": "quack-kernels"}
    real = peers.installed
    monkeypatch.setattr(peers, "installed", lambda name: ("1.0" if there else None) if name in names.values()
                        else real(name))
    found, skipped = peers.peers(device)
    for name, function, package in peers.GPU_PEERS:
        if why is None:
            assert found[name] is function and name not in skipped
        else:
            assert name not in found and skipped[name].endswith(why) and (there or skipped[name].startswith(package))


@pytest.mark.parametrize("module, function, head", [
    ("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss", peers.flash_attn),
    ("quack.linear_cross_entropy", "linear_cross_entropy_func", peers.quack)])
def test_gpu_peers_are_called_as_their_packages_ask(monkeypatch, module, function, head):
    """Stand-ins with the signatures of flash-attn 2.8.3 and quack 0.6.5: values and gradients are the op's."""
    def cross_entropy_loss(logits, labels, precomputed_lse=None, label_smoothing=0.0, logit_scale=1.0,
                           lse_square_scale=0.0, ignore_index=-100, inplace_backward=False, process_group=None):
        losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
        return losses, losses * 0

    def linear_cross_entropy_func(x, weight, bias, target, ignore_index=-100, reduction="mean",
                                  inplace_backward=False):
        return torch.nn.functional.cross_entropy(x @ weight.T, target, ignore_index=ignore_index, reduction=reduction)

    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
    setattr(sys.modules[module], function, locals()[function])
    inputs = HeadInputs(SHAPE)
    for variant in (inputs.all_rows(head), inputs.gathered(head)):
        assert error_against(inputs.exact(), inputs.backward(variant)) < 1e-5


@pytest.mark.parametrize("quick", [False, True])
def test_scale_gpu_is_planned_and_its_cases_compute(monkeypatch, quick):
    """Every case that `--scale gpu` plans, shrunk and on this CPU: its shape's fields, races and device words hold."""
    names = list(suite.FAMILIES)
    todo = suite.planned(names, "gpu", quick)
    assert {name for name, _ in todo} == ({"linear_step_logps"} if quick else {"linear_step_logps", "step_logps"})
    small = {"T": 32, "V": 101, "device": "cpu"}
    shrunk = {(name, replace(case, **small, **({"D": 16} if hasattr(case, "D") else {}))) for name, case in todo}
    assert all(case.device == "cuda" and RATES.floor_ms(case.work) > 0 for _, case in todo)
    for name, case in shrunk:
        assert all(result.medians for result in suite.FAMILIES[name].run(case, RATES, rounds=3))


def test_pairs_fill_whole_batches():
    built = trees.build(trees.TreeShape(2, 4, (2, 4), 5))
    case = training.whole(training.TrainingCase("t", *built))
    assert sum(map(len, built[1])) == 30 and sum(map(len, case.pairs)) == 24


def test_scores_by_prefix_are_those_of_one_pass():
    """score_responses raises when they are not; step ends are where made_responses says."""
    made = prm.made_responses(problems=1, responses=2, steps=3, tokens=(2, 5), prompt=4, vocab=50)
    assert all(own[-1] == len(ids) - 1 for ids, own in zip(made.ids, made.ends, strict=True))
    (result,) = prm.score_responses(made, RATES, {}, vocab=60, hidden=16)
    assert result.medians.keys() == {"ours", prm.FULL, prm.PREFIXES}


def test_savings_of_a_tree_by_hand():
    """Two siblings of 4 tokens after 10: 14 + 14 pairwise, 10 + 4 + 4 packed."""
    shape = trees.TreeShape(1, 2, (4, 4), 10)
    result = trees.count_tokens("t", *trees.build(shape), target=(80, 45))
    assert result.medians == {"packed": 18, "pairwise": 28, "distinct": 28}
    assert result.targets == {"pairwise": ">= 5.0000", "distinct": ">= 1.8182"}
    assert result.reached("pairwise") is False


def test_rows_report_the_bytes_they_need():
    fp32, bf16, both = step_logps.cases("cpu")
    assert fp32.work == Work(read=4 * 512 * 128256) and bf16.work == Work(read=2 * 512 * 128256)
    assert both.work == Work(read=8 * 512 * 128256, write=4 * 512 * 128256)


def test_results_of_cases_that_did_not_run_stay(tmp_path):
    path = saved(tmp_path / "r.json", [race_of(1.0), race_of(2.0, case="b")])
    saved(path, [race_of(3.0, case="b"), race_of(4.0, case="c")])
    assert [(row["case"], row["medians"]["ours"]) for row in results.read(path)["results"]] == [
        ("a", 1.0), ("b", 3.0), ("c", 4.0)]


@pytest.mark.skipif(instructions.why_not() is not None, reason=f"no instruction counts: {instructions.why_not()}")
def test_instruction_counts_repeat_and_compare(tmp_path):
    counted = [instructions.run(tmp_path / str(i), Console(quiet=True), only="aggregate_scores") for i in range(2)]
    first, second = ({row["case"]: row["medians"]["ours"] for row in data["results"]} for data in counted)
    assert first.keys() == {f"aggregate_scores_{way} in aggregate_scores, 8" for way in ("fwd", "bwd")}
    for case, count in first.items():
        assert 50 < count < 100_000 and second[case] == pytest.approx(count, rel=instructions.NOISE)
    worse = json.loads((tmp_path / "0/instructions.json").read_text())
    for row in worse["results"]:
        row["medians"]["ours"] = int(row["medians"]["ours"] * 1.02)
    (tmp_path / "worse.json").write_text(json.dumps(worse))
    for new, code in (("1/instructions.json", 0), ("worse.json", 3)):
        assert invoke("--compare", tmp_path / "0/instructions.json", "--with", tmp_path / new).exit_code == code


def test_without_valgrind_counting_is_skipped_with_a_message(monkeypatch):
    monkeypatch.setenv("PATH", "")
    done = invoke("--instructions")
    assert done.exit_code == 0 and "skipped: valgrind is not on PATH" in done.output
