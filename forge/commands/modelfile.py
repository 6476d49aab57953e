"""`forge modelfile` and `forge template --check`, on any model: nothing of forge need have made it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from forge import report
from forge.chat import same_prompts
from forge.chat.format_check import limit_names
from forge.chat.hand_over import HandOver, Way, hand_over_of, prefers_jinja, without_unwritable
from forge.chat.modelfile import modelfile_text, parse_modelfile
from forge.chat.template import ChatTemplate
from forge.codec import to_plain
from forge.commands.library import doubt_of_library
from forge.errors import CheckError, DataError, RecipeError
from forge.files import sync, work_beside, write_text
from forge.model.gguf_copy import require_same_but, with_text
from forge.model.gguf_header import read_gguf
from forge.runs.files import BESIDE, adapter_beside

TEMPLATE_KEY = "tokenizer.chat_template"


def write_modelfile(
    target: Path,
    *,
    adapter: str | None,
    jinja: bool,
    out: Path | None,
    guard: Path | None = None,
    library: str | None = None,
) -> Mapping[str, object]:
    """The Modelfile of a directory or a GGUF file, written to `out` or shown; returns the contract's fields.

    With `guard` it is that of a copy of the file, written there, whose template is pinned; with `library` its
    FROM is that model of Ollama's, under the adapter. What no Modelfile can hold is left out and named.
    Raises `RecipeError` where only the target's own template would do, and what `hand_over_of` and
    `write_guarded` raise.
    """
    compared = 0
    if library and not (adapter and guard is None and not jinja):
        raise RecipeError(
            "--from puts an adapter on a model of Ollama's library: give --adapter, not --guard or --jinja"
        )
    if guard is not None:
        compared = write_guarded(target, guard)
        target = guard
    handed = hand_over_of(target)
    written, left = without_unwritable(handed)
    way: Way = "jinja" if jinja or handed.compiled.go is None else "go"
    if library and way == "jinja":
        raise RecipeError(
            f"--from: no Go TEMPLATE: {handed.compiled.reason}, and {library} has a template of its own",
            hint="give Ollama the base's own GGUF: forge export, forge import",
        )
    base = library or _from(target)
    is_pinned = library is None and _is_pinned(Path(base))
    remarks = _remarks(handed, way, of_directory=target.is_dir(), is_pinned=is_pinned)
    if library and adapter:
        remarks.append(_of_library(library, target, Path(adapter)))
    if left:
        report.warning(str(left))
        remarks.append(str(left))
    comments = "".join(f"# {line}\n" for line in remarks)
    beside = adapter_beside(Path(base))
    if adapter is None and beside.is_file():
        # Of a directory both are meant; who names only the file gets a note.
        adapter = str(beside) if target.is_dir() else None
        report.warning(f"{beside.name} lies beside it: {'both are' if adapter else 'it is not'} named")
    text = comments + modelfile_text(written.modelfile(way, base, adapter=adapter))
    if way == "jinja" and not is_pinned:
        report.warning(f"{_GUESSED}: --guard OUT.gguf writes a copy of the file that keeps both off")
    if way == "jinja" and not jinja:
        report.warning(f"no Go TEMPLATE: {handed.compiled.reason}; it needs Ollama 0.30, for the GGUF's own")
    if out:
        write_text(out, text)
        report.success(f"wrote {out}")
    else:
        report.output(text.rstrip("\n"))
    reason = handed.compiled.reason
    guarded = {"guarded": str(guard), "guarded_compared": compared} if guard else {}
    return {
        "modelfile": str(out) if out else text,
        "way": way,
        "reason": reason,
        **to_plain(handed.facts()),
        **guarded,
    }


def _of_library(name: str, target: Path, adapter: Path) -> str:
    doubt = doubt_of_library(name, target, adapter)
    if doubt is None:
        words = f"{name} has the weights of {target.name}, byte by byte"
        report.success(words)
        return words
    words = (
        f"not proved: what {name} is: {doubt}. Ollama's library has most models in 4 bits, and maybe another "
        f"revision than the adapter was trained on: forge verify --ollama {name} --base {target} compares it"
    )
    report.warning(words)
    return words


def write_guarded(gguf: Path, out: Path) -> int:
    """Write `out`: the file with its chat template pinned, nothing else changed; how many prompts compared.

    Raises `RecipeError` for what is no GGUF file or is pinned already, `CheckError` where a server's date
    or thinking would still come through.
    """
    if gguf.is_dir() or gguf.suffix != ".gguf":
        raise RecipeError(
            "--guard takes a GGUF file", hint="forge export pins the template of what it writes"
        )
    if out.absolute() == gguf.absolute():
        raise RecipeError("--guard names the file itself", hint="choose another name")
    handed = hand_over_of(gguf)
    if handed.template.is_pinned:
        raise RecipeError(f"{gguf} has a pinned template already", hint="leave --guard out")
    pinned = handed.template.pinned_source()
    compared = same_prompts.compare_prompts(handed, pinned, None).conversations
    header = read_gguf(gguf)
    with work_beside(out.absolute()) as scratch:
        made = scratch / "model.gguf"
        try:
            with made.open("wb") as stream:
                for piece in with_text(header, TEMPLATE_KEY, pinned):
                    stream.write(piece)
        except OSError as error:
            raise DataError(f"{out}: cannot be written: {error.strerror}") from error
        require_same_but(header, made, TEMPLATE_KEY, pinned)
        sync(made)
        made.replace(out)
    report.success(f"wrote {out}: {gguf.name} with its chat template pinned, {compared} prompts compared")
    return compared


def _is_pinned(base: Path) -> bool:
    """Whether the file at FROM keeps a server's guesses off; an export that is yet to be made will."""
    if base.suffix != ".gguf" or not base.is_file():
        return True
    return ChatTemplate(read_gguf(base).chat_template or "").is_pinned


