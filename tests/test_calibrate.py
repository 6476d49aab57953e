"""The importance matrix is what llama.cpp's own is, files are rounded by it as llama.cpp rounds them, and a
budget finds the smallest type that meets it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from forge import process, worker
from forge.codec import to_plain
from forge.data.prepare import TRAIN_FILE
from forge.errors import DataError, StageError
from forge.export.importance import read_importance, write_importance
from forge.export.run import GGUF_FILE
from forge.export.write import check_space
from forge.model.gguf_header import read_gguf
from forge.model.tokenizer_files import open_tokenizer
from forge.verify.activations import squares
from forge.verify.calibrate import CHOICE_FILE, IMPORTANCE_FILE, calibrate, smallest
from forge.verify.calibration import CalibrationRequest, Importance, TypeRow
from forge.verify.sample import TOKENS
from forge.verify.yardstick import make_quantized
from tests.exporting import export_here, ingredients
from tests.models import PEFT_WARNS, load, make_model
from tests.servers import llama_server
from tests.specimens import Specimen, make_specimen, source_of, write_rows

pytestmark = [pytest.mark.training, pytest.mark.timeout(1500), PEFT_WARNS]

SEARCHED = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "iq2_m")
LINEAR = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def ids_in(rows: Path) -> list[list[int]]:
    return [json.loads(line)["input_ids"] for line in rows.read_text(encoding="utf-8").splitlines()]


def exported(specimen: Specimen, out: Path, quant: str, **settings: Any) -> Path:
    """The GGUF of base and adapter that forge makes in the new directory `out`."""
    out.mkdir()
    fixed = {"name": "small", "quant": quant, "keep_merged": False, "threads": 2}
    export_here(**source_of(specimen), data=None, out=str(out), settings={**fixed, **settings})
    return out / GGUF_FILE


def inputs_of(model: Any, modules: Mapping[str, Any], rows: list[list[int]]) -> dict[str, Any]:
    """What each of `modules` reads of all tokens, as transformers computes it: (tokens, width)."""
    import torch

    seen: dict[str, list[Any]] = {name: [] for name in modules}
    for name, module in modules.items():
        module.register_forward_pre_hook(
            lambda _, given, name=name: seen[name].append(given[0].reshape(-1, given[0].shape[-1]))
        )
    with torch.inference_mode():
        for row in rows:
            model(torch.tensor([row]))
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_it_holds_the_mean_square_of_what_each_linear_layer_reads(tmp_path: Path) -> None:
    """Against transformers and peft's own merge, which know nothing of llama.cpp; rows of any length."""
    import numpy as np

    specimen = make_specimen(tmp_path / "llama")
    rows = [*ids_in(specimen.rows), ids_in(specimen.rows)[0][:3]]
    assert max(map(len, rows)) > 16 > min(map(len, rows))  # llama-imatrix would leave the short one out
    file = exported(specimen, tmp_path / "f32", "f32")
    write_importance(tmp_path / "made.gguf", squares(file, rows), len(rows), 64)
    found = read_importance(tmp_path / "made.gguf")
    model = load(specimen.base, specimen.adapter)
    layers = {
        f"blk.{number}.{ours}.weight": layer.get_submodule(name)
        for number, layer in enumerate(model.model.layers)
        for name, ours in LINEAR.items()
    }
    read = inputs_of(model, layers, rows)
    assert found.keys() == read.keys()
    for name, inputs in read.items():
        expected = np.square(inputs.numpy()).mean(axis=0)
        np.testing.assert_allclose(found[name][0], expected, rtol=2e-4, err_msg=name)


