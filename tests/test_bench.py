"""The benchmarks' arithmetic and verdicts. Nothing is measured against a limit here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench import gpu, measure
from bench.measure import BenchmarkError, Outcome, best_of, interleaved, median_ratio, peak_of, run
from bench.measure import Run as Measured
from bench.training import RECIPE, Trained, refuse_other_work
from bench.workplace import Workplace, workplace
from forge.recipe.load import load

ROOT = Path(__file__).parent.parent
FACTS: Mapping[str, str | int] = {"cpu": "one", "cores": 2}
FAST = Outcome("fast", 0.9, "x", 1.05, [0.8, 0.9, 1.0], "3 pairs")
SLOW = Outcome("slow", 3.0, "s", 2.0, [3.0])
TOLD = Outcome("memory", 9.0, "x")


def test_the_ratio_is_the_median_of_the_pairs_and_not_of_the_sides() -> None:
    # Medians of the sides: 2 / 2. One pair fell into a slow moment of the machine.
    assert median_ratio([(1.0, 2.0), (2.0, 1.0), (30.0, 20.0)]) == (1.5, [0.5, 2.0, 1.5])


def test_pairs_alternate_in_who_goes_first() -> None:
    order: list[str] = []

    def one(name: str) -> str:
        order.append(name)
        return f"{name}{len(order)}"

    pairs = interleaved(3, lambda: one("a"), lambda: one("b"))
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert pairs == [("a1", "b2"), ("a4", "b3"), ("a5", "b6")]


def test_the_best_counts_and_the_first_run_does_not() -> None:
    times = iter([0.1, 5.0, 4.0, 6.0])
    assert best_of(3, lambda: Measured(next(times), 0.0, 0, "")) == (4.0, [5.0, 4.0, 6.0])


@pytest.mark.programs
def test_a_program_is_measured_from_outside(tmp_path: Path) -> None:
    inner = "import time\nx = bytearray(200 << 20)\nwhile time.process_time() < 0.4: pass"
    code = (
        "import os, subprocess, sys, time;"
        f"subprocess.run([sys.executable, '-c', {inner!r}], check=True);"
        "time.sleep(0.2); print(os.environ['WORD'], os.getcwd())"
    )
    # From a small process, as `python -m bench` is one; the test session is larger than `inner`.
    outer = (
        "import dataclasses, json, sys; from pathlib import Path; from bench.measure import run;"
        "measured = run([sys.executable, '-c', sys.argv[1]], directory=Path(sys.argv[2]),"
        " environment={'WORD': 'yes'});"
        "print(json.dumps(dataclasses.asdict(measured)))"
    )
    command = [sys.executable, "-c", outer, code, str(tmp_path)]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    measured = Measured(**json.loads(printed))
    assert measured.output == f"yes {tmp_path.resolve()}\n"
    assert measured.seconds > 0.6
    # Its own child is the one that is busy and large.
    assert measured.cpu_seconds > 0.4
    assert 200 << 20 < measured.peak_rss_bytes < 400 << 20


@pytest.mark.programs
def test_a_program_that_fails_is_no_figure(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"(?s)^status 3: .*\nbecause$"):
        run([sys.executable, "-c", "import sys; print('because'); sys.exit(3)"], directory=tmp_path)


@pytest.mark.programs
def test_the_memory_of_a_program_and_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = "import time; x = bytearray(200 << 20); time.sleep(1)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{inner}'], check=True)"
    peak, seconds = peak_of([sys.executable, "-c", outer], directory=tmp_path)
    assert 200 << 20 < peak < 400 << 20
    assert 1 < seconds < 60
    with pytest.raises(BenchmarkError, match="because"):
        peak_of([sys.executable, "-c", "import sys; sys.exit('because')"], directory=tmp_path)
    # As where there is no /proc: a memory of nothing would hold every limit.
    monkeypatch.setattr(measure, "_anonymous", lambda pid: 0)
    with pytest.raises(BenchmarkError, match="nothing was seen of the memory of true"):
        peak_of(["true"], directory=tmp_path)


@pytest.mark.programs
@pytest.mark.training
def test_random_weights_are_the_same_in_every_run() -> None:
    code = (
        "from bench.random_model import random_tensor; "
        "print(random_tensor('lm_head.weight', 'F32', (2, 3)).load().tolist())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(printed) == 1
    assert len({value for row in json.loads(printed.pop()) for value in row}) == 6


@pytest.mark.parametrize(
    ("outcomes", "failures", "code"),
    [([FAST, TOLD], {}, 0), ([FAST, SLOW], {}, 5), ([FAST, SLOW], {"ship": "why"}, 4), ([], {}, 0)],
)
def test_exit_codes(outcomes: list[Outcome], failures: dict[str, str], code: int) -> None:
    assert bench.finish(FACTS, outcomes, failures, None) == code


def test_a_value_at_its_limit_holds() -> None:
    assert Outcome("edge", 1.05, "x", 1.05).ok
    assert not Outcome("edge", 1.0501, "x", 1.05).ok


def test_the_table_and_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    bench.finish(FACTS, [FAST, SLOW, TOLD], {"ship": "no disk"}, out)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "cpu one, cores 2",
        "ok       fast                                    0.900 x  limit 1.05 x   3 pairs",
        "MISSED   slow                                    3.000 s  limit 2 s",
        "told     memory                                  9.000 x",
        "FAILED   ship",
    ]
    written = json.loads(out.read_text())
    assert set(written) == {"when", "machine", "outcomes", "failures"}
    assert written["machine"] == FACTS
    assert written["failures"] == {"ship": "no disk"}
    assert written["outcomes"][1] == {
        "name": "slow", "value": 3.0, "unit": "s", "limit": 2.0, "samples": [3.0], "note": "", "ok": False,
    }  # fmt: skip


def test_each_named_benchmark_runs_in_a_place_of_its_own(
    forge_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places: list[Workplace] = []

    def good(place: Workplace, pairs: int) -> Iterator[Outcome]:
        assert (place.home / "tools").resolve() == (forge_home / "tools").resolve()
        places.append(place)
        yield Outcome("good", pairs, "x", 3.0)

    def broken(place: Workplace, pairs: int) -> Iterator[Outcome]:
        places.append(place)
        yield SLOW
        raise BenchmarkError("it fell over")

    monkeypatch.setattr(bench, "BENCHMARKS", {"broken": broken, "good": good})
    assert bench.main(["good", "--pairs", "3"]) == 0
    assert bench.main(["good", "--pairs", "4"]) == 5
    assert bench.main([]) == 4
    printed = capsys.readouterr().out
    assert "  failed: it fell over" in printed
    assert len({place.home for place in places}) == 4
    assert not any(place.home.exists() for place in places)


def test_without_tools_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORGE_HOME", str(tmp_path / "nothing"))
    assert bench.main(["startup"]) == 4
    assert "forge setup" in capsys.readouterr().out


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*bench.BENCHMARKS]
    assert {"startup", "training", "ship", "export", "verify", "serve"} <= bench.BENCHMARKS.keys()
    assert all(line.endswith(".") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["typo"], "no benchmark typo; there is startup, training, ship, export"),
        (["--pairs", "0"], "argument --pairs: at least 1"),
        (["--pairs", "many"], "argument --pairs: invalid"),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_trainings_that_did_different_work_are_not_compared() -> None:
    def trained(loss: float) -> Trained:
        return Trained(Measured(1.0, 1.0, 1, ""), loss, 1.0)

    # Means of 30 real steps: forge, the same loop in trl, and trl's with adapters in bfloat16.
    forge, same, other = trained(3.332920), trained(3.332920), trained(3.336497)
    refuse_other_work([(forge, same)])
    with pytest.raises(BenchmarkError, match=r"forge 3\.332920, plain trl 3\.336497"):
        refuse_other_work([(forge, same), (forge, other)])


def test_the_recipe_that_is_measured_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "training.yaml"
    path.write_text(RECIPE)
    loaded = load(path, ())
    assert loaded.warnings == ()
    assert loaded.recipe.deploy.runtime == "none"


PLANNED = {"base": 900, "activations": 100, "CUDA context": 600}


@pytest.mark.parametrize(
    ("peak", "ratio", "ok"), [(1000, 1.0, True), (1250, 1.25, False), (800, 1.25, False)]
)
def test_b7_memory_on_a_gpu_is_held_to_what_was_planned(peak: int, ratio: float, ok: bool) -> None:
    trained = {"seconds": 2.0, "peak_memory_bytes": peak, "compute": "bfloat16"}
    speed, memory = gpu.outcomes("LoRA", 512, PLANNED, trained, has_gpu=True)
    assert (speed.value, speed.limit) == (256.0, None)
    assert memory.value == pytest.approx(ratio)
    assert memory.ok is ok


def test_what_a_machine_lacks_is_not_measured_and_what_fails_is_told() -> None:
    lacks = BenchmarkError("status 3: forge train\nerror: train.liger: no GPU\nhint: leave it out")
    outcome = gpu.not_measured("Liger", lacks)
    assert (outcome.value, outcome.note, outcome.ok) == (None, "train.liger: no GPU", True)
    assert bench.row(outcome).split() == ["none", "Liger", "train.liger:", "no", "GPU"]
    with pytest.raises(BenchmarkError, match="out of memory"):
        gpu.not_measured("LoRA", BenchmarkError("status 4: forge train\nerror: out of memory"))


@pytest.mark.slow
@pytest.mark.programs
@pytest.mark.training
def test_the_gpu_s_benchmark_runs_on_a_processor(forge_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = {name: gpu.METHODS[name] for name in ("LoRA, 16 bits", "LoRA, packing", "LoRA, Liger")}
    monkeypatch.setattr(gpu, "METHODS", methods)
    monkeypatch.setattr(gpu, "TABLE", ("eager",))
    with workplace(small=True) as place:
        measured = {outcome.name: outcome for outcome in gpu.measure(place, 1)}
    assert measured["LoRA, Liger"].value is None and measured["LoRA, Liger"].note.startswith("train.liger: ")
    plain, packed = (measured[f"LoRA, {name}: tokens a second"] for name in ("16 bits", "packing"))
    assert plain.note.split()[0] == packed.note.split()[0]
    assert {"eager, short: memory", "eager, long, checkpointing: tokens a second"} <= measured.keys()
    assert all(outcome.limit is None for outcome in measured.values())
