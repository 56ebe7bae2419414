"""What `flowgrove profile` advises: each rule speaks where its reason was measured and the recipe has another value,
and its saving follows from counts and seconds.
"""

from dataclasses import replace

import pytest

from flowgrove.profiler import advice
from flowgrove.profiler.advice import Suggestion, suggestions
from flowgrove.profiler.facts import Facts
from flowgrove.profiler.gaps import Gaps, Idle
from flowgrove.profiler.phases import Phase
from flowgrove.recipe.loading import dump_recipe, load_recipe
from flowgrove.setup import Setup
from flowgrove.spans import DECODE, OPTIMIZER, REWARD, STAGE, TRANSFORMER
from policy_cases import small_recipe

FULL = 1000  # tokens of a pass


def phase(name, seconds, kind=STAGE, passes=0, rows=0, tokens=0, beside=False):
    return Phase(name, beside, kind, seconds, passes, rows, tokens)


def iteration(rollout=3.0, forward=2.0, backward=4.0, decode=0.2, score=0.1, optimizer=0.1, other=0.6, tokens=900):
    """Ten seconds, with passes of 10 rows."""
    return [
        phase("rollout/transformer", rollout, TRANSFORMER, passes=3, rows=30, tokens=3 * tokens),
        phase("update/transformer", forward, TRANSFORMER, passes=2, rows=20, tokens=2 * tokens),
        phase("update/backward", backward, TRANSFORMER, passes=2, rows=20, tokens=2 * tokens),
        phase("reward/decode", decode, DECODE, passes=1, rows=12),
        phase("reward/shapes", score, REWARD, passes=1, rows=12),
        phase("update/optimizer", optimizer, OPTIMIZER, passes=2),
        phase("update/other", other),
    ]


def facts(phases=None, *, device_type="cpu", sections=None, **known):
    """Of a recipe of 3 prompts, 4 samples, 5 steps of which 2 train; `sections` are merged into it."""
    phases = iteration() if phases is None else phases
    sections = {"engine": {"token_budget": 4096}} if sections is None else sections
    seconds = sum(one.seconds for one in phases if not one.beside)
    setup = Setup(small_recipe(**sections))
    return Facts(setup, device_type, seconds, phases, FULL, **{"utilisation": 0.6, **known})


def written(suggestion, measured, folder):
    """What the recipe file says at the suggestion's key once --set has written it there."""
    path = folder / "recipe.yaml"
    path.write_text(dump_recipe(measured.recipe))
    place = load_recipe(path, (f"{suggestion.key}={suggestion.value}",)).model_dump()
    for part in suggestion.key.split("."):
        place = place[int(part)] if part.isdigit() else place[part]
    return place


def test_every_suggestion_can_be_set(tmp_path):
    slow = {"rollout": {"steps": 20}, "model": {"vae_tiling": True, "gradient_checkpointing": True, "dtype": "fp32"}}
    wide = {"rollout": {"steps": 8, "window": {"strategy": "all"}}}
    graphs = {"engine": {"reuse_rollout_graph": False, "cuda_graphs": False, "token_budget": 4096}}
    waiting = Idle(span=100.0, busy=60.0, gaps={"rollout/transformer": Gaps(9, 9, 20.0)})
    cases = [
        facts(sections={**slow, "engine": {"share": False}}, doubles=True, device_type="cuda"),
        facts(sections={**wide, **graphs}, device_type="cuda", idle=waiting, utilisation=0.3),
        facts(iteration(tokens=100, decode=5.0, optimizer=5.0), sections=slow, utilisation=0.3),
        facts(sections={"engine": {"token_budget": "auto"}}, utilisation=0.3),
    ]
    told = [(one, measured) for measured in cases for one in suggestions(measured)]
    keys = {one.key for one, _ in told}
    assert {"engine.cuda_graphs", "engine.token_budget", "rollout.tail", "rollout.guidance_range"} <= keys
    assert len(keys) >= 12
    for one, measured in told:
        path = tmp_path / "recipe.yaml"
        path.write_text(dump_recipe(measured.recipe))
        other = load_recipe(path, (f"{one.key}={one.value}",))
        assert other != load_recipe(path), one


def test_what_a_recipe_may_not_say_is_not_advised(monkeypatch):
    refused = Suggestion("engine.cuda_graphs", "true", "it is refused with fsdp2")
    kept = Suggestion("engine.compile", "true", "it is not")
    monkeypatch.setattr(advice, "RULES", (lambda _: refused, lambda _: kept))
    assert suggestions(facts()) == [refused, kept]
    assert suggestions(facts(sections={"engine": {"distributed": "fsdp2"}})) == [kept]


