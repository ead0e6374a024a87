"""Publishing as a part of a run: permission first, then, once everything is in place, the commit."""

from pathlib import Path

from kdtool.proof import Proof
from kdtool.publish import check_write_access, publish
from kdtool.run import Run
from kdtool.sections import RunConfig


def check_push(config: RunConfig, run: Run) -> None:
    """Refuse a run whose result could not be published; the repository's id is completed.

    Raises:
        HubProblem: no token, no permission, or the Hub cannot be asked.
    """
    asked = config.output
    if asked.push is not None:
        asked.push = check_write_access(asked.push, run, asked.private, asked.create_pr)


def push(config: RunConfig, run: Run, folder: Path, proof: Proof) -> dict[str, str | None] | None:
    """Publish a finished result if that was asked for and no quality bar was missed.

    Returns:
        `url`, `commit` and `pull_request`, or None.

    Raises:
        HubProblem: not published; the folder stays.
    """
    asked = config.output
    if asked.push is None:
        return None
    if not proof.reload.get("passed", True) or any(not gate.passed for gate in proof.gates):
        run.reporter.warn(f"not published to '{asked.push}': a quality bar was missed")
        return None
    made = publish(folder, asked.push, run, asked.private, asked.create_pr, asked.commit_message)
    run.reporter.info(f"published: {made['pull_request'] or made['url']}")
    return made
