"""The RL run: what it writes, that it is watched, and that a killed one gives the bits of one that never was."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stand_ins import instant_reinforcement
from tiny import tiny_values

from onerec_jax.config import Recipe
from onerec_jax.data.batch import make_batch
from onerec_jax.data.schema import Batch
from onerec_jax.errors import InputError, StoppedError
from onerec_jax.evaluate.held_out import make_watch
from onerec_jax.generate.load import load_recommender
from onerec_jax.generate.recommender import FREQUENCIES, Recommender
from onerec_jax.generate.step import ListOptions
from onerec_jax.model.prefixes import device_trie
from onerec_jax.model.tables import gather
from onerec_jax.parallel.mesh import make_mesh
from onerec_jax.posttrain import loop as rl_loop
from onerec_jax.posttrain.group import Group
from onerec_jax.posttrain.loop import reinforce, rl_recipe
from onerec_jax.posttrain.step import Experience, make_rl_loss, make_rl_step
from onerec_jax.recipe import make_recipe
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.train.checkpoint import Checkpoints, has_checkpoint, same_bits
from onerec_jax.train.loop import load_inputs, pretrain
from onerec_jax.train.metrics import ratios, read_metrics
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.state import abstract_state, init_state

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Recipe, tiny_folder: Path) -> Recipe:
    """A tiny pre-trained run, and RL that starts from it with rule rewards."""
    values = tiny_values(tiny_folder)
    values["model"] |= {"positive_length": 0, "lifelong_length": 0, "dropout": 0.1, "moe": {"experts": 0}}
    values |= {"name": "rl_tiny", "runs": str(tiny_folder / "rl")}
    values["rl"] = {
        "init_from": "rl_tiny", "steps": STEPS, "requests": 4, "batch_size": 4, "group": 8, "refresh_every": 3,
        "learning_rate": 3e-3, "rewards": {"prefix_match": 1.0, "hit": 1.0}, "watch_every": 0, "checkpoint_every": 4,
        "log_every": 1, "format_samples": 2,
    }  # fmt: skip
    made = make_recipe(values)
    pretrain(made, lambda line: None)
    return made


def changed(recipe: Recipe, name: str, **settings) -> Recipe:
    return recipe.model_copy(update={"name": name, "rl": recipe.rl.model_copy(update=settings)})


def final(recipe: Recipe, step: int):
    """State, behaviour and position of a run's checkpoint."""
    own = rl_recipe(recipe)
    _, _, model = load_inputs(own)
    abstract = abstract_state(model, make_optimizer(own.train), make_mesh(own.mesh, jax.devices()[:1]))
    checkpoints = Checkpoints(own.run_directory)
    try:
        state, position = checkpoints.restore(abstract, own, step)
        return state, checkpoints.restore_behaviour(abstract, step), position
    finally:
        checkpoints.close()


def no_watch(recipe, dataset):
    raise AssertionError("rl.watch_every is 0")


def lines_of(run: Path) -> list[dict[str, float]]:
    """Every whole line, repeated steps included, without the time."""
    path = run / "metrics.jsonl"
    text = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{name: value for name, value in json.loads(line).items() if name != "time"} for line in text]


def start(path: Path, name: str, log: Path) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(jax.config.jax_persistent_cache_min_compile_time_secs),
    }
    command = [sys.executable, "-m", "onerec_jax.cli", "rl", str(path), f"name={name}"]
    with log.open("ab") as output:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)


def test_a_kill_in_the_middle_of_rl_changes_no_bit(recipe: Recipe, tmp_path: Path):
    path, log = tmp_path / "recipe.yaml", tmp_path / "log.txt"
    path.write_text(recipe.to_yaml())
    assert start(path, "undisturbed", log).wait() == 0, log.read_text()
    runs = Path(recipe.runs)
    undisturbed = {line["step"]: line for line in lines_of(runs / "undisturbed-rl")}
    assert sorted(undisturbed) == list(range(1, STEPS + 1))

    process = start(path, "killed", log)
    try:  # checkpoints lie between two refreshes of the policy that generates
        while not has_checkpoint(runs / "killed-rl"):
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
    assert start(path, "killed", log).wait() == 0, log.read_text()
    assert "resumed" in log.read_text()
    for line in lines_of(runs / "killed-rl"):
        assert line == undisturbed[line["step"]]
    both = [final(changed(recipe, name), STEPS) for name in ("undisturbed", "killed")]
    assert same_bits(both[0][:2], both[1][:2]) and both[0][2] == both[1][2] == {"step": STEPS}