def test_a_recipe_that_has_it_all_is_advised_nothing():
    good = {
        "rollout": {"tail": {"compress": 0.4}},
        "update": {"step_fraction": 0.5},
        "engine": {"token_budget": 4096, "cuda_graphs": True, "compile": True},
        "model": {"dtype": "bf16"},
    }
    assert suggestions(facts(sections=good, device_type="cuda")) == []


def test_what_saves_most_stands_first_and_what_cannot_be_told_last():
    found = suggestions(
        facts(
            sections={
                "model": {"gradient_checkpointing": True, "dtype": "bf16"},
                "rollout": {"tail": None},
                "engine": {"token_budget": 4096, "share": False},
            },
            device_type="cuda",
        )
    )
    saved = [one.saves for one in found]
    known = [value for value in saved if value is not None]
    assert len(known) >= 3
    assert known == sorted(known, reverse=True)
    assert saved[len(known) :] == [None] * (len(saved) - len(known))
    assert "engine.compile" in [one.key for one in found[len(known) :]]


def test_a_suggestion_is_told_in_a_sentence():
    one = Suggestion("engine.cuda_graphs", "true", "the GPU waits", 0.5)
    assert one.told(2.0) == "engine.cuda_graphs: true: the GPU waits; saves at most 0.5 of 2 s"
    other = replace(one, saves=None, learns_otherwise=True)
    assert other.told(2.0) == "engine.cuda_graphs: true: the GPU waits; it changes what is learned"


def test_states_that_are_shared_need_one_row():
    unshared = facts(sections={"engine": {"share": False}})
    found = advice.sharing(unshared)
    # a window of 2 from step 1 in 5 steps with 4 leaves: 1 + 1 + 4 + 4 + 4 rows shared, 20 not; 2 + 8 of them train
    counts = unshared.plan.counts
    assert (counts.unshared_rollout_forwards, counts.rollout_forwards) == (20, 14)
    forward, train = 3.0 / 30, (2.0 + 4.0) / 20
    fewer = counts.unshared_train_passes - counts.train_passes
    assert found.saves == pytest.approx(3 * (20 - 14) * forward + 3 * fewer * train)
    assert (found.key, found.value) == ("engine.share", "true")
    assert advice.sharing(facts()) is None


def test_the_first_update_may_use_the_rollouts_graphs():
    found = advice.graphs_of_the_rollout(facts(sections={"engine": {"reuse_rollout_graph": False}}))
    assert (found.key, found.saves) == ("engine.reuse_rollout_graph", 1.0), "one of two updates' forwards"
    assert advice.graphs_of_the_rollout(facts()) is None, "auto already"
    exact = {"engine": {"reuse_rollout_graph": False, "exact_replay": True}}
    assert advice.graphs_of_the_rollout(facts(sections=exact)) is None
    off = {"reuse_rollout_graph": False}
    assert advice.graphs_of_the_rollout(facts(sections={"engine": {**off, "distributed": "fsdp2"}})) is None
    for prune, silent in (
        ({"kind": "extreme"}, True), ({"kind": "parent_top1"}, True), ({"kind": "depth"}, False),
    ):  # fmt: skip
        found = advice.graphs_of_the_rollout(facts(sections={"engine": off, "credit": {"prune": prune}}))
        assert (found is None) == silent, prune


def test_recomputation_is_told_of_where_memory_has_room():
    sections = {"model": {"gradient_checkpointing": True}}
    asked = []

    def fits(recipe):
        asked.append(recipe.model.gradient_checkpointing)
        return len(asked) in (1, 3)

    found = advice.recomputation(facts(sections=sections, fits=fits))
    assert (found.key, found.value, found.saves) == ("model.gradient_checkpointing", "none", pytest.approx(2.0))
    assert advice.recomputation(facts(sections=sections, fits=fits)).value == "selective"
    assert advice.recomputation(facts(sections=sections, fits=fits)) is None, "no room"
    assert asked == ["none", "none", "selective", "none", "selective"]
    asked.clear()
    divided = {**sections, "engine": {"compile": True, "distributed": "fsdp2"}}
    assert advice.recomputation(facts(sections=divided, fits=lambda one: asked.append(one) or False)) is None
    assert len(asked) == 1, "nothing but none goes with them"
    assert advice.recomputation(facts()) is None


