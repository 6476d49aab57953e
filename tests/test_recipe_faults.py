"""Recipes that are wrong: every fault in plain words, with its line, all at once, exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.errors import RecipeError
from forge.recipe.fields import all_names, sections
from forge.recipe.load import load

GOOD = "name: small\nbase: builtin:tiny\ndata: {source: builtin:yoda}\n"


def refused(text: str | bytes, *overrides: str) -> list[str]:
    """What is said of the file recipe.yaml in the working directory."""
    Path("recipe.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(RecipeError) as failure:
        load(Path("recipe.yaml"), overrides)
    assert failure.value.code == 2
    assert failure.value.hint
    assert "\n" not in failure.value.message
    assert failure.value.problems
    return [str(problem) for problem in failure.value.problems]


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("value", ['"a\\0b"', ".nan", "1e300", "-1e300", "[[1]]", "{a: {b: 1}}", "''"])
def test_no_field_takes_what_no_field_can_hold(value: str) -> None:
    leaves = [name for name in all_names() if name not in sections() and "*" not in name]
    leaves = [name for name in leaves if name not in ("train.from", "train.revision", "export.quant.max_kl")]
    faults = refused(GOOD, *(f"{name}={value}" for name in leaves))
    untouched = [name for name in leaves if not any(fault.startswith(f"-o {name}: ") for fault in faults)]
    assert untouched == []
    assert max(map(len, faults)) < 1200 and not any("is not valid (got" in fault for fault in faults)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("train.max_steps=2147483648", "must be at most 2147483647 (got 2147483648)"),
        ("train.batch_size=2147483648", "must be a whole number from 1 to 2147483647, or auto"),
        ("train.liger=1", "must be true, false or auto (got 1)"),
        ("train.gradient_checkpointing=0", "must be true, false or auto (got 0)"),
        ("train.devices=[{}]", "must be a whole number from 1 to 2147483647, auto, or a list"),
        ("train.epochs=1e7", "must be at most 1000000 (got 10000000.0)"),
        ("base=" + "x" * 300, "is neither a path nor an id of the hub"),
        ("data.eval=" + "x" * 300, "is neither a path nor an id of the hub"),
        ("base.revision=abc", "builtin:tiny has none, only a model of the hub does; leave it out"),
        ("deploy.host=http://here", "must be an address or the name of a computer"),
        ("deploy.host=../../etc/passwd", "must be an address or the name of a computer"),
    ],
)
def test_what_the_tools_behind_could_not_hold(said: str, words: str) -> None:
    [fault] = refused(GOOD, said)
    assert words in fault


def test_three_faults_give_three_lines() -> None:
    text = GOOD + "train:\n  learning_rat: 3e-4\n  lora:\n    r: 0\n  epochs: many\n"
    assert refused(text) == [
        "recipe.yaml:5: train.learning_rat: unknown key; did you mean learning_rate?",
        "recipe.yaml:7: train.lora.r: must be at least 1 (got 0)",
        'recipe.yaml:8: train.epochs: must be a number (got "many")',
    ]


def test_faults_of_every_kind_are_told_together() -> None:
    """An old name without counterpart, a missing file, a duplicate, a section's rule, an override."""
    text = """\
name: a b
base: builtin:tinny
data:
  source: data/train.jsonl
train:
  evals_per_epoch: 5
  seed: 1
  seed: 2
smoke:
  - expect: x
  - prompt: x
    expect: (
"""
    assert refused(text, "train.epochs=-1", "nonsense") == [
        "recipe.yaml:1: name: must be usable as a file name: letters, digits, '.', '_' and '-', "
        'a letter or digit first, at most 64 (got "a b")',
        "recipe.yaml:2: base: there is no builtin:tinny; there is builtin:tiny, builtin:smollm2",
        f"recipe.yaml:4: data.source: no such file: data/train.jsonl (looked in {Path('data').resolve()})",
        "recipe.yaml:6: train.evals_per_epoch: is not a field: held-out rows are evaluated in batches of "
        "train.batch_size, every train.evaluation_steps steps",
        "recipe.yaml:8: train.seed: is written twice (the first is on line 7); keep one",
        "recipe.yaml:10: smoke.0: needs either prompt or messages",
        "recipe.yaml:12: smoke.1.expect: is not a regular expression: missing ), unterminated subpattern "
        'at position 0 (got "(")',
        "-o nonsense: must look like key=value",
        "-o train.epochs: must be greater than 0 (got -1)",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "recipe.yaml: is empty"),
        ("# nothing\n---\n", "recipe.yaml: is empty"),
        ("- a\n- b\n", "recipe.yaml: is not a mapping of fields such as `name: yoda`"),
        ("just words\n", "recipe.yaml: is not a mapping of fields such as `name: yoda`"),
        (b"name: \xff\xfe\n", "recipe.yaml: is not UTF-8 text"),
        ("name: a\n\tbase: x\n", "recipe.yaml:2: is not valid YAML: a tab; YAML indents with spaces"),
        (
            "name: a: b\n",
            "recipe.yaml:1: is not valid YAML: a ': ' where none may stand (put the text in quotes), "
            "or wrong indentation above",
        ),
        (
            "a: 1\n---\nb: 2\n",
            "recipe.yaml:2: is not valid YAML: a second document ('---'); a recipe is one",
        ),
        ("a: 1\nb: \x07\n", "recipe.yaml:2: holds a control character, which YAML does not allow"),
        (
            "a: 1\n b: 2\n   c\n",
            "recipe.yaml:2: is not valid YAML: a ': ' where none may stand (put the text in quotes), "
            "or wrong indentation above",
        ),
        (
            "a:\n  b: 1\n c: 2\n",
            "recipe.yaml:3: is not valid YAML: a line that does not fit those above: its indentation, "
            "or a missing ':' or quote",
        ),
        ("[" * 500, "recipe.yaml:1: is nested too deeply"),
        ("b: 1\na: 'open\n\n", "recipe.yaml:2: is not valid YAML: a bracket or a quote that is not closed"),
        ("b: 1\na: [1\n\n", "recipe.yaml:2: is not valid YAML: a bracket or a quote that is not closed"),
    ],
)
def test_files_that_are_no_recipe(text: str | bytes, said: str) -> None:
    assert refused(text) == [said]


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, said in (
        (tmp_path / "none.yaml", "no such recipe"),
        (tmp_path, "is a directory, not a recipe"),
        (tmp_path / "file" / "recipe.yaml", "cannot be read: Not a directory"),
    ):
        with pytest.raises(RecipeError) as failure:
            load(path)
        assert [str(problem) for problem in failure.value.problems] == [f"{path}: {said}"]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("nam: x", "nam: unknown key; did you mean name?"),
        ("train: {alpha: 3}", "train.alpha: unknown key; did you mean train.lora.alpha?"),
        ("learning_rate: 3e-4", "learning_rate: unknown key; did you mean train.learning_rate?"),
        ("learning_rte: 3e-4", "learning_rte: unknown key; did you mean train.learning_rate?"),
        ("seed: 3", "seed: unknown key; did you mean data.seed or train.seed?"),
        ("export: {quant: {max_kl: 0}}", "export.quant.max_kl: must be greater than 0 (got 0)"),
        (
            "export: {quant: {}}",
            "export.quant.max_kl: is required: mean KL divergence (nats) from F16 on held-out rows, at most",
        ),
        ("export: {quant: [q8_0, Q8_0]}", "export.quant: names a type twice"),
        ("export: {quant: []}", "export.quant: must hold at least 1 (got a list)"),
        (
            "export: {quant: [q4_k_m, iq2_m]}",
            "export.quant: iq2_m needs an importance matrix; set export.imatrix: true",
        ),
        (
            "export: {quant: iq2_m}",
            "export.quant: iq2_m needs an importance matrix; set export.imatrix: true",
        ),
        (
            "export: {quant: f16, imatrix: true}",
            "export.imatrix: f16 is not rounded by importance; leave it out",
        ),
        (
            "export: {quant: {max_kl: 0.1}, mode: auto}",
            "export.quant: looks at one merged model; use export.mode: merged",
        ),
        (
            "export: {imatrix: true, mode: adapter}",
            "export.imatrix: looks at one merged model; use export.mode: merged",
        ),
        (
            "export: {zzzz: 1}",
            "export.zzzz: unknown key; known here: mode, quant, imatrix, merge_base, keep_merged",
        ),
        ("train: {epochs: '3'}", 'train.epochs: must be a number (got "3")'),
        ("train: {epochs: 0}", "train.epochs: must be greater than 0 (got 0)"),
        ("train: {epochs: .nan}", "train.epochs: must be a finite number (got nan)"),
        (
            "train: {batch_size: 1.5}",
            "train.batch_size: must be a whole number from 1 to 2147483647, or auto (got 1.5)",
        ),
        (
            "train: {batch_size: true}",
            "train.batch_size: must be a whole number from 1 to 2147483647, or auto (got true)",
        ),
        ("train: {learning_rate: 0}", "train.learning_rate: must be greater than 0 (got 0)"),
        ("train: {learning_rate: }", "train.learning_rate: must be a number (got nothing)"),
        ("train: {packing: yes}", 'train.packing: must be true or false (got "yes")'),
        ("train: {warmup_fraction: 1}", "train.warmup_fraction: must be below 1 (got 1)"),
        ("train: {lora: {dropout: 1.0}}", "train.lora.dropout: must be below 1 (got 1.0)"),
        ("train: {lora: {alpha: 0}}", "train.lora.alpha: must be at least 1 (got 0)"),
        ("train: {lora: [r, 8]}", "train.lora: must be a mapping of fields (got a list)"),
        ("train: {lora: {modules_to_save: x}}", 'train.lora.modules_to_save: must be a list (got "x")'),
        (
            "train: {lora: {targets: 5}}",
            "train.lora.targets: must be auto, all-linear, attention, a list of different module names or a "
            "regular expression (got 5)",
        ),
        (
            "train: {lora: {targets: [q_proj, q_proj]}}",
            "train.lora.targets: must be auto, all-linear, attention, a list of different module names or a "
            "regular expression",
        ),
        ("train: {template_variables: 5}", "train.template_variables: must be a mapping (got 5)"),
        (
            "train: {template_variables: {a: [1]}}",
            "train.template_variables.a: must be text, a number, true, false or null",
        ),
        (
            "train: {schedule: cosin}",
            "train.schedule: must be one of cosine, linear, constant, constant_with_warmup, "
            "cosine_with_restarts, cosine_with_min_lr, cosine_warmup_with_min_lr, polynomial, inverse_sqrt, "
            'warmup_stable_decay (got "cosin"); did you mean cosine?',
        ),
        (
            "train: {gradient_checkpointing: maybe}",
            'train.gradient_checkpointing: must be one of auto, true, false (got "maybe")',
        ),
        (
            "train: {preset: [t4]}",
            "train.preset: must be one of book-ch0, book-ch5, gpt2, overview, rtx3090, t4 (got a list)",
        ),
        ("train: 5", "train: must be a mapping of fields (got 5)"),
        (
            "train:",
            "train: is empty; write `train: {}` for the defaults or `train: none` to ship the base as it is",
        ),
        (
            "train: {from: a/b, epochs: 3}",
            "train.epochs: is not used beside train.from: nothing is trained; leave it out",
        ),
        ("train: {from: ./adapter}", "train.from: no such directory: ./adapter (looked in {here})"),
        ("train: {from: recipe.yaml}", "train.from: must be a directory, not a file: recipe.yaml"),
        (
            "train: {from: a/b@c, revision: d}",
            "train: the revision is given twice: in from and in revision",
        ),
        ("deploy: {port: 70000}", "deploy.port: must be at most 65535 (got 70000)"),
        ("deploy: {host: ''}", 'deploy.host: must not be empty (got "")'),
        ("verify: {min_top1: 2}", "verify.min_top1: must be at most 1 (got 2)"),
        ("smoke: hello", 'smoke: must be a list (got "hello")'),
        ("smoke: [hello]", 'smoke.0: must be a mapping of fields (got "hello")'),
        (
            "smoke: [{messages: [{role: assistant, content: x}]}]",
            "smoke.0: messages must end with the user's turn",
        ),
        (
            "smoke: [{messages: [{role: user, content: x}], system: y}]",
            "smoke.0: put the system prompt into messages, or use prompt",
        ),
        ('model: {system: "\\ud800"}', "model.system: holds half of a character"),
        (
            '"a\\nb": 1',
            "a\\nb: unknown key; known here: name, base, data, train, model, export, verify, deploy, smoke",
        ),
        ("1: x", "keys must be text (got 1); put it in quotes"),
        ("deploy: {threads: !int x}", "deploy.threads: the tag !int is not used in recipes; leave it out"),
        ("deploy: {threads: " + "9" * 5000 + "}", "deploy.threads: is not a number that can be read"),
    ],
)
def test_one_fault_one_line(written: str, said: str) -> None:
    """C1, G2, G3 and section 2 of the requirements: values out of their bounds never reach a library."""
    expected = f"recipe.yaml:4: {said}".replace("{here}", str(Path.cwd()))
    assert refused(GOOD + written + "\n") == [expected]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: builtin:tiny\ntrain: none\n", "name: is required: name of the run"),
        ("name: a\ntrain: none\n", "base: is required: the model to start from"),
        ("name: a\nbase:\ntrain: none\n", "base: is required: the model to start from"),
        ("name: a\nbase: {}\ntrain: none\n", "base.id: is required: hub id"),
        ("name: a\nbase: ''\ntrain: none\n", 'base: must not be empty (got "")'),
        ("name: a\nbase: ./b\ntrain: none\n", "base: no such directory: ./b (looked in"),
        ("name: a\nbase: builtin:tiny\n", "data: is required to train: name its source"),
        ("name: a\nbase: builtin:tiny\ndata:\n", "data: is required to train: name its source"),
        ("name: a\nbase: builtin:tiny\ndata: {}\n", "data.source: is required: file"),
        ("name: a\nbase: builtin:tiny\ndata: {source: builtin:x}\n", "data.source: there is no builtin:x;"),
        (
            "name: a\nbase: builtin:tiny\ndata: {source: builtin:yoda, eval: 1.0}\n",
            "data.eval: must be a share of the rows (0 to below 1), a whole number of rows, or a file",
        ),
        (
            "name: a\nbase: builtin:tiny\ndata: {source: builtin:yoda, eval: held.jsonl}\n",
            "data.eval: no such file: held.jsonl",
        ),
    ],
)
def test_what_must_be_there(text: str, said: str) -> None:
    (line,) = refused(text)
    place, _, rest = line.partition(": ")
    assert place.startswith("recipe.yaml:")
    assert rest.startswith(said)