def test_a_run_serves_and_says_what_every_step_did(recipe: Recipe):
    run = Path(recipe.runs) / "rl_tiny-rl"
    said: list[str] = []
    assert reinforce(changed(recipe, "rl_tiny", steps=3), no_watch, said.append) == run
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3]
    told = {
        "reward", "reward/best", "reward/prefix_match", "reward/hit", "reward/valid", "rl/loss", "rl/ratio",
        "rl/clipped", "rl/early_clipped", "rl/zero_variance", "legality", "loss", "policy/log_p", "gradient_norm",
        "policy/kl/level1", "policy/entropy/level3",
    }  # fmt: skip
    assert told <= set(lines[0])
    assert lines[0]["reward"] == pytest.approx(lines[0]["reward/prefix_match"] + lines[0]["reward/hit"], rel=1e-5)
    assert "step 3/3" in said[-1]
    loaded = load_recommender(str(run))
    assert int(loaded.state.step) == 3 and loaded.recipe.name == "rl_tiny-rl"


def test_the_first_step_is_on_policy_and_later_ones_are_not_until_the_policy_is_refreshed(recipe: Recipe):
    own = changed(recipe, "on_policy", steps=4, format_weight=0.0, rewards={"diversity": 1.0, "prefix_match": 1.0})
    reinforce(own, no_watch, lambda line: None)
    lines = read_metrics(Path(own.runs) / "on_policy-rl")
    assert lines[0]["rl/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert abs(lines[2]["rl/ratio"] - 1) > 1e-3
    assert lines[3]["rl/ratio"] == pytest.approx(1.0, abs=1e-5), "the policy is refreshed after 3 steps"
    state, behaviour, _ = final(own, 4)
    assert not same_bits(state.params, behaviour["params"])


def test_candidates_as_served_at_the_end_of_train_are_the_lists_of_the_run_it_starts_from(recipe: Recipe, monkeypatch):
    own, steps = changed(recipe, "served", steps=1, ask="end", rollout="served", rewards={"diversity": 1.0}), []

    def compiled(*_):
        def step(state, logged, seen, trie):
            steps.append(seen)
            metrics = {"rl/loss": (1.0, 1.0), "policy/log_p": (1.0, 1.0), "gradient_norm": (1.0, 1.0)}
            return state, metrics | {"skipped": (0.0, 1.0)}

        return step

    monkeypatch.setattr(rl_loop, "_compiled", compiled)
    reinforce(own, no_watch, lambda line: None)
    began = load_recommender(str(Path(recipe.runs) / "rl_tiny"))
    users = np.asarray(steps[0].request.user)[:, 0]
    examples = began.dataset.requests_after_train(users)
    met = [began.dataset.history(user).item[:end][-6:] for user, end in examples[:, :2].tolist()]
    options = ListOptions(k=own.rl.group, width=own.evaluate.beam_width)
    lists, _ = began.lists(examples, met, None, options)
    np.testing.assert_array_equal(steps[0].codes, began.ids.codes[lists])
    assert np.asarray(steps[0].group.valid).all() and lists.min() >= 0


def test_without_refreshes_the_policy_that_generates_stays_the_start(recipe: Recipe):
    own = changed(recipe, "off_policy", steps=4, refresh_every=0)
    reinforce(own, no_watch, lambda line: None)
    began = load_recommender(str(Path(recipe.runs) / "rl_tiny")).state
    assert same_bits(final(own, 4)[1]["params"], began.params)


def test_rewards_rise_on_what_can_be_learnt(recipe: Recipe):
    """Without the loss over the log, the model learns to say what earns the most: one item of an author that is alone."""
    own = changed(
        recipe, "learns", steps=40, requests=8, ntp_weight=0.0, format_weight=0.0, learning_rate=1e-2,
        rewards={"author_spread": 1.0}, refresh_every=1,
    )  # fmt: skip
    reinforce(own, no_watch, lambda line: None)
    rewards = [line["reward"] for line in read_metrics(Path(own.runs) / "learns-rl")]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.05


def test_an_objective_with_a_reference_and_logged_items_trains(recipe: Recipe):
    own = changed(recipe, "s_dpo", objective="s_dpo", steps=2, kl_weight=0.1, rollout="sample", temperature=1.5)
    reinforce(own, no_watch, lambda line: None)
    lines = read_metrics(Path(own.runs) / "s_dpo-rl")
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["rl/no_pair"] < 1 and lines[0]["rl/kl"] == pytest.approx(0, abs=1e-6) and lines[1]["rl/kl"] > 0


def random_experience(recipe: Recipe, request: Batch, ids: SemanticIds) -> Experience:
    """Random candidates that exist, and random rewards; a different number counts in every request."""
    rng, requests, g, k = np.random.default_rng(3), recipe.rl.requests, recipe.rl.group, recipe.rl.format_samples
    codes = ids.codes[rng.integers(0, len(ids.codes), (requests, g))].astype(np.int32)
    old = np.log(rng.uniform(0.05, 0.5, codes.shape)).astype(np.float32)
    valid = np.arange(g) < rng.integers(0, g + 1, (requests, 1))
    reward = rng.normal(size=valid.shape).astype(np.float32)
    group = Group(np.zeros_like(old), old, old - 0.1, reward, valid, np.zeros_like(valid), np.zeros_like(reward))
    made = Experience(request, codes, group, codes[:, :k], old[:, :k], rng.random((requests, k)) < 0.5)
    if not recipe.rl.item_weight:
        return made
    old = old[..., :1] - 3
    of_items = group._replace(log_p=np.zeros_like(old), old=old, reference=old)
    item = rng.integers(0, len(ids.codes), valid.shape).astype(np.int32)
    made = dataclasses.replace(made, item=np.where(valid, item, -1), item_group=of_items)
    if not recipe.rl.rest_weight:
        return made
    start = rng.normal(size=(requests, len(ids.codes))).astype(np.float32)
    return dataclasses.replace(made, item_start=start)


def with_model(recipe: Recipe, **model) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=model)})


