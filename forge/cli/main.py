"""The `forge` command: finds a command's file when it is called, and is the one place that shows errors."""

from __future__ import annotations

import contextlib
import errno
import importlib
import keyword
import os
import signal
import sys
import traceback
from collections.abc import Sequence

import click

from forge import process, report
from forge.errors import ForgeError, InterruptedByUserError, RecipeError, StageError

# name -> one line of help. Each lives in forge/cli/<name>.py as a click command called `command`;
# only the one that is called is imported.
COMMANDS = {
    "init": "Write a commented recipe to start from.",
    "plan": "Say what a ship would run and why; runs nothing.",
    "estimate": "Say how much memory training takes, and on what it fits.",
    "ship": "Run the whole pipeline of a recipe.",
    "train": "Run a recipe up to its adapter.",
    "join": "Take part in a training on several machines.",
    "validate": "Check an adapter: a recipe's, or any on disk.",
    "adapters": "Hold several adapters on one base; merge them with weights.",
    "evaluate": "Measure what was learned on held-out rows.",
    "export": "Make the GGUF: a recipe's, or of any base and adapter.",
    "verify": "Prove that a GGUF is its base and adapter: a recipe's, or anybody's.",
    "repair": "Fix the metadata of somebody's GGUF in a verified copy.",
    "modelfile": "Write the Modelfile of any model, or those of a recipe.",
    "template": "Turn a chat template into a Go template, and prove it.",
    "deploy": "Start the server of a recipe and compare its prompts.",
    "smoke": "Ask a run's smoke queries again.",
    "import": "Import a run or a GGUF file into Ollama, and prove its prompts there.",
    "chat": "Talk to a run, a GGUF file or a URL.",
    "serve": "Serve a run or a GGUF file over REST.",
    "ps": "List the servers that run in the background.",
    "stop": "Stop what runs in the background.",
    "bundle": "Pack a model and its server for a computer without network.",
    "push": "Push a run to a model hub, with a card.",
    "sign": "Sign a run's files, or check a signature.",
    "generate": "Answer a file of prompts through an endpoint.",
    "show": "Show what a run holds.",
    "runs": "List the runs.",
    "sweep": "Ship a recipe with several values of its fields, and compare.",
    "compare": "Show two runs side by side.",
    "gc": "Show, and with --delete remove, what no run uses.",
    "setup": "Fetch what an install does not bring.",
    "doctor": "Look at this machine, or explain a message of a tool.",
}


class LazyGroup(click.Group):
    """Imports a command's module only when that command is called."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(
            f"forge.cli.{name}_" if keyword.iskeyword(name) else f"forge.cli.{name}"
        )
        command: click.Command = module.command
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _show_version(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        click.echo(f"forge {version('forge-ship')}")
        context.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version)
def forge() -> None:
    """Fine-tune a chat model, ship it as GGUF, and prove that the model served is the model trained."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The process's entry point; exits with the contract's code."""
    code = InterruptedByUserError.code
    with contextlib.suppress(KeyboardInterrupt):  # another one, while the first was being shown
        code = run_command(list(sys.argv[1:] if arguments is None else arguments))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said and closed
    sys.exit(code)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; the CLI's edge, where every error is shown."""
    # The hub is asked for what the user names and for nothing else; workers inherit it.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    report.configure(as_json="--json" in arguments, verbose="-v" in arguments)
    try:
        with process.signals_as_interrupt():
            forge.main(args=list(arguments), prog_name="forge", standalone_mode=False)
        return 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.exceptions.NoArgsIsHelpError as usage:
        click.echo(usage.format_message(), err=True)
        return RecipeError.code
    except click.ClickException as usage:
        failure: ForgeError = RecipeError(usage.format_message(), hint="see: forge --help")
    except (KeyboardInterrupt, click.Abort):
        failure = InterruptedByUserError("interrupted", hint="run the same command again to go on")
    except ForgeError as known:
        failure = known
    except BrokenPipeError:
        # Whoever read the output (head, less) has what it wanted; what is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        failure = StageError("standard output was closed before everything was written")
    except Exception as unforeseen:  # noqa: BLE001 - the edge
        report.detail(traceback.format_exc())
        failure = _unforeseen(unforeseen)
    _diagnose(failure)
    report.error(failure)
    return failure.code


def _unforeseen(failure: Exception) -> ForgeError:
    """What nobody expected: a file that is in the way, closed to us or gone is named, the rest is a bug."""
    if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
        what = f": {failure.filename} could not be written" if failure.filename else ""
        return StageError(
            f"the disk is full{what}",
            hint="make room (`forge gc` shows what can go) and run the same command again",
        )
    if isinstance(failure, OSError) and failure.filename is not None and failure.strerror:
        return StageError(
            f"{failure.filename}: {failure.strerror[0].lower()}{failure.strerror[1:]}",
            hint="run it again with -v for what was done with it",
        )
    return ForgeError(
        f"a bug in forge: {type(failure).__name__}: {failure}",
        hint="run it again with -v for the traceback, and please report it",
    )


def _diagnose(failure: ForgeError) -> None:
    """Add what is known of a library's message to the hint of a stage that failed, or of a bug."""
    if failure.code not in (ForgeError.code, StageError.code):
        return
    from forge.diagnosis import known_cause

    for text in (failure.message, *(problem.message for problem in failure.problems)):
        if known := known_cause(text):
            added = f"{known.cause}: {known.remedy}"
            # A `forge serve --detach` hands on what the server's own command has said already.
            if added not in failure.hint:
                failure.hint = added + (f" ({failure.hint})" if failure.hint else "")
            return
