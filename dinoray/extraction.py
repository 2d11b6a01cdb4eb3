"""`extract_images`, `segment_cells`: the whole life of a job over a collection, from listing to `_SUCCESS`. What the CLI and
jobs/ call.

resolve -> list -> take the output -> record the request -> statistics units -> seal the plan -> units in rounds ->
verify. Every step can be killed and is found again by the next run of the same command.
"""

from __future__ import annotations

from collections.abc import Callable

from dinoray.config import CollectionJob, ExtractJob, SegmentCellsJob
from dinoray.driver import refuse_if_held
from dinoray.failpoints import reach
from dinoray.generations import generations
from dinoray.inputs import list_inputs
from dinoray.io.stores import open_store
from dinoray.planning import check_same_inputs, spool_items
from dinoray.request import absolute, check_request, record_request, resume_command
from dinoray.resolve import resolve
from dinoray.session import Outcome, open_session


def extract_images(job: ExtractJob, say: Callable[[str], None] = print, *, command: str = "",
                   leave: Callable[[str], None] | None = None) -> Outcome:
    """Run the job to its end (or resume it). `say` gets the lines meant for the user; `leave` ends the process when
    `dinoray stop` asks for it.

    Raises BadRequest (nothing was run), ChangedRequest (the output belongs to another request), OutputHeld (another
    driver works on it), TooManyFailures, SystemicError, Stopped, NoProgress.
    """
    return _run(job, say, command, leave)


def segment_cells(job: SegmentCellsJob, say: Callable[[str], None] = print, *, command: str = "",
                  leave: Callable[[str], None] | None = None) -> Outcome:
    """As `extract_images`, for a job that segments; WeightsError too when the checkpoint is damaged."""
    return _run(job, say, command, leave)


def _run(job: CollectionJob, say: Callable[[str], None], command: str, leave: Callable[[str], None] | None) -> Outcome:
    job = absolute(job)
    resolved = resolve(job)
    store = open_store(job.out)
    command = command or resume_command(job)
    sealed = check_request(store, resolved)
    say(f"dinoray {resolved.fingerprint}  {resolved.description}  output {job.out}  resume with: {command}")
    listing = list_inputs(job)
    refuse_if_held(store, job.takeover)
    # listed before the output is taken: what is refused while listing leaves no trace there
    with spool_items(listing.items, sample=job.scaling_sample if resolved.job.scaling == "plate" and not sealed else 0) as spool:
        if listing.num_ignored:
            say(f"files passed over: {listing.describe_ignored()}")
        with open_session(store, resolved, command, say, leave=leave) as session:
            if check_request(store, resolved):  # again: another driver may have sealed it since
                check_same_inputs([part.plan for part in generations(store)], spool)
            else:
                record_request(store, resolved, command)
                reach("plan.request")
                session.seal(spool, root=listing.root)
            return session.run()