def test_the_item_head_learns_by_the_same_objective_from_its_own_probabilities(recipe: Recipe):
    """`rl.item_weight`: GRPO restated over the head's softmax, in value and gradient; invalid candidates are nobody's."""
    settings = {"item_weight": 0.5, "weight": 2.0, "objective": "grpo", "ntp_weight": 0.0, "format_weight": 0.0}
    own = with_model(rl_recipe(changed(recipe, "items", **settings)), head="both", item_input="both", dropout=0.0)
    dataset, ids, model = load_inputs(own)
    request = make_batch(dataset, ids.codes, own.model, np.asarray(dataset.examples("train")[:4]), 3)
    seen, trie = random_experience(own, request, ids), device_trie(ids.trie, own.model)
    params, tables = model.init(0)
    bias = model.init_bias()
    local, touched = model.localise(request, touched_only=True)
    rows = gather(tables, touched, own.model.tables, jnp.zeros((), jnp.int32))
    seen = dataclasses.replace(seen, request=local)
    codes_only = own.model_copy(update={"rl": own.rl.model_copy(update={"item_weight": 0.0})})

    def part(recipe: Recipe, seen: Experience):
        loss = make_rl_loss(model, recipe)
        return lambda p: loss(p, (rows, rows), bias, local, None, trie, seen, jnp.ones(2))[0]

    def both_parts(p):
        return part(own, seen)(p) - part(codes_only, dataclasses.replace(seen, item=None, item_group=None))(p)

    def restated(p):
        """-(1/N) sum over valid of min(r A, clip(r) A), summed over requests."""
        log_p = model.item_scores(p, local, model.bind(p).encode(local, rows, bias, None)[0], trie)
        total = jnp.zeros(())
        group = seen.item_group
        assert group is not None and seen.item is not None
        for b in range(own.rl.requests):
            on = np.flatnonzero(group.valid[b])
            earned = group.reward[b][on]
            if len(on) < 2:
                continue
            advantage = (earned - earned.mean()) / earned.std()
            ratio = jnp.exp(log_p[b, seen.item[b][on]] - group.old[b][on, 0])
            bounded = jnp.clip(ratio, 1 - own.rl.clip, 1 + own.rl.clip)
            total -= jnp.mean(jnp.minimum(ratio * advantage, bounded * advantage))
        return 2.0 * 0.5 * total

    found, expected = (jax.jit(jax.value_and_grad(f))(params) for f in (both_parts, restated))
    assert abs(float(expected[0])) > 1e-3 and np.any(expected[1]["head"]["items"]["embedding"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, expected)


def test_micro_batches_give_the_step_of_the_whole_batch_however_uneven_their_masks(recipe: Recipe):
    """Every part of the loss, those of the codes and that of the item head."""
    own = rl_recipe(changed(recipe, "parts", kl_weight=0.1, item_weight=0.5, rest_weight=0.3))
    own = with_model(own, head="both", item_input="both", dropout=0.0)
    dataset, ids, model = load_inputs(own)
    optimizer = optax.sgd(1.0)
    examples = np.asarray(dataset.examples("train")[:8])
    logged, request = (make_batch(dataset, ids.codes, own.model, e, 3) for e in (examples[:4], examples[4:]))
    logged.target_weight[1:3] = 0.0
    seen, trie = random_experience(own, request, ids), device_trie(ids.trie, own.model)
    made = []
    for parts in (1, 4):
        train = own.train.model_copy(update={"accumulation": parts})
        step = jax.jit(make_rl_step(model, own.model_copy(update={"train": train}), optimizer))
        made.append(step(init_state(model, optimizer, 0), logged, seen, trie))
    for a, b in zip(*(jax.tree.leaves((state.params, state.tables)) for state, _ in made), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(np.abs(b).max())))  # sums of other orders
    one, four = (ratios(metrics) for _, metrics in made)
    assert {name: one[name] for name in one if "norm" not in name} == pytest.approx(
        {name: four[name] for name in one if "norm" not in name}, abs=1e-4
    )