def test_a_misspelt_file_is_found() -> None:
    Path("train.jsonl").touch()
    text = "name: a\nbase: builtin:tiny\ndata: {source: tran.jsonl}\n"
    assert refused(text) == [
        "recipe.yaml:3: data.source: no such file: tran.jsonl; did you mean train.jsonl?",
    ]


def test_pitfall_23_the_head_carries_no_adapter() -> None:
    (line,) = refused(GOOD + "train: {lora: {targets: [q_proj, lm_head]}}\n")
    assert line.startswith("recipe.yaml:4: train.lora.targets: lm_head cannot carry an adapter")


@pytest.mark.parametrize(
    "lora", ["{modules_to_save: [embed_tokens]}", "{dora: true}", "{experts: true, dropout: 0}"]
)
def test_pitfall_52_what_an_adapter_file_cannot_hold_is_told_before_training(lora: str) -> None:
    (line,) = refused(GOOD + f"train: {{method: lora, lora: {lora}}}\nexport: {{mode: adapter}}\n")
    assert line.endswith("cannot be exported as an adapter; use export.mode: merged")


def test_sections_that_contradict_each_other() -> None:
    assert refused("name: a\nbase: builtin:tiny\ntrain: none\nexport: {mode: adapter}\n") == [
        "recipe.yaml:4: export.mode: train is none, so there is no adapter to export; use merged",
    ]
    assert refused(GOOD + "train: {method: lora}\nexport: {merge_base: nf4}\n") == [
        "recipe.yaml:5: export.merge_base: train.method is not qlora, so training never saw an NF4 base; "
        "use original",
    ]
    assert refused(GOOD + "train: {method: lora}\nexport: {merge_base: measured}\n")
    assert refused("name: a\nbase: builtin:tiny\ntrain: none\nexport: {merge_base: nf4}\n") == [
        "recipe.yaml:4: export.merge_base: train is none, so there is nothing to merge; use original",
    ]
    (line,) = refused(GOOD + "deploy: {runtime: container, gpu_layers: 3}\n")
    assert "deploy.gpu_layers: a recipe's container is the CPU's" in line
    assert refused(GOOD, "data.columns={prompt: a, messages: b}") == [
        "-o data.columns: data.columns.prompt: messages holds whole conversations; name one or the other",
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lora.r", "-o train.lora.r: must look like key=value"),
        ("=5", "-o =5: must look like key=value"),
        ("train..r=5", "-o train..r=5: must look like key=value"),
        ("train.lora.r=", "-o train.lora.r: has no value; `null` unsets a field"),
        ("train.lora.r=0", "-o train.lora.r: must be at least 1 (got 0)"),
        ("train.lora={r: 0}", "-o train.lora: train.lora.r: must be at least 1 (got 0)"),
        ("train.lora.rr=8", "-o train.lora.rr: unknown key; did you mean r?"),
        ("name.x=1", '-o name.x: cannot be set: name is "small" (recipe.yaml:1) and holds no fields'),
        ("smoke=[a", "-o smoke: is not valid YAML: a bracket or a quote that is not closed"),
        ("data.source=none.csv", "-o data.source: no such file: none.csv (looked in {here})"),
    ],
)
def test_faults_of_overrides(override: str, said: str) -> None:
    assert refused(GOOD, override) == [said.replace("{here}", str(Path.cwd()))]


def test_the_words_of_a_mapping() -> None:
    roles = "data: {source: builtin:yoda, roles: {kunde: nutzer}}"
    assert refused(GOOD.replace("data: {source: builtin:yoda}", roles)) == [
        "recipe.yaml:3: data.roles.kunde: must be one of system, user, assistant, tool "
        '(got "nutzer"); did you mean user?'
    ]