def test_a_gpu_that_waits_for_launches_is_advised_recordings():
    waiting = Idle(
        span=100.0, busy=60.0, gaps={"rollout/transformer": Gaps(9, 9, 20.0), "update/other": Gaps(1, 1, 20.0)}
    )
    known = {"device_type": "cuda", "idle": waiting}
    waiting.gaps["rollout/wait"] = Gaps(1, 1, 10.0)  # for rewards, not for launches
    found = advice.recorded_passes(facts(**known))
    assert (found.key, found.saves) == ("engine.cuda_graphs", pytest.approx(0.2 * 10.0))
    assert advice.recorded_passes(facts(device_type="cuda", idle=Idle(100.0, 99.0, {}))) is None
    for engine in ({"cuda_graphs": True}, {"split_lengths": True}, {"distributed": "fsdp2"}):
        assert advice.recorded_passes(facts(sections={"engine": engine}, **known)) is None
    assert advice.recorded_passes(facts(device_type="cpu", idle=None)) is None
    assert advice.recorded_passes(facts(sections={"engine": {"distributed": "fsdp2"}}, **known)) is None


def test_full_passes_at_a_low_rate_are_advised_another_budget():
    auto = {"engine": {"token_budget": "auto"}}
    assert advice.larger_passes(facts(sections=auto, utilisation=0.3)).key == "engine.token_budget"
    assert advice.larger_passes(facts(sections=auto, utilisation=0.3, device_type="cuda")) is None, "it was measured"
    assert advice.larger_passes(facts(utilisation=0.3, device_type="cuda")).value == "auto"
    assert advice.larger_passes(facts(sections=auto, utilisation=0.7)) is None
    assert advice.larger_passes(facts(iteration(tokens=100), sections=auto, utilisation=0.3)) is None, "far from full"
    assert advice.larger_passes(facts(iteration(tokens=840), sections=auto, utilisation=0.3)) is None, "not yet full"
    assert advice.larger_passes(facts(iteration(tokens=860), sections=auto, utilisation=0.3)).value == "2000"
    assert advice.more_prompts(facts(iteration(tokens=600), utilisation=0.3)) is None, "nor far from it"


def test_passes_that_are_far_from_full_are_advised_more_prompts():
    found = advice.more_prompts(facts(iteration(tokens=100), utilisation=0.3))
    assert (found.key, found.value, found.learns_otherwise) == ("data.prompts_per_iteration", "6", True)
    assert "100 of 1,000 tokens" in found.reason
    assert advice.more_prompts(facts(iteration(tokens=900), utilisation=0.3)) is None
    assert advice.more_prompts(facts(iteration(tokens=100), utilisation=0.8)) is None


def test_a_gpu_that_is_mostly_in_the_transformer_may_compile_it_and_take_bf16():
    single = {"model": {"dtype": "fp32"}}
    assert advice.compiled_blocks(facts(device_type="cuda")).key == "engine.compile"
    assert advice.half_precision(facts(sections=single, device_type="cuda")).value == "bf16"
    assert advice.half_precision(facts(sections=single, device_type="cuda")).learns_otherwise
    slow_reward = iteration(score=20.0)
    for rule in (advice.compiled_blocks, advice.half_precision):
        assert rule(facts(sections=single)) is None, "a CPU"
        assert rule(facts(slow_reward, sections=single, device_type="cuda")) is None
    ready = {"model": {"dtype": "bf16"}, "engine": {"compile": True}}
    assert advice.compiled_blocks(facts(sections=ready, device_type="cuda")) is None
    assert advice.half_precision(facts(sections=ready, device_type="cuda")) is None


@pytest.mark.parametrize(
    ("entry", "device_type", "key", "value"),
    [
        ({"name": "http", "url": "http://127.0.0.1:1"}, "cpu", "concurrency", "8"),
        ({"name": "http", "url": "http://127.0.0.1:1", "concurrency": 5}, "cpu", "concurrency", "10"),
        ({"name": "pickscore"}, "cuda", "dtype", "bf16"),
        ({"name": "pickscore", "dtype": "bf16"}, "cuda", "batch_size", "64"),
        ({"name": "shapes"}, "cpu", "name", "http"),
    ],
)
def test_rewards_that_an_iteration_waits_for_are_told_of(entry, device_type, key, value, tmp_path):
    """The slowest of two is named."""
    slow = [
        *iteration(score=0.0),
        phase("reward/jpeg_size", 1.0, REWARD, rows=12),
        phase(f"reward/{entry['name']}", 3.0, REWARD, rows=12),
        phase("reward/other", 0.5),
    ]
    sections = {"reward": [{"name": "jpeg_size"}, entry]}
    measured = facts(slow, sections=sections, device_type=device_type)
    found = advice.rewards(measured)
    assert written(found, measured, tmp_path) == (int(value) if value.isdigit() else value)
    assert (found.key, found.value) == (f"reward.1.{key}", value)
    assert found.learns_otherwise == (key == "dtype")
    assert found.saves == pytest.approx(4.0), "what no range holds is not theirs"
    assert advice.rewards(facts(sections=sections, device_type=device_type)) is None


