"""The `xtal` command: crystals → diffraction clouds → trained models → ablations → a report."""

import inspect
import io
import os
import sys
import traceback

import typer

import ablation.commands
import cluster.commands
import featurization.commands
import training.commands
from cluster.errors import RunFailed, Stopped, UserError
from cluster.files import disk_explained
from cluster.terminal import complain, err
from featurization.fetch_commands import fetching

_INTERRUPTED = 130  # typer's exit code of a KeyboardInterrupt

app = typer.Typer(
    name="xtal",
    help="Ask whether the structure of a crystal alone, without chemistry, tells what it does. "
    "Verbs in the order of the data: fetch, featurize, inspect, verify, train, evaluate, predict, "
    "ablate, report, propensity; demo does all of them. On a cluster: submit, jobs, watch, cancel, "
    "dashboard. "
    "--debug anywhere shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
app.add_typer(fetching, name="fetch")
for verbs in (featurization.commands, training.commands, ablation.commands, cluster.commands):
    verbs.register(app)


def _join_lines(verbs: typer.Typer) -> None:
    """Make each paragraph of a docstring one line of the help: the terminal breaks it."""
    for verb in verbs.registered_commands:
        paragraphs = (inspect.getdoc(verb.callback) or "").split("\n\n")
        verb.help = "\n\n".join(" ".join(each.split()) for each in paragraphs)
    for group in verbs.registered_groups:
        if group.typer_instance is not None:
            _join_lines(group.typer_instance)


_join_lines(app)


def main() -> None:
    """Entry point: exit code 0 on success, 2 for bad input, 74 and 75 as `cluster.errors` says,
    130 interrupted."""
    # Threads that wait for each other asleep: spinning makes a step four times slower as soon as
    # another process wants the cores. OpenMP reads this when torch is imported, in the verbs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an Å where the terminal's encoding has none
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        with disk_explained():
            app(arguments)
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:
            err.print("interrupted")
        raise
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        if isinstance(first, KeyboardInterrupt):  # native code met it
            err.print("interrupted")
            sys.exit(_INTERRUPTED)
        if debug:
            traceback.print_exc()
        if isinstance(error, UserError):
            complain("error", str(error))
            sys.exit(error.exit_code)
        if isinstance(error, OSError) and error.filename and error.strerror:
            complain("failed", f"cannot read or write {error.filename}: {error.strerror}")
            sys.exit(1)
        if isinstance(error, RunFailed):
            complain("stopped" if isinstance(error, Stopped) else "failed", str(error))
            sys.exit(error.exit_code)
        complain("failed", f"{type(error).__name__}: {error}")
        if not debug:
            err.print("  --debug shows where")
        sys.exit(1)


if __name__ == "__main__":
    main()
