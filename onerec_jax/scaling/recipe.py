"""Families of models at fixed shape ratios, and what a compute budget buys of each of them.

    base = load_recipe("onerec_0.121b")
    for candidate in candidates(1e18, family(base, "both", [0.25, 0.5, 1, 2])):
        print(candidate.member.size.active, candidate.targets, candidate.point)

N is counted three ways, because no two reports count alike: `active`, what one token uses of the matrices; `total`, all experts of
them; `tables`, everything whose rows are a vocabulary (codes, heads, features, ids). D is counted as targets, which are items, and
as target tokens, which are their codes. C is of `train.flops`, all parts of the model included; it is not 6 N D, since most FLOPs
of a request are spent on its context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from onerec_jax.config import Recipe
from onerec_jax.data.schema import Vocabulary
from onerec_jax.errors import InputError
from onerec_jax.model.onerec import Model, build, count_parameters, planned_vocabulary
from onerec_jax.recipe import make_recipe
from onerec_jax.scaling.runs import check_budget
from onerec_jax.scaling.sweep import Point
from onerec_jax.train.flops import request_flops

Along = Literal["width", "depth", "both"]
TOLERANCE = 0.01  # of the budget
EIGHT = 8  # widths of experts are multiples of it


class Size(NamedTuple):
    """Parameters: of the matrices, what one token uses and all of them; beside them those of tables."""

    active: int
    total: int
    tables: int


class Request(NamedTuple):
    """Mean events of each pathway and mean targets of one training request, padding not counted."""

    short: float
    positive: float
    lifelong: float
    targets: float


@dataclasses.dataclass(frozen=True)
class Member:
    """One model of a family."""

    point: Point  # its settings, over those of the base recipe
    recipe: Recipe
    size: Size
    flops: float  # training FLOPs of one request
    targets: float  # of one request
    tokens: float  # codes of these targets that are learnt; with an item head alone one a target


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A member and how long a budget trains it."""

    member: Member
    point: Point  # the member's, with train.steps, train.batch_size, train.learning_rate and train.warmup_steps
    flops: float  # of the whole training, within 1 % of the budget
    targets: float
    tokens: float


def learning_rate(active: float) -> float:
    """5e-4 sqrt(0.1e9 / N), which is every rate of OneRec-V2's table 5; N are active parameters (its MoE has the rate of those)."""
    return 5e-4 * (0.1e9 / active) ** 0.5


def batch_size(targets: float, at_targets: float, at_batch: int, exponent: float, multiple: int = 1) -> int:
    """A power law in the amount of data, at_batch (D / at_targets)^exponent, to a multiple of devices or micro-batches.

    Exponent 0 is OneRec-V2's constant batch. No report of this kind of model gives another; measure it on small models.
    """
    return max(multiple, round(at_batch * (targets / at_targets) ** exponent / multiple) * multiple)


def family(
    base: Recipe,
    along: Along,
    ratios: Sequence[float],
    vocabulary: Vocabulary | None = None,
    request: Request | None = None,
) -> list[Member]:
    """The base recipe's model made this many times as wide, as deep, or both.

    Fixed: the width of a head, and to the model's width those of the feed-forward, the experts and the pathways' hidden layer;
    along depth the encoder's layers to the decoder's. Widths of the features of events, lengths of the pathways, the number of
    experts and the lifelong compressor stay as the base has them.

    Args:
        base: the recipe of ratio 1.
        along: width, depth, or both by the same ratio.
        ratios: above 0; layers and heads are rounded to whole ones, and to whole groups where not every block is MoE.
        vocabulary: sizes of the data; by default those that the recipe is planned for.
        request: what a request holds on the mean; by default full pathways and `data.targets`.

    Raises:
        InputError: no direction of that name, a ratio that is not above 0, or two that round to one model.
    """
    if along not in ("width", "depth", "both"):
        raise InputError(f"a family goes along width, depth or both, not '{along}'")
    wrong = [ratio for ratio in ratios if not 0 < ratio < float("inf")]
    if wrong:
        raise InputError(f"ratios of a family must be above 0, not {wrong[0]}")
    points = [_point(base, 1 if along == "depth" else ratio, 1 if along == "width" else ratio) for ratio in ratios]
    for i, point in enumerate(points):
        if point in points[:i]:
            first, second = ratios[points.index(point)], ratios[i]
            raise InputError(f"ratios {first:g} and {second:g} round to the same model of {base.name}: {point}")
    return [_member(base, point, vocabulary, request) for point in points]


