"""Write a page about one run, or several side by side: one HTML file, no network."""

from pathlib import Path

from finetune.runfolder import RunFolder


def add_arguments(parser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="report.html in the run's folder, or here for several runs")


def run(args) -> int:
    from finetune.train import report

    for folder in args.runs:
        RunFolder.of(folder)
    out = args.out or (args.runs[0] / report.NAME if len(args.runs) == 1 else Path(report.NAME))
    print(report.write(args.runs, out))
    return 0