def _from(target: Path) -> str:
    """FROM: the file itself; of a directory the one GGUF in it, or the one that an export would write."""
    if target.is_file():
        return str(target.absolute())
    files = [path for path in sorted(target.glob("*.gguf")) if not path.name.endswith(BESIDE)]
    if len(files) == 1:
        return str(files[0].absolute())
    whole = target.absolute()
    path = whole.with_name(f"{whole.name}.gguf")  # not `with_suffix`: names have dots, as Qwen2.5-0.5B
    report.warning(
        f"{target} has {'several GGUF files' if files else 'no GGUF file'}: FROM names {path}; make it with "
        f"forge export --base {target} --out {path}"
    )
    return str(path)


_GUESSED = (
    "Ollama puts a template of its own in the place of one that looks much like it, and sets dates and "
    "thinking by itself"
)


def _remarks(handed: HandOver, way: Way, *, of_directory: bool, is_pinned: bool) -> list[str]:
    """What is proved and what is not, as comments: shown or written, the file stays a Modelfile."""
    facts = handed.facts()
    asked = "generation_config.json" if of_directory else "the GGUF's general.sampling keys"
    proved = [f"TEMPLATE: {facts.status}, {handed.compiled.checked} conversations compared"]
    proved += [f"not claimed: {limit}" for limit in facts.limits]
    if is_pinned:
        proved.append("Ollama 0.30 may render the GGUF's own template instead: pinned, it writes the same")
    elif prefers_jinja(handed.template.source):
        proved.append(
            "since 0.30 Ollama renders the GGUF's own template instead, as this one knows tools or thinking: "
            "TEMPLATE holds for older servers, and with OLLAMA_GO_TEMPLATE=1; "
            "forge modelfile --guard OUT.gguf writes a copy whose own template is pinned"
        )
    own = "the GGUF's own template" + (", pinned" if is_pinned else f", not pinned: {_GUESSED}")
    return [
        *(proved if way == "go" else [own]),
        f"not claimed: {', '.join(facts.not_claimed)}",
        f"sampling: {f'of {asked}' if handed.sampling else 'none asked for'}",
    ]


def compare_modelfile(
    target: Path, modelfile: Path, *, bos: str | None, eos: str | None
) -> Mapping[str, object]:
    """`forge template --check`: somebody's Modelfile beside the model's template and stops.

    Raises `CheckError` with what differs, the smallest conversation first.
    """
    from forge.chat.modelfile_check import check_modelfile

    try:
        read = parse_modelfile(modelfile.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{modelfile}: cannot be read: {error}") from error
    handed = hand_over_of(target, bos=bos, eos=eos)
    compared = check_modelfile(read, handed)
    for note in compared.notes:
        report.info(note)
    limits = limit_names(compared.prompts.limits) if compared.prompts else []
    for limit in limits:
        report.info(f"not so for: {limit}")
    if compared.problems:
        raise CheckError(
            f"{modelfile} does not hand over what {target} was made for",
            hint=f"forge modelfile {target} writes one that does",
            problems=[replace(problem, file=str(modelfile)) for problem in compared.problems],
        )
    status = compared.prompts.status if compared.prompts else None
    checked = compared.prompts.checked if compared.prompts else 0
    report.success(f"{modelfile}: {status or 'its stops are right'}; {checked} conversations compared")
    return {
        "status": status,
        "limits": limits,
        "reason": None,
        "go": read.template,
        "stops": list(read.stops),
        "default_system": read.system,
        "conversations_checked": checked,
    }
