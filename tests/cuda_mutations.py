"""Faults put into the CUDA kernels on purpose, one line each: whether the emulated tests notice every one of them.

    python tests/cuda_mutations.py [WORD ...]          all, or those whose file or text has one of the words

Each mutant is a copy of csrc/ with one replacement, built as host code and run on few cases until the first failure;
the unchanged sources must pass the same cases first. A new kernel adds its mutants to MUTANTS.
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cuda_emulator
from processes import TESTS, environment

# What runs against a mutant: test files, and the tests chosen in them. Two schedules: a block for every panel of a row,
# and one block for all of them.
STEP_LOGPS = (
    ["cuda_checks.py", "test_step_logps.py"],
    "(shuffled2 or descending) and ((any_alignment and not 8191) or bad_indices or constant or wide or padded_plan or "
    "(order and odd_large) or huge or (values and (many_steps or long_steps or padded or softcap or branching or "
    "confident or infinity)))",
)
LINEAR = (
    ["cuda_checks.py", "test_linear_step_logps.py"],
    "shuffled2 and (every_row_branches or again or form or (values and (bias or branching or padded or softcap) and "
    "(recompute or frozen)))",
)
# Two schedules of a device that has clusters, with one and with two multiprocessors.
CLUSTERS = (
    ["cuda_checks.py"],
    "(descending or shuffled3) and (cluster_holds or same_bits or than_lanes or (common_cases and (branching or "
    "padded)))",
)
LOSS = (
    ["cuda_small_checks.py", "test_svpo_loss.py"],
    "shuffled2 and cuda and (slopes or exist or counts or ties or left_out or ((terms or metrics) and (per_pair or "
    "sft or shared or values_only or no_pairs)))",
)
HEADS = (
    ["cuda_small_checks.py", "test_prm.py"],
    "shuffled2 and cuda and (exist or probability or repeated or offsets_are_wide or without_a_labelled or (alignment "
    "and (7 or 264)) or (gradients and (two or tanh)))",
)
AGGREGATES = (
    ["cuda_small_checks.py", "test_aggregate.py"],
    "shuffled2 and cuda and (deep or sound or ties or exact or below or nan or (values and 6-dtype0))",
)


POLICY = (
    ["test_step_policy.py"],
    "shuffled2 and cuda and (clamps or hand or zero or member or cut or ((terms or metrics) and (mixed or many or "
    "tensor or no_members or every_token or dual or cispo_steps or cispo_mean or extreme)))",
)


class Mutant(NamedTuple):
    file: str
    old: str  # stands in the file once
    new: str
    cases: tuple[list[str], str] = STEP_LOGPS
    sample: bool = False  # among the few that every run of the tests takes
    survives: str = ""  # why no case can tell it from the kernel


MUTANTS = [
    # packs, warps
    Mutant("common.cuh", "begin(k) + kPack<T> <= size;", "begin(k) + kPack<T> <= size + 1;"),
    Mutant("common.cuh", "return begin(k) >= 0 && ", "return "),
    Mutant("common.cuh", "return i >= 0 && i < size;", "return i > 0 && i < size;"),
    Mutant("common.cuh", "return i >= 0 && i < size;", "return i >= 0 && i < size - 1;"),
    Mutant("common.cuh", "int64_t begin = k * kPack<T> - skip;", "int64_t begin = k * kPack<T>;"),
    Mutant("common.cuh", "if (skip == run.skip && run.whole(k))", "if (run.whole(k))"),
    Mutant("common.cuh", "offset /= 2) value += shuffle_xor(value, offset)",
           "offset /= 4) value += shuffle_xor(value, offset)"),
    Mutant("common.cuh", "value += shuffle_xor(value, offset)", "value += shuffle_xor(value, offset & 15)"),
    Mutant("common.cuh", "offset /= 2) value = fmaxf(value", "offset /= 4) value = fmaxf(value"),
    # panels
    Mutant("panels.cuh", "  sync_threads();\n", ""),
    Mutant("rows.cu", "turn ^= 1", "turn ^= 0"),
    Mutant("panels.cuh", "slots[turn * kWarps + thread_x() / kWarp]", "slots[turn * kWarps + thread_x() / kWarp + 1]"),
    Mutant("rows.cu", "SVPO_SHARED(Partial, slots, 2 * (kThreads / kWarp))",
           "SVPO_SHARED(Partial, slots, kThreads / kWarp)"),
    Mutant("panels.cuh", "return {m, part.s * factor, ", "return {m, part.s, "),
    Mutant("panels.cuh", "finite_exponent(part.m - finite_max(m))", "finite_exponent(part.m - m)",
           survives="a panel that has a sum has a finite maximum, and m is no smaller"),
    Mutant("panels.cuh", "finite_exponent(part.m - finite_max(m))", "part.m - finite_max(m)"),
    Mutant("row_scalars.cuh", "huge = fabsf(top) >= 1073741824.0f;", "huge = fabsf(top) > INFINITY;"),
    Mutant("panels.cuh", "return data + (i / L * stride_b + i % L * stride_l);",
           "return data + static_cast<int>(i / L * stride_b + i % L * stride_l);"),
    Mutant("panels.cuh", "if (c == label) z[c] = -INFINITY;", "if (c == label + 1) z[c] = -INFINITY;"),
    Mutant("panels.cuh", "if (mode == kCapped && !whole && ", "if (mode == kCapped && whole && "),
    Mutant("rows.cu", "false>(run, mine, run.skip, from_float<T>(-INFINITY)",
           "false>(run, mine, run.skip, from_float<T>(0.0f)"),
    Mutant("panels.cuh", "Partial own = {z[0], 0.0f, 0.0f};", "Partial own = {0.0f, 0.0f, 0.0f};"),
    Mutant("panels.cuh", "    sums[c % 4] += power;", "    sums[c % 4] = power;"),
    Mutant("panels.cuh", "return pack % kThreads == thread_x();", "return pack % kThreads == 0;"),
    Mutant("rows.cu", "if (row < 0 || row >= source.count) return;", "if (row < 0) return;"),
    Mutant("rows.cu", "whole = in.skip == out.skip && in.whole(first)", "whole = in.whole(first)"),
    Mutant("rows.cu", "if (!in.has(out.begin(k) + j)) pack", "if (false) pack"),
    Mutant("panels.cuh", "mode == kCapped ? y * slope : y", "y"),
    Mutant("rows.cu", "r < 0 ? 0 : vocab_size);", "vocab_size);"),
    # a row's scalars, steps
    Mutant("row_scalars.cuh", "plan.labels[n] >= 0 && plan.labels[n] < vocab_size",
           "plan.labels[n] >= 0 && plan.labels[n] <= vocab_size"),
    Mutant("row_scalars.cuh", "return plan.first[n] == n && known", "return known"),
    Mutant("row_scalars.cuh", "(best < 0 || logp[n] > logp[best])", "(best < 0 || logp[n] < logp[best])", LINEAR),
    Mutant("row_scalars.cu", "i >= plan.row_start[plan.R]) stats", "i > plan.row_start[plan.R]) stats"),
    Mutant("row_scalars.cuh", "row >= logits.count) {", "row > logits.count) {"),
    Mutant("row_scalars.cuh", "== likely ? others : s - e", "== likely ? s - e : s - e",
           survives="s - e is taken in fp64, which still has 1 - p to nine digits at p = 1 - 1e-7"),
    Mutant("row_scalars.cuh", "sum = part.s * factor;", "sum = part.s;"),
    Mutant("row_scalars.cuh", "if (n != likely && distinct", "if (distinct"),
    Mutant("row_scalars.cu", "i < end; i += kWarp) sum", "i < end; i += kWarp + 1) sum"),
    Mutant("row_scalars.cu", "begin + thread_x() % kWarp; i", "begin + 1 + thread_x() % kWarp; i"),
    Mutant("row_scalars.cu", "step_ids[step_order[N - 1]] >= S", "step_ids[step_order[N - 1]] > S"),
    Mutant("row_scalars.cuh", "s < 0 || s >= upstream.S", "s < 0 || s > upstream.S", sample=True),
    Mutant("row_scalars.cuh", "if (plan.first[other] == n) sum", "if (plan.first[other] >= n) sum"),
    Mutant("row_scalars.cuh", "if (plan.first[n] != likely) others", "if (n != likely) others", sample=True),
    Mutant("row_scalars.cuh", " - others * p : g - total * p", " : g - total * p"),
    Mutant("row_scalars.cuh", "known(plan, n, vocab_size) ? g : NAN", "g"),
    Mutant("step_logps.cu", "fill_bytes(owner, 0xff", "fill_bytes(owner, 0x00"),
    Mutant("step_logps.cu", "{factors, factors + R, nullptr", "{factors, factors + R - 1, nullptr"),
    # between the products
    Mutant("linear_rows.cu", "step = kPack<T> / 2; step", "step = kPack<T> / 4; step", LINEAR),
    Mutant("linear_rows.cu", "k < a.packs(); k += kWarp", "k + 1 < a.packs(); k += kWarp", LINEAR, True),
    Mutant("linear_rows.cu", "if (plan.first[equal] == n) label_z0", "if (equal == n) label_z0", LINEAR,
           survives="of equal predictions the kernels read the first one's logit alone"),
    Mutant("linear_rows.cu", "if (bias) z0", "if (false) z0", LINEAR),
    Mutant("linear_rows.cu", "(i > 0 && keys[i - 1] == label)", "false", LINEAR),
    Mutant("linear_rows.cu", "label < 0 || label >= V ||", "label < 0 || label > V ||", LINEAR),
    Mutant("linear_rows.cu", "sums[j] = scale * to_float", "sums[j] = scale + to_float", LINEAR),
    Mutant("linear_rows.cu", "int64_t j = i; j < N && keys[j] == label; ++j) {",
           "int64_t j = i; keys[j] == label; ++j) {", LINEAR),
    Mutant("linear_rows.cu", "float* const factors = reinterpret_cast<float*>(partial + partials);",
           "float* const factors = reinterpret_cast<float*>(partial + 1);", LINEAR,
           survives="the kernel that reads the partial sums has ended when the factors are written"),
    # rows held by clusters
    Mutant("cluster_rows.cu", "  sync_cluster();\n  if (rank == 0", "  if (rank == 0", CLUSTERS),
    Mutant("cluster_rows.cu", "  sync_cluster();\n  Factors by", "  Factors by", CLUSTERS),
    Mutant("cluster_rows.cu", "  sync_cluster();\n  Factors by", "  sync_threads();\n  Factors by", CLUSTERS),
    Mutant("cluster_rows.cu", "if (rank == 0 && ", "if (rank == 1 && ", CLUSTERS,
           survives="one block of the cluster does the scalars, whichever: all have at least two"),
    Mutant("cluster_rows.cu", "rank = static_cast<int>(block_x() % blocks);", "rank = 0;", CLUSTERS),
    Mutant("cluster_rows.cu", "kept * kWide * kColumns<mode> * static_cast<int64_t>(sizeof(T))",
           "kept * kWide * kColumns<mode>", CLUSTERS),
    Mutant("cluster_rows.cu", "begin + kept < panels ? kept : panels - begin", "kept", CLUSTERS),
    Mutant("cluster_rows.cu", "panel * kLoads * kWide + thread_x(), by", "thread_x(), by", CLUSTERS),
    Mutant("cluster_rows.cu", "to + k * kWide * kPack<T>", "to + k * kWide", CLUSTERS),
    Mutant("cluster_rows.cu", "out.whole(first) && out.whole(", "out.whole(", CLUSTERS),
    Mutant("cluster_rows.cu", "kEntropy>(own, slots, panel % 2", "kEntropy>(own, slots, 0", CLUSTERS),
    Mutant("cluster_rows.cu", "partials + ((begin + panel) * rows.count + i)", "partials + (panel * rows.count + i)",
           CLUSTERS),
    Mutant("cluster_rows.cu", "const bool scored = plan.rows[r] >= 0;", "const bool scored = true;", CLUSTERS),
    Mutant("cluster_rows.cu", "if (out.has(label) && holds", "if (holds", CLUSTERS),
    Mutant("cluster_rows.cu", "if (capability < 90 || panels < 2)", "if (panels < 2)", CLUSTERS),
    Mutant("cluster_rows.cu", "kept * panel_bytes > room", "panel_bytes > room", CLUSTERS),
    Mutant("row_scalars.cuh", "if (kLanes > 1) top = warp_max(top);", "", CLUSTERS),
    Mutant("row_scalars.cuh", "shuffle(sum, other)", "shuffle(sum, 0)", CLUSTERS),
    Mutant("row_scalars.cuh", "shuffle(moment, other)", "shuffle(moment, 0)", CLUSTERS),
    Mutant("row_scalars.cuh", "k < panels; k += kLanes) {", "k < 1; k += kLanes) {", CLUSTERS),
    Mutant("row_scalars.cuh", "k = lane; k < panels; k += kLanes)", "k = lane; k < kLanes; k += kLanes)", CLUSTERS),
    # the small ops
    Mutant("small.cuh", "i < 0 || i >= size", "i < 0 || i > size", LOSS),
    Mutant("small.cuh", "  sync_threads();\n", "", LOSS),
    Mutant("small.cuh", "slots[warp * kSums + i] = sums[i];", "slots[warp + i] = sums[i];", LOSS),
    Mutant("small.cuh", "slots[other * kSums + i];", "slots[other * kSums];", LOSS),
    Mutant("svpo_loss.cu", "half ^= kWarps", "half ^= 0", LOSS),
    Mutant("svpo_loss.cu", "step - first < kThreads ?", "step - first <= kThreads ?", LOSS),
    Mutant("svpo_loss.cu", "return step >= first && ", "return ", LOSS),
    Mutant("svpo_loss.cu", "before = (1u << lane) - 1;", "before = (2u << lane) - 1;", LOSS),
    Mutant("svpo_loss.cu", "if (other < warp) at += count;", "if (other <= warp) at += count;", LOSS),
    Mutant("svpo_loss.cu", "rank_slopes[at] = rank, ++at;", "rank_slopes[at] = rank;", LOSS),
    Mutant("svpo_loss.cu", "rank_slopes[at] = -rank;\n    }\n    sync_threads();",
           "rank_slopes[at] = -rank;\n    }", LOSS),
    Mutant("svpo_loss.cu", "other < total; ++other", "other < total - 1; ++other", LOSS),
    Mutant("svpo_loss.cu", "chunk < in.P + in.K;", "chunk < in.P;", LOSS),
    Mutant("svpo_loss.cu", "owners[at] = kThreads + chosen;", "owners[at] = chosen;", LOSS),
    Mutant("svpo_loss.cu", "if (members == 0.0) return 1.0;", "", LOSS),
    Mutant("svpo_loss.cu", "return weight != 0.0 ? weight * term : 0.0;", "return weight * term;", LOSS),
    Mutant("svpo_loss.cu", "if (!weighs && !own) return 0.0;", "", LOSS),
    Mutant("svpo_loss.cu", "sums[kRight] += chosen > rejected;", "sums[kRight] += chosen >= rejected;", LOSS),
    Mutant("step_policy.cu", "kTokens + k) * kThreads + thread_x()", "kTokens + 0) * kThreads + thread_x()", POLICY),
    Mutant("step_policy.cu", "if (counts) sums[kKl]", "sums[kKl]", POLICY),
    Mutant("step_policy.cu", "if (counts) sums[kEntropy]", "sums[kEntropy]", POLICY),
    Mutant("step_policy.cu", "double* const own = parts + block_x() * kParts;", "double* const own = parts;", POLICY),
    Mutant("step_policy.cu", "begin = s < 0 ? 0 : start[s]", "begin = s < 0 ? 0 : start[s] + 1", POLICY),
    Mutant("step_policy.cu", "share * totals[1], A);", "totals[1], A);", POLICY),
    Mutant("step_policy.cu", "weight_of(in.weights, order[begin])", "weight_of(in.weights, begin)", POLICY),
    Mutant("step_policy.cu", "if (own == 0.0) return 1.0;", "", POLICY),
    Mutant("step_policy.cu", "mean == mean ? largest : NAN", "largest", POLICY),
    Mutant("step_policy.cu", "block < blocks; block += kThreads", "block < blocks && block < 1; block += kThreads",
           POLICY),
    Mutant("step_policy.cu", "if (!weighs && !own) return 0.0;", "", POLICY),
    Mutant("small.cuh", "D - column >= kColumns && ", "D - column >= 1 && ", HEADS),
    Mutant("small.cuh", "(row + column) % 16 == 0;", "(row + column) % 8 == 0;", HEADS),
    Mutant("small.cuh", "x[i] = column + i < D ?", "x[i] = column + i <= D ?", HEADS),
    Mutant("small.cuh", "if (column + i < D) row[column + i]", "if (column + i <= D) row[column + i]", HEADS),
    Mutant("prm.cu", "return at >= 0 && at < B * L;", "return at >= 0 && at <= B * L;", HEADS),
    Mutant("prm.cu", "return data + at / L * stride_b + at % L * stride_l;",
           "return data + static_cast<int>(at / L * stride_b + at % L * stride_l);", HEADS),
    Mutant("prm.cu", "    if (hidden.positions[other] != at) continue;\n", "", HEADS),
    Mutant("prm.cu", "sums[kEarlier] += other < s;", "sums[kEarlier] += other <= s;", HEADS),
    Mutant("prm.cu", "    sync_threads();  // the chunk before has been read\n", "", HEADS),
    Mutant("prm.cu", "offset = kGroups; offset < kWarp;", "offset = 2 * kGroups; offset < kWarp;", HEADS),
    Mutant("prm.cu", "int warp = 1; warp < kTileWarps;", "int warp = 2; warp < kTileWarps;", HEADS),
    Mutant("prm.cu", "if (!known(s)) return {0.0, 0.0};", "", HEADS),
    Mutant("prm.cu", "mean && labelled > 0.0 ? 1.0 / labelled", "mean ? 1.0 / labelled", HEADS),
    Mutant("aggregate_scores.cu", "falls[0] += offsets[b] > offsets[b + 1];", "falls[0] += 0.0;", AGGREGATES),
    Mutant("aggregate_scores.cu", "if (a_nan != b_nan) return a_nan;", "if (a_nan != b_nan) return b_nan;", AGGREGATES),
    Mutant("aggregate_scores.cu", "return a.at < b.at;", "return a.at > b.at;", AGGREGATES),
    Mutant("aggregate_scores.cu", "i + 1 < end ? to_float(x[i + 1])", "i < end ? to_float(x[i + 1])", AGGREGATES),
    Mutant("aggregate_scores.cu", "carry = shuffle(product, kWarp - 1);", "carry = shuffle(product, 0);", AGGREGATES),
    Mutant("aggregate_scores.cu", "return out != 0.0 ? g *", "return true ? g *", AGGREGATES),
    Mutant("aggregate_scores.cu", "if (other >= 0 && other < kWarp) value *= there;", "value *= there;", AGGREGATES),
]


class Result(NamedTuple):
    mutant: Mutant
    caught: bool
    by: str
    seconds: float


def copy_sources(to: Path) -> Path:
    for part in ("csrc", "tests/cuda_emulation"):
        shutil.copytree(cuda_emulator.ROOT / part, to / part, dirs_exist_ok=True)
    return to


def run_cases(library: Path, cases: tuple[list[str], str]) -> tuple[bool, str]:
    """Whether all passed, and else by which test or sanitizer it was noticed."""
    files, chosen = cases
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "cuda_emulator", "-p", "no:cacheprovider", *files]
    env = environment(**cuda_emulator.environment(library))
    done = subprocess.run([*command, "-k", chosen], env=env, cwd=TESTS, capture_output=True, text=True, timeout=900)
    text = done.stdout + done.stderr
    if done.returncode == 0:
        return True, ""
    failed = re.search(r"FAILED \S+::(\S+)(?: - (.*))?", text)
    report = re.search(r"SUMMARY: (\S+: \S+)|runtime error: (.*)", text)
    if not failed and not report:
        # pytest has the descriptor that a sanitizer writes its report to, and was ended before its own summary.
        assert not re.search(r"\d+ (passed|failed|error)", text), f"neither passed, failed nor ended:\n{text[-4000:]}"
        return False, f"ended by signal {-done.returncode}" if done.returncode < 0 else "ended by a sanitizer"
    return False, f"{failed[1]} {failed[2] or ''}"[:90] if failed else (report[1] or report[2])[:90]


def run_mutant(mutant: Mutant, source: Path, objects: Path) -> Result:
    began = time.monotonic()
    path = source / "csrc" / "cuda" / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} has {text.count(mutant.old)} times, not once: {mutant.old!r}"
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        passed, by = run_cases(cuda_emulator.build(objects, root=source), mutant.cases)
    finally:
        path.write_text(text)
    return Result(mutant, not passed, by, time.monotonic() - began)


def run(mutants: list[Mutant], folder: Path) -> list[Result]:
    """Every mutant, two at a time, after the unchanged sources have passed the same cases."""
    sources, objects = queue.SimpleQueue(), folder / "objects"
    for name in ("first", "second"):
        sources.put(copy_sources(folder / name))
    library = cuda_emulator.build(objects, root=folder / "first")
    for cases in {mutant.cases[1]: mutant.cases for mutant in mutants}.values():
        passed, by = run_cases(library, cases)
        assert passed, f"the unchanged kernels fail {by}"

    def one(mutant: Mutant) -> Result:
        source = sources.get()
        try:
            return show(run_mutant(mutant, source, objects))
        finally:
            sources.put(source)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, mutants))


def show(result: Result) -> Result:
    change = f"{result.mutant.old.strip()} -> {result.mutant.new.strip() or '(nothing)'}".replace("\n", " ")
    word = "caught" if result.caught else "equal" if result.mutant.survives else "MISSED"
    print(f"{word:6} {result.seconds:4.0f} s  {result.mutant.file}: {change}"
          f"  | {result.by or result.mutant.survives}", flush=True)
    return result


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join([str(cuda_emulator.ROOT), os.environ.get("PYTHONPATH", "")])
    words = sys.argv[1:]
    chosen = [m for m in MUTANTS if not words or any(word in m.file or word in m.old + m.new for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        results = run(chosen, Path(folder))
    caught = sum(result.caught for result in results)
    missed = [result for result in results if not result.caught and not result.mutant.survives]
    print(f"{caught} of {len(results)} mutants caught, {len(missed)} missed")
    raise SystemExit(bool(missed))