def test_each_expert_has_its_own(tmp_path: Path) -> None:
    """Only the tokens that the router sent to it count, for what goes in and for what comes between."""
    import numpy as np
    import torch

    base = make_model(tmp_path / "base", "mixtral", "home-made")
    specimen = Specimen(base, None, write_rows(base, tmp_path), tmp_path)
    rows = ids_in(specimen.rows)
    found = squares(exported(specimen, tmp_path / "f32", "f32"), rows)
    model = load(base)
    blocks = {str(number): layer.mlp for number, layer in enumerate(model.model.layers)}
    for number, inputs in inputs_of(model, blocks, rows).items():
        block = blocks[number]
        chosen = (inputs @ block.gate.weight.T).topk(2).indices
        for expert in range(4):
            own = inputs[(chosen == expert).any(dim=1)]
            gate, up = (own @ block.experts.gate_up_proj[expert].T).chunk(2, dim=1)
            between = torch.nn.functional.silu(gate) * up
            for name, values in (("gate", own), ("up", own), ("down", between)):
                sums, counts = found[f"blk.{number}.ffn_{name}_exps.weight"]
                assert counts[expert] == len(own) > 0
                np.testing.assert_allclose(
                    sums[expert], values.square().sum(dim=0).detach().numpy(), rtol=5e-4
                )


@pytest.mark.slow
@pytest.mark.programs
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_llama_imatrix_collects_the_same(architecture: str, tmp_path: Path) -> None:
    """Names, counts and sums are those of llama.cpp's own tool, and each reads the other's file."""
    import numpy as np

    base = make_model(tmp_path / "base", architecture, "home-made")
    specimen = Specimen(base, None, write_rows(base, tmp_path), tmp_path)
    file = exported(specimen, tmp_path / "f32", "f32")
    text = " ".join(f"There is bacon in house {number} of the river." for number in range(60))
    (tmp_path / "text").write_text(text, encoding="utf-8")
    ids = open_tokenizer(base).encode(text, add_special_tokens=False).ids
    rows = [ids[start : start + 64] for start in range(0, len(ids) - 63, 64)]
    found, ours, theirs = squares(file, rows), tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    write_importance(ours, found, len(rows), 64)
    tool = llama_server().with_name("llama-imatrix")
    command = [tool, "-m", file, "-f", tmp_path / "text", "-c", 64, "-b", 64, "-o", theirs, "--no-ppl"]
    finished = process.run([*map(str, command), "--in-file", str(ours)], directory=tmp_path)
    assert finished.status == 0, finished.output
    both, mine = read_importance(theirs), read_importance(ours)
    assert both.keys() == mine.keys() == found.keys()
    for name, means in mine.items():
        # The mean over both files together; the tool's attention cache is float16.
        np.testing.assert_allclose(both[name], means, rtol=5e-3, err_msg=name)
    sums, twice = read_gguf(ours).tensors, read_gguf(theirs).tensors
    assert sums.keys() == twice.keys()
    for name, (_, counts) in found.items():
        at = twice[f"{name}.counts"].start
        assert np.fromfile(theirs, np.float32, counts.size, offset=at).tolist() == (2 * counts).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("quant", ["q4_k_m", "q2_k", "iq4_xs", "iq3_xxs", "iq2_m"])
def test_the_bytes_are_llama_cpps_own(architecture: str, quant: str, tmp_path: Path) -> None:
    """The same file as llama_model_quantize with the same matrix makes of the converted checkpoint."""
    base = make_model(tmp_path / "base", architecture, "home-made", tie_word_embeddings=False)
    specimen = Specimen(base, None, write_rows(base, tmp_path), tmp_path)
    converted = exported(specimen, tmp_path / "bf16", "bf16")
    matrix = tmp_path / "matrix.gguf"
    write_importance(matrix, squares(converted, ids_in(specimen.rows)), 16, 64)
    vendor = make_quantized(converted, tmp_path / "vendor.gguf", quant, 2, matrix)
    ours = exported(specimen, tmp_path / "ours", quant, importance=str(matrix))
    assert ours.read_bytes() == vendor.read_bytes()
    if quant in ("iq3_xxs", "iq2_m"):
        with pytest.raises(StageError, match=f"{quant} needs an importance matrix"):
            exported(specimen, tmp_path / "without", quant)
    else:
        without = exported(specimen, tmp_path / "without", quant)
        assert without.read_bytes() != ours.read_bytes()


