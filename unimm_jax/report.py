"""Writes report.html and scores.json of a run that trained every stage, and prints the scores.

python -m unimm_jax.report --run=runs/quickstart
"""

from absl import flags

from unimm_jax import process


def cli() -> None:
    """Entry point."""
    process.prepare()
    run = flags.DEFINE_string("run", None, "Directory that holds the stages' workdirs and evaluation.", required=True)

    def command() -> None:
        from unimm_jax import storage
        from unimm_jax.evals.report_page import build
        from unimm_jax.evals.score_table import table

        page, scores = build(storage.path(run.value))
        print(table(scores))
        print(f"{'seconds, all stages':34s} {sum(scores['seconds'].values()):7.0f}")
        print(f"report: {page}")

    process.app(command)


if __name__ == "__main__":
    cli()
