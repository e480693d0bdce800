"""Run every backbone on every task of every data set, under one head: the paper's evaluation in one command.

    python -m training.benchmark --config training/suites/paper.yaml

Runs data set x task x backbone x seed as one queue: what is done is skipped, several processes may be started on the
same suite, and a killed one is started again with the same command. Then writes into the suite's folder: scores.csv
(everything), report.md (tables, significance, the paper's results beside ours) and radar.png. Research use only.
"""

from modeling_mammodino.tools.command import CommandParser, command_line, user_path
from training.evaluation.benchmark_report import read_done, write_report
from training.evaluation.benchmark_suite import read_suite
from training.evaluation.runs import run_jobs

from .finetune import finetune


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m training.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config", type=user_path, required=True, help="YAML of the suite, such as training/suites/*.yaml"
    )
    parser.add_argument("--output_dir", type=user_path, help="folder of runs and report, instead of the suite's own")
    parser.add_argument("--report_only", action="store_true", help="run nothing; report what is done")
    options = parser.parse_args(arguments)
    with command_line("benchmark"):
        suite = read_suite(options.config, options.output_dir)
        jobs = list(suite.jobs())
        read_done(jobs)  # refuses those of another suite before any work
        failed = {} if options.report_only else run_jobs(jobs, lambda job: finetune(job.settings))
        report = write_report(suite, jobs, failed)
        print(report.read_text())
        if failed:
            raise ValueError(f"{len(failed)} of {len(jobs)} runs failed; {report} names them")


if __name__ == "__main__":
    main()