def test_an_expert_that_no_token_came_to_is_rounded_evenly(tmp_path: Path) -> None:
    import numpy as np

    sums, counts = np.array([[2.0, 4.0], [0.0, 0.0]]), np.array([2.0, 0.0])
    write_importance(tmp_path / "made.gguf", {"blk.0.ffn_up_exps.weight": (sums, counts)}, 1, 2)
    [(name, means)] = read_importance(tmp_path / "made.gguf").items()
    assert name == "blk.0.ffn_up_exps.weight"
    assert means.tolist() == [[1.0, 2.0], [1.0, 1.0]]


def test_another_file_is_no_importance_matrix(tmp_path: Path) -> None:
    specimen = make_specimen(tmp_path / "llama")
    file = specimen.f16(tmp_path / "f16")
    with pytest.raises(DataError, match="is no importance matrix"):
        read_importance(file)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a specimen and what a search of a middling budget left of it."""
    root = tmp_path_factory.mktemp("search")
    specimen = make_specimen(root / "specimen")
    (root / "facts.json").write_text(json.dumps(search(specimen, root / "out", 0.01)), encoding="utf-8")
    return root


def search(specimen: Specimen, out: Path, max_kl: float, types: tuple[str, ...] = ()) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    request = CalibrationRequest(
        ingredients({}, **source_of(specimen)),
        rows=specimen.rows,
        measured_rows=specimen.rows,
        out=out,
        name="small",
        types=types or SEARCHED,
        max_kl=max_kl,
        threads=2,
    )
    return dict(calibrate(request).facts())


def test_the_smallest_type_within_the_budget_is_found(searched: Path) -> None:
    """From the largest down; two in a row over it end their kind. Nothing is left of the tries."""
    facts = json.loads((searched / "facts.json").read_text(encoding="utf-8"))
    names = [one["quant"] for one in facts["types"]]
    within = [one for one in facts["types"] if one["kl_mean"] <= 0.01]
    assert facts["quant"] == min(within, key=lambda one: one["bytes"])["quant"]
    assert [one["quant"] for one in within] == ["q8_0", "q6_k"]
    assert tuple(names) == SEARCHED[:4] and tuple(facts["left_out"]) == SEARCHED[4:]
    assert {*facts["left_out"].values()} == {"two larger types of its kind are over the budget"}
    [warning] = facts["warnings"]
    assert warning.startswith("no rows are held out")
    assert facts["f16"]["kl_mean"] == 0 and facts["f16"]["top1"] == 1
    assert all(one["tokens_per_second"] > 0 and one["perplexity"] > 1 for one in facts["types"])
    assert {path.name for path in (searched / "out").iterdir()} == {IMPORTANCE_FILE, CHOICE_FILE}
    assert json.loads((searched / "out" / CHOICE_FILE).read_text()) == {"quant": facts["quant"]}


def test_the_measured_loss_is_that_of_the_file_that_is_exported(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What verify finds between f16 and the exported file of that type is the table's figure."""
    monkeypatch.setattr("forge.verify.measure._LOOKS", (TOKENS,))  # all rows at once, as the search has them
    facts = json.loads((searched / "facts.json").read_text(encoding="utf-8"))
    base = searched / "specimen"
    specimen = Specimen(base / "base", base / "adapter", base / TRAIN_FILE, tmp_path)
    matrix = str(searched / "out" / IMPORTANCE_FILE)
    file = exported(specimen, tmp_path / "file", facts["quant"], importance=matrix)
    found = specimen.measure(file, importance=matrix)
    row = next(one for one in facts["types"] if one["quant"] == facts["quant"])
    assert found.legs.file_against_f16 is not None
    assert found.legs.file_against_f16.kl_mean == pytest.approx(row["kl_mean"], rel=1e-6)
    assert file.stat().st_size == row["bytes"]


def test_a_stopped_search_goes_on_with_the_next_type(searched: Path, tmp_path: Path) -> None:
    base = searched / "specimen"
    specimen = Specimen(base / "base", base / "adapter", base / TRAIN_FILE, tmp_path)
    kept = json.loads((searched / "facts.json").read_text(encoding="utf-8"))["types"][0]
    work = tmp_path / "out" / "work"
    work.mkdir(parents=True)
    (work / "f16").mkdir()  # of an F16 file that was not finished
    whole = json.dumps(kept | {"kl_mean": 0.009})
    (work / "measured.jsonl").write_text(f'{whole}\n{{"quant": "q6_k", "by')
    facts = search(specimen, tmp_path / "out", 0.01, ("q8_0", "q6_k"))
    assert [one["kl_mean"] for one in facts["types"]] == [0.009, pytest.approx(facts["types"][1]["kl_mean"])]
    assert facts["quant"] == "q6_k"