def _point(base: Recipe, width: float, depth: float) -> Point:
    model, moe = base.model, base.model.moe
    heads = max(1, round(width * model.heads))
    d_model = round(heads * model.d_model / model.heads)
    point: Point = {
        "model.d_model": d_model,
        "model.heads": heads,
        "model.ffn_hidden": round(model.ffn_hidden * d_model / model.d_model),
    }
    if model.pathway_hidden:
        point["model.pathway_hidden"] = round(model.pathway_hidden * d_model / model.d_model)
    if moe.experts:
        point["model.moe.hidden"] = max(EIGHT, round(moe.hidden * d_model / model.d_model / EIGHT) * EIGHT)
        if d_model == model.d_model:
            point["model.moe.hidden"] = moe.hidden
    for stack, routed in (("encoder_layers", moe.location == "both"), ("decoder_layers", True)):
        group = moe.every if moe.experts and routed else 1
        point[f"model.{stack}"] = max(1, round(depth * getattr(model, stack) / group)) * group
    return point


def with_settings(base: Recipe, point: Point) -> Recipe:
    """The recipe with these settings in place of its own.

    Raises:
        InputError: a setting there is not, or out of place.
    """
    values: dict[str, Any] = base.model_dump(mode="json")
    for key, value in point.items():
        *path, name = key.split(".")
        section = values
        for part in path:
            section = section.setdefault(part, {})
        section[name] = value
    return make_recipe(values, f"{base.name} with {', '.join(f'{k}={v}' for k, v in point.items())}")


def _member(base: Recipe, point: Point, vocabulary: Vocabulary | None, request: Request | None) -> Member:
    recipe = with_settings(base, point)
    config, train = recipe.model, recipe.train
    vocabulary = vocabulary or planned_vocabulary(recipe)
    request = request or Request(
        config.short_length, config.positive_length, config.lifelong_length, recipe.data.targets
    )
    decoded = min(request.targets, train.code_targets or request.targets)
    flops = request_flops(
        config, vocabulary, **request._asdict(), sampled_items=train.sampled_items, decoded=decoded
    ).training  # fmt: skip
    tokens = request.targets if config.head == "items" else decoded * vocabulary.levels
    return Member(point, recipe, size_of(build(config, vocabulary)), flops, request.targets, tokens)


def size_of(model: Model) -> Size:
    """The parameters of a model, counted three ways."""
    counts = count_parameters(model)
    return Size(counts["active"], counts["model"], counts["codes"] + counts["features"] + counts["tables"])


def candidates(
    budget: float,
    members: Iterable[Member],
    rate: Callable[[float], float] = learning_rate,
    batch: Callable[[float], int] | None = None,
) -> list[Candidate]:
    """What a budget of training FLOPs buys of each member: as many steps as come within 1 % of it.

    Members that the budget pays less than about fifty steps for are left out: no whole number of steps comes that close. The
    warm-up keeps its share of the steps and the cosine ends with the last, so that every candidate has its schedule to its end
    (a warm-up of fixed length is one of the reasons why early laws disagree; Porian et al. 2024).

    Args:
        budget: FLOPs.
        members: of `family`.
        rate: learning rate of a number of active parameters.
        batch: requests of a step for a number of targets; by default what each member's recipe says, whatever the data.

    Raises:
        InputError: a budget that is too small for every member.
    """
    members, found = list(members), []
    check_budget(budget)
    for member in members:
        train = member.recipe.train
        size = batch(budget / member.flops * member.targets) if batch else train.batch_size
        steps = max(1, round(budget / (size * member.flops)))
        flops = steps * size * member.flops
        if abs(flops / budget - 1) > TOLERANCE:
            continue
        settings: Point = {
            "train.steps": steps,
            "train.batch_size": size,
            "train.learning_rate": float(f"{rate(member.size.active):.4g}"),
            "train.warmup_steps": round(steps * train.warmup_steps / train.steps),
        }
        point = {**member.point, **settings}
        with_settings(member.recipe, settings)
        requests = steps * size
        found.append(Candidate(member, point, flops, requests * member.targets, requests * member.tokens))
    if not found:
        least = min((m.flops * m.recipe.train.batch_size for m in members), default=0.0)
        raise InputError(
            f"a budget of {budget:.3g} FLOPs comes within 1 % of no whole number of steps of any of {len(members)} models; "
            f"a step of the cheapest takes {least:.3g}, and fifty are enough"
        )
    return found
