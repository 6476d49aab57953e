from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from forge import report
from forge.cli.options import (
    POSITIVE,
    SHARE,
    base_option,
    common,
    merge_base_option,
    optional_recipe,
    overrides_option,
    refuse_idle,
)
from forge.errors import RecipeError

_PATH = click.Path(path_type=Path)


@click.command()
@optional_recipe
@overrides_option
@base_option
@click.option("--adapter", type=_PATH, help="The LoRA adapter that was merged.")
@click.option("--gguf", type=_PATH, help="The file to check, whoever made it.")
@click.option("--ollama", metavar="NAME", help="The model to check, by its name in an Ollama.")
@click.option("--host", help="Ollama's address; default: OLLAMA_HOST, or 127.0.0.1:11434.")
@click.option("--lora", type=_PATH, help="The adapter's own GGUF beside its base's.")
@merge_base_option
@click.option(
    "--trained-in-4bit", is_flag=True, help="The adapter saw its base in NF4 (QLoRA): show what that shifts."
)
@click.option("--merged", type=_PATH, help="The merged checkpoint, where one was kept.")
@click.option(
    "--imatrix",
    type=_PATH,
    help="The importance matrix (GGUF) that the file was rounded by; iq3_xxs and below need it.",
)
@click.option("--data", type=_PATH, help="Rows to compare on (JSONL); else built-in ones.")
@click.option("--max-kl", type=POSITIVE, help="Fail over this mean KL divergence (nats).")
@click.option("--min-top1", type=SHARE, help="Fail under this share of equal top tokens.")
@click.option("--minutes", type=POSITIVE, help="Compare no more positions than fit in so long, few at first.")
@click.option("--certificate", type=_PATH, help="Write the certificate with its rows to this file.")
@click.option(
    "--recheck",
    type=_PATH,
    help="Repeat the certificate in this file, at its positions; its files are where it says, or as named.",
)
@common
def command(
    recipe: Path | None,
    overrides: tuple[str, ...],
    base: str | None,
    gguf: Path | None,
    recheck: Path | None,
    **options: Any,
) -> None:
    """Prove that a GGUF is its base and adapter, or name the stage that broke it.

    Of RECIPE's own export, or of any --gguf or --ollama model with its --base (and --adapter): token
    ids, prompt, stops and logits are compared with transformers in float32, and with llama.cpp's own
    conversion and quantization. Exit 5 when they differ by more than that explains.
    """
    if recheck is not None:
        from forge.commands import recheck as again

        places = {name: options.pop(name) for name in ("adapter", "lora", "merged", "imatrix")}
        if recipe or overrides or options.pop("merge_base") != "original" or any(options.values()):
            raise RecipeError(
                "--recheck repeats what the certificate says",
                hint="beside it only --base, --gguf, --adapter, --lora, --merged and --imatrix are taken",
            )
        again.recheck(recheck, again.Elsewhere(base, gguf, **places))
        return
    refuse_idle(recipe, overrides)
    if recipe is not None:
        from forge.ship.drive import ship_until

        fields = ship_until(recipe, overrides, "verify")
        certificate = fields["certificate"]
        assert isinstance(certificate, dict)  # a ship that ended well has one
        report.result({**fields, **certificate})
        return
    ollama, host = options.pop("ollama"), options.pop("host")
    if not base or (gguf is None) == (ollama is None) or (host and not ollama):
        raise RecipeError("give a RECIPE, or --base with --gguf or --ollama [--host]", hint="see: --help")
    from forge.commands.verify import Files, Terms, certify

    terms = Terms(**{name: options.pop(name) for name in Terms.__annotations__})
    files = Files(base, gguf or Path(), **options)
    if ollama is None:
        certify(files, terms)
        return
    from forge.commands.verify_ollama import certify_in_ollama

    certify_in_ollama(ollama, host, files, terms)
