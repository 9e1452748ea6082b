"""The `shoal` command. Nothing heavy is imported before a subcommand needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fl.errors import ConfigError, ShoalError
from fl.hosts.arguments import add_commands

_RUN_HELP = """\
settings are key=value words, e.g.
  shoal run experiment=quickstart seed=1 clients.number=20 partition.alpha=0.1
  shoal run model=smollm2 experiment=instruct schedule.rounds=5
  shoal run experiment=quickstart hydra.run.dir=my-run      (the run's own folder)
  shoal sweep experiment=quickstart partition.alpha=0.1,1 seed=0,1,2
  shoal sweep experiment=lowrank_comparison variants=fedit,ffa   (a preset that says what to compare)
`shoal list` shows every group and what there is to choose.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 (error), 2 (a wrong setting), 3 (a run stopped), 130 (Ctrl-C)."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(options, "settings")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.settings += rest  # argparse leaves out the settings that come after an option
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    try:
        return int(options.call(options) or 0)
    except ShoalError as error:
        print(f"shoal: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        print("; ".join(["shoal: interrupted", *getattr(error, "__notes__", [])]) + ".", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shoal", description="Federated and decentralized fine-tuning, simulated or across hosts."
    )
    parser.set_defaults(call=lambda options: parser.print_help())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter

    run = commands.add_parser("run", help="run one experiment", formatter_class=raw, epilog=_RUN_HELP)
    run.add_argument("settings", nargs="*", metavar="key=value", help="settings; see below")
    run.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in DIR from its last checkpoint")
    run.add_argument("--quiet", action="store_true", help="print nothing but errors")
    run.set_defaults(call=_run)

    sweep = commands.add_parser("sweep", help="run every combination of lists", formatter_class=raw, epilog=_RUN_HELP)
    sweep.add_argument("settings", nargs="+", metavar="key=value[,value...]", help="settings; lists are swept over")
    sweep.add_argument("--quiet", action="store_true", help="print nothing but errors")
    sweep.set_defaults(call=_sweep)

    report = commands.add_parser("report", help="make the report of one run, or compare several")
    report.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="run or sweep folders")
    report.add_argument("--out", type=Path, metavar="FILE", help="where to write (default: report.html in the folder)")
    report.add_argument(
        "--timeline", action="store_true", help="print who worked when in virtual time, and write no report"
    )
    report.set_defaults(call=_report)

    audit = commands.add_parser("audit", help="measure what a finished run gives away about its training examples")
    audit.add_argument("folder", type=Path, metavar="DIR", help="the run's folder")
    audit.set_defaults(call=_audit)

    listing = commands.add_parser("list", help="what there is to choose")
    listing.add_argument("group", nargs="?", help="one group, with its settings")
    listing.add_argument("--json", action="store_true", help="for scripts")
    listing.set_defaults(call=_list)
    add_commands(commands)
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.resume is not None and options.settings:
        way_out = "Resume without settings, or start a new run."
        raise ConfigError("--resume", options.settings, "a resumed run keeps its settings", way_out)
    from fl.compose import compose

    if options.resume is None:
        compose(options.settings)  # a misspelt word is refused before anything heavy is imported
    from rich.console import Console

    from fl import run as runs

    console = Console()
    if options.resume is not None:
        outcome = runs.resume(options.resume, quiet=options.quiet, console=console)
    else:
        outcome = runs.run(options.settings, quiet=options.quiet, console=console)
    if not options.quiet and not (outcome.folder / "run.json").is_file():
        print(f"Folder   {outcome.folder}, where `shoal server` runs")  # engine=superlink on another machine
    elif not options.quiet:
        from fl.report.load import load_run
        from fl.report.tables import final_table

        console.print(final_table(load_run(outcome.folder)))
        print(f"Folder   {outcome.folder}")
        if (outcome.folder / "report.html").is_file():
            print(f"Report   {outcome.folder / 'report.html'}")
        print(f"Adapter  {outcome.folder / 'adapter'}")
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from fl.sweep import sweep

    return sweep(options.settings, quiet=options.quiet)


def _report(options: argparse.Namespace) -> int:
    if options.timeline:
        from fl.report.timeline import print_timelines

        print_timelines(options.folders)
        return 0
    from fl.report.html import write_report

    out = options.out or (options.folders[0] / "report.html" if len(options.folders) == 1 else Path("report.html"))
    print(write_report(options.folders, out))
    return 0


def _audit(options: argparse.Namespace) -> int:
    from rich.console import Console

    from fl.audit import FILE, audit, show
    from fl.report.html import write_report

    found = audit(options.folder)
    show(Console(), found)
    print(f"Audit    {options.folder / FILE}")
    print(f"Report   {write_report([options.folder], options.folder / 'report.html')}")
    return 0


def _list(options: argparse.Namespace) -> int:
    from fl.listing import show

    show(options.group, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