def test_rewards_on_their_own_thread_count_by_what_is_waited_for():
    waiting = [
        *[one for one in iteration() if one.stage != "reward"],
        phase("rollout/wait", 2.0),
        phase("reward/wait", 3.0),
        phase("reward/other", 0.5),
        phase("reward/shapes", 9.0, REWARD, rows=12, beside=True),
    ]
    assert advice.rewards(facts(waiting)).saves == 5.0, "also what the rollout waits for"
    shared = [*waiting, phase("reward/decode", 81.0, DECODE, rows=12, beside=True)]
    assert advice.rewards(facts(shared)) is None, "nine tenths of the wait are for decoding"
    assert advice.fewer_pictures(facts(shared)).saves == pytest.approx(0.9 * 5.0 / 4)
    hidden = [replace(one, seconds=0.01) if one.name.endswith("/wait") else one for one in waiting]
    assert advice.rewards(facts(hidden)) is None


def test_decoding_that_dominates_is_told_of():
    slow = iteration(decode=10.0)
    found = advice.fewer_pictures(facts(slow))
    assert (found.key, found.value, found.saves) == ("rollout.group_size", "3", pytest.approx(2.5))
    assert found.learns_otherwise
    assert advice.fewer_pictures(facts()) is None
    tiled = {"model": {"vae_tiling": True}}
    assert advice.tiles(facts(slow, sections=tiled)).key == "model.vae_tiling"
    assert advice.tiles(facts(slow)) is None


def test_a_tail_saves_the_forwards_that_its_plan_leaves_out():
    long = {"rollout": {"steps": 20}}
    measured = facts(sections=long)
    found = advice.shorter_tail(measured)
    # after steps 1 and 2 come 17, of which 0.4 are 7: ten fewer, of 4 rows for each of 3 prompts
    assert found.saves == pytest.approx(10 * 4 * 3 * 3.0 / 30)
    assert (found.key, found.learns_otherwise) == ("rollout.tail", True)
    assert advice.shorter_tail(facts(sections={"rollout": {"steps": 20, "tail": {}}})) is None
    every = {"rollout": {"window": {"strategy": "all"}}}
    assert advice.shorter_tail(facts(sections=every)) is None, "all steps but the last are stochastic"


def test_guidance_where_there_is_no_noise_costs_a_second_row():
    found = advice.unguided_steps(facts(doubles=True))
    # steps 0, 3 and 4 are plain, of 1, 4 and 4 rows for each of 3 prompts
    assert found.saves == pytest.approx(27 * 3.0 / 30 / 2)
    assert (found.key, found.value) == ("rollout.guidance_range", "[1, 3]")
    assert advice.unguided_steps(facts()) is None
    assert advice.unguided_steps(facts(doubles=True, sections={"rollout": {"guidance_range": [0, 3]}})) is None


def test_steps_between_those_with_noise_stay_guided():
    tree = {"rollout": {"steps": 12, "group_size": 16, "tree": {"fanout": 2, "splits": [0, 3, 6, 9]}}}
    measured = facts(doubles=True, sections=tree)
    found = advice.unguided_steps(measured)
    # of steps 0 to 11 only 10 and 11 lie outside, each of 16 rows for each of 3 prompts
    assert found.value == "[0, 10]"
    assert found.saves == pytest.approx(2 * 16 * 3 * 3.0 / 30 / 2)


def test_an_update_that_dominates_may_train_fewer_steps():
    wide = {"rollout": {"steps": 8, "window": {"strategy": "all"}}}
    measured = facts(sections=wide)
    found = advice.fewer_trained_steps(measured)
    other = Setup(small_recipe(**wide, update={"step_fraction": 0.6})).first_plan.counts.train_passes
    fewer = 3 * (measured.plan.counts.train_passes - other)
    assert fewer > 0
    assert found.saves == pytest.approx(fewer * 6.0 / 20)
    assert advice.fewer_trained_steps(facts(iteration(rollout=20.0), sections=wide)) is None
    assert advice.fewer_trained_steps(facts(sections={**wide, "update": {"step_fraction": 0.8}})) is None


def test_optimiser_steps_that_dominate_may_be_fewer():
    slow = iteration(optimizer=5.0)
    found = advice.fewer_updates(facts(slow))
    assert (found.key, found.value, found.saves) == ("update.updates_per_iteration", "1", 2.5)
    assert advice.fewer_updates(facts()) is None
    assert advice.fewer_updates(facts(slow, sections={"update": {"updates_per_iteration": 1}})) is None