def test_a_fallen_recall_stops_the_run_and_leaves_the_checkpoint_before(recipe: Recipe):
    recalls = iter((0.5, 0.49, 0.3))
    own = changed(recipe, "falls", watch_every=4, checkpoint_every=4, max_fall=0.1)
    with pytest.raises(StoppedError, match=r"stopped at step 8: held-out Recall@10 fell from 0\.5000 to 0\.3000"):
        reinforce(own, lambda r, d: lambda recommender, scorer: {"recall": next(recalls)}, lambda line: None)
    assert Checkpoints(Path(own.runs) / "falls-rl").steps() == [4]


def test_the_watch_measures_what_the_model_of_the_step_serves(recipe: Recipe):
    own = changed(recipe, "watched", steps=4, watch_every=4, watch_examples=10, watch_k=5, max_fall=1.0)
    reinforce(own, make_watch, lambda line: None)
    watched = [line for line in read_metrics(Path(own.runs) / "watched-rl") if "held_out/recall" in line]
    loaded = load_recommender(str(Path(own.runs) / "watched-rl"))
    fresh = make_watch(loaded.recipe, loaded.dataset)(loaded, None)
    assert watched[-1]["held_out/recall"] == pytest.approx(fresh["recall"])
    assert watched[-1]["held_out/legal"] == pytest.approx(fresh["legal"])


def test_what_rl_makes_frequent_is_not_corrected_away(recipe: Recipe, monkeypatch: pytest.MonkeyPatch):
    """`evaluate.label_shift_days` goes on from how often the run before RL predicts an item."""
    shifted = recipe.evaluate.model_copy(update={"label_shift_days": 3.0})
    own = with_model(changed(recipe, "shifted", init_from="start", steps=4), head="both", item_input="both")
    own = own.model_copy(update={"evaluate": shifted})
    dataset, ids, model = load_inputs(rl_recipe(own))
    params, tables = model.init(0)
    began = {"params": jax.tree.map(lambda x: 3 * x, params), "tables": tables, "bias": model.init_bias()}
    runs = Path(own.runs)
    (runs / "start").mkdir()
    (runs / "start" / "config.yaml").touch()
    instant_reinforcement(monkeypatch)
    monkeypatch.setattr(rl_loop, "_start_policy", lambda *_: began)
    run = reinforce(own, no_watch, lambda line: None)

    def frequencies(folder: Path, policy: Any) -> np.ndarray:
        return Recommender(folder, rl_recipe(own), dataset, ids, model, policy).item_frequencies()

    moved = load_recommender(str(run))
    before, after = (frequencies(runs / "start", policy) for policy in (SimpleNamespace(**began), moved.state))
    assert before.sum() == pytest.approx(1) and np.abs(np.log(before / after)).max() > 0.1
    np.testing.assert_array_equal(moved.item_frequencies(), before)
    np.testing.assert_array_equal(dataclasses.replace(moved, run=runs / "row").item_frequencies(), before)
    again = changed(own, "shifted_again", init_from=str(run))  # RL of an RL run: still those of the first start
    monkeypatch.setattr(rl_loop, "_start_policy", lambda *_: {name: getattr(moved.state, name) for name in began})
    np.testing.assert_array_equal(np.load(reinforce(again, no_watch, lambda line: None) / FREQUENCIES), before)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rewards": {"p_score": 1.0}}, "no run '.*refused-reward'"),
        ({"rewards": {"p_applause": 1.0}}, "rl.rewards names 'p_applause'; there are p_score, p_click"),
        ({"init_from": "nowhere"}, "no run 'nowhere'"),
        ({"ask": "end"}, "rl.ask end has requests that the log does not answer, which hit needs: rl.ask log"),
        ({"ask": "end", "rewards": {"diversity": 1.0}, "objective": "sprec"}, "which sprec needs: rl.ask log"),
        ({"item_weight": 1.0}, "rl.item_weight needs model.head both: codes has no item head beside its decoder"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(recipe: Recipe, settings: dict, said: str):
    own = changed(recipe, "refused", **settings)
    with pytest.raises(InputError, match=said):
        reinforce(own, no_watch, lambda line: None)
    assert not (Path(own.runs) / "refused-rl" / "config.yaml").exists()
