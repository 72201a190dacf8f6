"""A simulated A/B test: several runs serve the same fresh users, and the platform's own response model judges.

Users of the simulator that are in no log have sessions with each run. A run is told what they were shown and did, as it
would be by a log, and nothing else; what is reported is the true expectation of what it showed them.
"""

from __future__ import annotations

from onerec_jax.config import SimulatorSource
from onerec_jax.data.sources.simulator import fresh_log, make_platform
from onerec_jax.errors import InputError
from onerec_jax.evaluate.ab_metrics import measure
from onerec_jax.evaluate.ab_report import ABResult, compare
from onerec_jax.evaluate.ab_sessions import SESSION_GAP_MS, recommending, serve, truly_best
from onerec_jax.evaluate.simulated_users import SimulatedUsers
from onerec_jax.generate.recommender import Recommender


def ab_test(
    runs: dict[str, Recommender],
    users: int = 500,
    sessions: int = 3,
    impressions: int = 10,
    seed: int = 0,
    best_of: int = 0,
    *,
    progress: bool = False,
) -> ABResult:
    """Serves the same fresh users with every run, and compares all runs with the first.

    Nothing is shown to a user twice, or before its upload. In each arm a user goes on from the arm's own history.

    Args:
        runs: by the name that they are reported under; the first is the baseline.
        users: how many users each run serves.
        sessions: of every user.
        impressions: of a session, all recommended at its start.
        seed: of the users' luck, which is the same with every run.
        best_of: above 0, one more arm: of so many candidates of the first run those that will truly be watched longest.
        progress: show bars.

    Raises:
        InputError: fewer than two arms, runs that are not of one simulated log, or a run that cannot serve new users.
    """
    source, card_seed = _check(runs, users, sessions, impressions, best_of)
    platform = make_platform(source, card_seed)
    fresh = fresh_log(platform, users)
    arms = {}
    for name, run in runs.items():
        crowd = SimulatedUsers(run.dataset, fresh, lifelong=run.recipe.model.lifelong_length > 0)
        arms[name] = crowd, recommending(run, crowd)
    if best_of:
        crowd, policy = next(iter(arms.values()))
        arms[f"true best of {best_of}"] = crowd, truly_best(policy, crowd, platform, best_of)
    measured = {}
    for name, (crowd, policy) in arms.items():
        served = serve(policy, crowd, platform, sessions, impressions, seed, name if progress else None)
        measured[name] = measure(served, crowd.items.author)
    protocol = (
        f"{users} fresh users of the simulator, {sessions} sessions {SESSION_GAP_MS / 3_600_000:g} h apart, "
        f"{impressions} impressions each, seed {seed}"
    )
    return compare(measured, protocol)


def _check(
    runs: dict[str, Recommender], users: int, sessions: int, impressions: int, best_of: int
) -> tuple[SimulatorSource, int]:
    """The source and the seed of the log that all runs are of."""
    for name, number, least in (("users", users, 2), ("sessions", sessions, 1), ("impressions", impressions, 1)):
        if number < least:
            raise InputError(f"an A/B test needs at least {least} {name}, not {number}")
    if len(runs) + bool(best_of) < 2:
        raise InputError(f"an A/B test compares two runs or more, and was given {len(runs)}; name another one")
    if best_of and best_of < impressions:
        raise InputError(
            f"the best of {best_of} candidates cannot fill {impressions} impressions; ask for more of them"
        )
    cards = {name: run.dataset.card for name, run in runs.items()}
    first = next(iter(runs))
    for name, run in runs.items():
        _check_run(name, run, best_of if name == first else 0)
        for entry in ("source", "seed", "train_end_ms"):
            if cards[name].get(entry) != cards[first].get(entry):
                raise InputError(
                    f"{first} and {name} are not of one log: the {entry} of {run.dataset.directory} is "
                    f"{cards[name].get(entry)}, not {cards[first].get(entry)}; train both on the same dataset"
                )
    return SimulatorSource.model_validate(cards[first]["source"]), int(cards[first]["seed"])


def _check_run(name: str, run: Recommender, candidates: int) -> None:
    """Checks that a run can serve users that its dataset does not have."""
    model, settings = run.recipe.model, run.recipe.evaluate
    if run.dataset.card["source"]["kind"] != "simulator":
        kind = run.dataset.card["source"]["kind"]
        raise InputError(
            f"{name} is of a log of {kind}, whose users nobody can ask; data.source.kind must be simulator"
        )
    if model.user_id:
        raise InputError(
            f"{name} has no embedding for users that are not in its log; train it with model.user_id=false"
        )
    if settings.label_shift_days:
        raise InputError(
            f"{name} has evaluate.label_shift_days {settings.label_shift_days}, which needs the users of the log; "
            "set it to 0 for an A/B test"
        )
    if model.head != "items" and candidates > settings.beam_width:
        raise InputError(
            f"the best of {candidates} candidates needs as many beams; {name} has evaluate.beam_width {settings.beam_width}"
        )