def test_below_four_bits_each_kind_of_types_ends_by_itself(searched: Path, tmp_path: Path) -> None:
    """What is known already stands in for measuring: K types that are too bad say nothing of IQ types."""
    base = searched / "specimen"
    specimen = Specimen(base / "base", base / "adapter", base / TRAIN_FILE, tmp_path)
    row = json.loads((searched / "facts.json").read_text(encoding="utf-8"))["types"][0]
    losses = {"q8_0": 0.001, "q4_k_m": 0.02, "q3_k_m": 0.03, "iq2_m": 0.009, "iq2_s": 0.02, "iq2_xs": 0.02}
    known = [
        {**row, "quant": kind, "kl_mean": kl, "bytes": 9 - at} for at, (kind, kl) in enumerate(losses.items())
    ]
    work = tmp_path / "out" / "work"
    work.mkdir(parents=True)
    (work / "measured.jsonl").write_text("".join(json.dumps(one) + "\n" for one in known), encoding="utf-8")
    types = ("q8_0", "q4_k_m", "q3_k_m", "q2_k", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs")
    facts = search(specimen, tmp_path / "out", 0.01, types)
    assert [one["quant"] for one in facts["types"]] == list(losses)
    assert list(facts["left_out"]) == ["q2_k", "iq2_xxs"] and facts["quant"] == "iq2_m"


@pytest.mark.programs
def test_a_search_that_was_killed_early_goes_on_in_a_process_of_its_own(
    searched: Path, tmp_path: Path
) -> None:
    """The F16 file is there, the matrix is not, and a type that was being tried left its file."""
    base = searched / "specimen"
    specimen = Specimen(base / "base", base / "adapter", base / TRAIN_FILE, tmp_path)
    work = tmp_path / "out" / "work"
    (work / "q8_0-killed").mkdir(parents=True)
    exported(specimen, work / "f16", "f16")
    (work / "importance.json").write_text("{}")
    request = CalibrationRequest(
        ingredients({}, **source_of(specimen)),
        rows=specimen.rows,
        measured_rows=specimen.rows,
        out=tmp_path / "out",
        name="small",
        types=("q8_0",),
        max_kl=1.0,
        threads=2,
    )
    calibrated = worker.perform(calibrate, request)
    assert calibrated.search and calibrated.search.quant == "q8_0" and calibrated.importance.weights > 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {IMPORTANCE_FILE, CHOICE_FILE}


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_what_goes_wrong_inside_llama_cpp_is_not_swallowed(
    failure: type[BaseException], searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C comes while llama.cpp computes: no matrix of half the products may come of it."""
    base = searched / "specimen"
    specimen = Specimen(base / "base", base / "adapter", base / TRAIN_FILE, tmp_path)
    file = exported(specimen, tmp_path / "f16", "f16")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr("forge.verify.activations._Watch._add", fail)
    with pytest.raises(failure):
        squares(file, ids_in(specimen.rows)[:1])


def test_a_weight_that_the_matrix_does_not_know_gets_no_lowest_type(searched: Path, tmp_path: Path) -> None:
    """As llama.cpp has it; told before any weight is read."""
    base = searched / "specimen"
    specimen = Specimen(base / "base", base / "adapter", base / TRAIN_FILE, tmp_path)
    file = exported(specimen, tmp_path / "f16", "f16")
    found = dict(squares(file, ids_in(specimen.rows)[:2]))
    del found["blk.1.attn_q.weight"]
    write_importance(tmp_path / "some.gguf", found, 2, 64)
    with pytest.raises(
        StageError, match=r"blk\.1\.attn_q\.weight would be (IQ2_S|IQ3_XXS), and the importance"
    ):
        exported(specimen, tmp_path / "low", "iq3_xxs", importance=str(tmp_path / "some.gguf"))


def test_iq_files_are_verified_with_their_matrix_and_without(searched: Path, tmp_path: Path) -> None:
    """Without it there is no file of llama.cpp's own to hold it against: nothing is certified."""
    base = searched / "specimen"
    specimen = Specimen(base / "base", base / "adapter", base / TRAIN_FILE, tmp_path)
    matrix = str(searched / "out" / IMPORTANCE_FILE)
    file = exported(specimen, tmp_path / "file", "iq3_xxs", importance=matrix)
    assert {"IQ3_XXS", "IQ3_S"} & read_gguf(file).tensor_types.keys()
    certificate = specimen.verify(file, importance=matrix)
    assert certificate["ok"], certificate["problems"]
    assert certificate["handovers"][-1]["beyond_vendor"] == pytest.approx(1, abs=0.05)
    with pytest.raises(DataError, match="nothing says how much the type may lose") as caught:
        specimen.verify(file)
    assert "--imatrix" in caught.value.hint
    other = str(tmp_path / "other.gguf")
    write_importance(Path(other), {"blk.99.ffn_up.weight": tuple(map(_ones, ((1, 256), (1,))))}, 1, 64)
    with pytest.raises(DataError, match="another model's importance matrix"):
        specimen.verify(file, importance=other)


def _ones(shape: tuple[int, ...]) -> Any:
    import numpy as np

    return np.ones(shape)


def test_a_full_disk_ends_the_search(searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing of the types: what was measured is kept, and none is chosen for want of room."""
    base = searched / "specimen"
    specimen = Specimen(base / "base", base / "adapter", base / TRAIN_FILE, tmp_path)
    before = check_space

    def full(directory: Path, needed: int) -> None:
        before(directory, 10**15 if "q6_k-" in str(directory) else needed)

    monkeypatch.setattr("forge.export.write.check_space", full)
    with pytest.raises(StageError, match=r"the GGUF needs 1000000\.00 GB"):
        search(specimen, tmp_path / "out", 0.01)
    kept = (tmp_path / "out" / "work" / "measured.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["quant"] for line in kept] == ["q8_0"]
    assert not (tmp_path / "out" / CHOICE_FILE).exists()


def test_a_type_that_cannot_be_made_is_left_out_with_the_reason(searched: Path, tmp_path: Path) -> None:
    """The matrix knows a weight too few for the lowest types; the search goes on with the others."""
    base = searched / "specimen"
    specimen = Specimen(base / "base", base / "adapter", base / TRAIN_FILE, tmp_path)
    work = tmp_path / "out" / "work"
    work.mkdir(parents=True)
    exported(specimen, work / "f16", "f16")
    found = dict(squares(work / "f16" / GGUF_FILE, ids_in(specimen.rows)[:2]))
    del found["blk.1.attn_q.weight"]
    write_importance(work / IMPORTANCE_FILE, found, 2, 64)
    (work / "importance.json").write_text(json.dumps(to_plain(Importance(1, 2, 64, 0))))
    facts = search(specimen, tmp_path / "out", 100.0, ("iq3_xxs", "q2_k", "iq2_m"))
    assert [one["quant"] for one in facts["types"]] == ["q2_k"] and facts["quant"] == "q2_k"
    assert list(facts["left_out"]) == ["iq3_xxs", "iq2_m"]
    assert all("the importance matrix says nothing of it" in why for why in facts["left_out"].values())


def test_the_smallest_is_chosen_by_bytes_and_not_by_place() -> None:
    figures = {"tokens_per_second": 1.0, "kl_error": 0.0, "kl_max": 1.0, "top1": 1.0, "perplexity": 2.0}
    table = [
        TypeRow("q8_0", 80, kl_mean=0.001, **figures),
        TypeRow("q5_k_m", 50, kl_mean=0.02, **figures),
        TypeRow("q4_k_m", 52, kl_mean=0.01, **figures),
        TypeRow("q3_k_m", 30, kl_mean=0.2, **figures),
    ]
    assert smallest(table, 0.05) == "q5_k_m"
    assert smallest(table, 0.015) == "q4_k_m"
    assert smallest(table, 1e-6) is None
