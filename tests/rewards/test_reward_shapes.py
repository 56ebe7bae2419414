"""The embedded world and its reward (DESIGN §4): right on true renders, wrong on others, smooth between;
held-out scenes stay held out.
"""

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrove.rewards.shapes import PASS, ShapesReward, score_picture
from flowgrove.tiny.pictures import (
    BACKGROUND,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    confuse,
    held_out,
    pair_scenes,
    parse,
    render,
    signed_distance,
    single_scenes,
)

PROMPTS = Path(__file__).parents[2] / "recipes" / "prompts"
SINGLES, PAIRS = single_scenes(), pair_scenes()
SAMPLES = {"single": 2 * SINGLES, "pair": random.Random(0).sample(PAIRS, 240)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def scores_of(pictures, scenes):
    return ShapesReward()(pictures, [scene.caption for scene in scenes]).double()


def share_passed(pictures, scenes):
    return (scores_of(pictures, scenes) >= PASS).double().mean().item()


def drawn(things):
    """A picture of (shape, colour, x, y, area): drawn as the renderer does, but anywhere."""
    ys, xs = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    picture = torch.tensor(BACKGROUND).view(3, 1, 1).repeat(1, 32, 32)
    for shape, colour, x, y, area in things:
        inside = (0.5 - signed_distance(shape, xs - x, ys - y, area)).clamp(0, 1)
        picture.lerp_(torch.tensor(COLOURS[colour]).view(3, 1, 1), inside)
    return picture


@pytest.fixture(scope="module")
def true_pictures():
    return {kind: render(scenes, random.Random(1)) for kind, scenes in SAMPLES.items()}


# True and wrong pictures


@pytest.mark.parametrize("kind", SAMPLES)
def test_true_renders_pass(true_pictures, kind):
    assert len(true_pictures[kind]) == len(SAMPLES[kind]) == 240
    assert share_passed(true_pictures[kind], SAMPLES[kind]) >= 0.99


def with_another_colour(scene, generator, index):
    thing = scene.things[index]
    other = replace(thing, colour=generator.choice([colour for colour in COLOURS if colour != thing.colour]))
    return replace(scene, things=(*scene.things[:index], other, *scene.things[index + 1 :]))


def with_another_shape(scene, generator, index):
    thing = scene.things[index]
    other = replace(thing, shape=generator.choice([shape for shape in SHAPES if shape != thing.shape]))
    return replace(scene, things=(*scene.things[:index], other, *scene.things[index + 1 :]))


def somewhere_else(scene, generator, _):
    if scene.place is not None:
        return replace(scene, place=generator.choice([place for place in PLACES if place != scene.place]))
    return replace(scene, relation=generator.choice([relation for relation in RELATIONS if relation != scene.relation]))


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("change", [with_another_colour, with_another_shape, somewhere_else])
def test_pictures_with_one_wrong_detail_do_not_pass(true_pictures, kind, change):
    generator = random.Random(2)
    asked = [change(scene, generator, generator.randrange(len(scene.things))) for scene in SAMPLES[kind]]
    assert all(wrong != scene for wrong, scene in zip(asked, SAMPLES[kind], strict=True))
    assert share_passed(true_pictures[kind], asked) <= 0.01


@pytest.mark.parametrize("kind", SAMPLES)
def test_confused_captions_do_not_pass(true_pictures, kind):
    generator = random.Random(3)
    asked = [confuse(scene, generator) for scene in SAMPLES[kind]]
    changed = [index for index, scene in enumerate(SAMPLES[kind]) if asked[index] != scene]
    assert 0.5 < len(changed) / len(asked) < 1  # a detail drawn anew may come out the same
    assert {len(asked[index].things) for index in changed} == {1 if kind == "single" else 2}
    assert share_passed(true_pictures[kind][changed], [asked[index] for index in changed]) <= 0.01
    kept = [index for index in range(len(asked)) if index not in changed]
    assert share_passed(true_pictures[kind][kept], [asked[index] for index in kept]) >= 0.95


def test_confusion_draws_every_detail():
    scene, generator = SINGLES[0], random.Random(4)
    seen = {confuse(scene, generator) for _ in range(400)}
    only = [
        [replace(scene, things=(Thing(c, "circle"),)) for c in COLOURS],
        [replace(scene, things=(Thing("red", s),)) for s in SHAPES],
    ]
    assert seen == {*only[0], *only[1], *(replace(scene, place=place) for place in PLACES)}


def test_a_pair_with_its_things_exchanged_does_not_pass(true_pictures):
    asked = [replace(scene, things=scene.things[::-1]) for scene in SAMPLES["pair"]]
    assert share_passed(true_pictures["pair"], asked) <= 0.01


def test_a_pair_seen_from_its_other_thing_passes(true_pictures):
    """ "a red circle left of a blue square" and "a blue square right of a red circle" are one picture."""
    asked = [replace(scene, things=scene.things[::-1], relation=OPPOSITE[scene.relation]) for scene in SAMPLES["pair"]]
    assert share_passed(true_pictures["pair"], asked) >= 0.99


BLANKS = {"background": BACKGROUND, "white": (1.0, 1.0, 1.0), "grey": (0.5, 0.5, 0.5), **COLOURS}


@pytest.mark.parametrize("name", BLANKS)
def test_one_colour_alone_does_not_pass(name):
    scenes = SINGLES + PAIRS[::40]
    scores = scores_of(torch.tensor(BLANKS[name]).view(1, 3, 1, 1).expand(len(scenes), 3, 32, 32), scenes)
    assert [scene.caption for scene, score in zip(scenes, scores, strict=True) if score >= PASS] == []
    assert name != "background" or scores.max() == 0


@pytest.mark.parametrize("seed", range(3))
def test_noise_does_not_pass(seed):
    scenes, generator = SINGLES + PAIRS[::40], torch.Generator().manual_seed(seed)
    noise = torch.rand(len(scenes), 3, 32, 32, generator=generator)
    assert scores_of(noise, scenes).max() < PASS
    steps = noise.round()  # only the corners of the colour cube
    assert scores_of(steps, scenes).max() < PASS


def test_what_was_asked_drawn_twice_does_not_pass():
    scenes = [scene for scene in SINGLES if scene.place != "at the centre"]
    twice = []
    for scene in scenes:
        (x, y), thing = PLACES[scene.place], scene.things[0]
        copies = [(thing.shape, thing.colour, x, y, 100), (thing.shape, thing.colour, 32 - x, 32 - y, 90)]
        assert score_picture(drawn(copies[:1]), scene).score >= PASS
        twice.append(drawn(copies))
    assert scores_of(torch.stack(twice), scenes).max() < PASS


def test_a_pair_with_a_third_thing_does_not_pass():
    scene = parse("a red circle left of a blue square")
    pair = [("circle", "red", 7, 8, 60), ("square", "blue", 24, 8, 60)]
    assert score_picture(drawn(pair), scene).score >= PASS
    for third in (("circle", "red", 16, 24, 50), ("cross", "black", 16, 24, 50)):
        assert score_picture(drawn([*pair, third]), scene).score < PASS


def test_a_pair_with_one_thing_missing_does_not_pass():
    scenes = SAMPLES["pair"][:80]
    for index in (0, 1):
        alone = torch.stack(
            [
                drawn([(scene.things[index].shape, scene.things[index].colour, 9.0 + 14 * index, 16, 80)])
                for scene in scenes
            ]
        )
        assert scores_of(alone, scenes).max() < PASS


# The score


@given(seed=st.integers(0, 2**32 - 1), smooth=st.integers(0, 3), scene=st.sampled_from(SINGLES + PAIRS))
@settings(max_examples=60)
def test_any_picture_scores_between_0_and_1(seed, smooth, scene):
    picture = torch.rand(3, 32 >> smooth, 32 >> smooth, generator=torch.Generator().manual_seed(seed))
    picture = picture.repeat_interleave(1 << smooth, -1).repeat_interleave(1 << smooth, -2)
    credits = score_picture(picture, scene)
    assert all(0 <= part <= 1 for part in (credits.colour, credits.shape, credits.place, credits.count, credits.score))


def test_the_reward_scores_each_picture_for_its_own_prompt(true_pictures):
    pictures, scenes = true_pictures["single"][:6], SAMPLES["single"][:6]
    scores = ShapesReward()(pictures, [scene.caption for scene in scenes])
    assert scores.shape == (6,)
    assert scores.dtype == torch.float32
    assert (
        scores.tolist()
        == torch.tensor(
            [score_picture(picture, scene).score for picture, scene in zip(pictures, scenes, strict=True)]
        ).tolist()
    )
    turned = ShapesReward()(pictures, [scene.caption for scene in [*scenes[1:], scenes[0]]])
    assert (turned < PASS).all()
    assert (scores >= PASS).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", [(1, 0), (0, 1), (1, 1)])
def test_a_shape_that_moves_away_loses_place_credit_step_by_step(shape, direction):
    scene = Scene((Thing("blue", shape),), place="at the top left")
    places = [
        score_picture(drawn([(shape, "blue", 9 + step * direction[0], 9 + step * direction[1], 90)]), scene).place
        for step in range(16)
    ]
    assert places[0] == 1
    assert places[-1] < 0.1
    assert all(later <= earlier for earlier, later in itertools.pairwise(places))
    assert len(set(places)) >= 8


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_pair_that_turns_away_loses_its_score_step_by_step(relation):
    """A quarter turn round the centre takes all of it, and half a turn does not bring it back."""
    (dx, dy), scene, scores = RELATIONS[relation], parse(f"a red square {relation} a green circle"), []
    for step in (0, 1, 2, 3, 4, 5, 6, 12):
        angle = math.pi * step / 12
        along, across = 8 * math.cos(angle), 8 * math.sin(angle)
        x, y = along * dx - across * dy, along * dy + across * dx
        scores.append(
            score_picture(
                drawn([("square", "red", 16 - x, 16 - y, 60), ("circle", "green", 16 + x, 16 + y, 60)]), scene
            ).score
        )
    quarter, half = scores[:-1], scores[-1]
    assert quarter[0] >= PASS
    assert quarter[-1] < 0.01
    assert half < 0.2
    # squares off the grid have rougher outlines
    assert all(later <= earlier + 0.05 for earlier, later in itertools.pairwise(quarter))
    assert any(0.05 < score < 0.8 for score in quarter)


def test_credit_rises_as_a_wrong_colour_blends_into_the_right_one():
    scene, mixed = parse("a red square at the centre"), []
    for share in range(10):
        picture = drawn([("square", "blue", 16, 16, 100)])
        picture[:, 11 : 11 + share + 1, 11:21] = torch.tensor(COLOURS["red"]).view(3, 1, 1)
        mixed.append(score_picture(picture, scene).score)
    assert mixed == sorted(mixed)
    assert len(set(mixed)) >= 6
    assert mixed[0] < 0.7
    assert mixed[-1] >= PASS


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_bigger_picture_scores_about_the_same(true_pictures, kind):
    small, scenes = true_pictures[kind][:100], SAMPLES[kind][:100]
    scores = scores_of(small, scenes)
    bigger = scores_of(small.repeat_interleave(2, -1).repeat_interleave(2, -2), scenes)
    assert (bigger - scores).abs().max() < 0.2
    assert (bigger - scores).abs().mean() < 0.05
    asked = [
        replace(scene, place="at the centre") if scene.place else replace(scene, relation=OPPOSITE[scene.relation])
        for scene in scenes
    ]
    wrong = [index for index, scene in enumerate(scenes) if asked[index] != scene]
    assert (
        share_passed(small.repeat_interleave(2, -1).repeat_interleave(2, -2)[wrong], [asked[index] for index in wrong])
        <= 0.01
    )


# Sentences


def test_every_caption_parses_back_to_its_scene():
    assert len(SINGLES) == len(COLOURS) * len(SHAPES) * len(PLACES)
    assert len(PAIRS) == len(RELATIONS) * len(COLOURS) * (len(COLOURS) - 1) * len(SHAPES) ** 2
    captions = [scene.caption for scene in SINGLES + PAIRS]
    assert len(set(captions)) == len(captions)
    assert [parse(caption) for caption in captions] == SINGLES + PAIRS


def test_captions_read_as_in_the_design():
    scene = parse("a red circle left of a blue square")
    assert scene == Scene((Thing("red", "circle"), Thing("blue", "square")), relation="left of")
    assert scene.caption == "a red circle left of a blue square"
    assert parse("a red circle at the top left") == Scene((Thing("red", "circle"),), place="at the top left")


@pytest.mark.parametrize(
    "text", ["A Red Circle at the Top Left", "  a red   circle at the top left ", "a red circle at the top left."]
)
def test_capitals_spaces_and_a_full_stop_do_not_matter(text):
    assert parse(text) == Scene((Thing("red", "circle"),), place="at the top left")


OTHER_SENTENCES = [
    "",
    " ",
    "a photo of a dog",
    "a red circle",
    "red circle at the top left",
    "a red circle at the top",
    "a pink circle at the centre",
    "a red star at the centre",
    "a circle red at the centre",
    "two red circles at the centre",
    "a red circle at the centre at the centre",
    "a red circle near a blue square",
    "a red circle left of",
    "left of a blue square",
    "a red circle left of a blue square above a green cross",
    "a red circle left of a blue square at the centre",
    "a red circle\nleft of a dog",
]


@pytest.mark.parametrize("text", OTHER_SENTENCES)
def test_other_sentences_are_refused_in_one_line_that_shows_the_form(text):
    with pytest.raises(ValueError) as caught:
        parse(text)
    message = str(caught.value)
    assert "\n" not in message
    assert repr(text) in message
    assert all(word in message for word in (*COLOURS, *SHAPES, *PLACES, *RELATIONS))


# Renderer


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("area", [60.0, 100.0])
def test_shapes_have_the_area_they_are_given_around_their_centre(shape, area):
    grid = torch.arange(-15, 15, 0.05) + 0.025
    ys, xs = torch.meshgrid(grid, grid, indexing="ij")
    inside = (signed_distance(shape, xs, ys, area) <= 0).double()
    assert inside.sum().item() * 0.05**2 == pytest.approx(area, rel=0.02)
    assert (inside * xs).sum() / inside.sum() == pytest.approx(0, abs=0.05)
    assert (inside * ys).sum() / inside.sum() == pytest.approx(0, abs=0.05)


def test_an_unknown_shape_is_an_error():
    with pytest.raises(ValueError, match="star"):
        signed_distance("star", torch.zeros(1), torch.zeros(1), 10.0)


def test_renders_are_pictures_and_follow_their_generator():
    scenes = SINGLES[:3] + PAIRS[:3]
    pictures = render(scenes, random.Random(5))
    assert pictures.shape == (6, 3, 32, 32)
    assert pictures.dtype == torch.float32
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert torch.equal(pictures, render(scenes, random.Random(5)))
    others = render(scenes, random.Random(6))
    assert all(not torch.equal(a, b) for a, b in zip(pictures, others, strict=True))


# Training and evaluation prompts


def prompts_in(name):
    return [parse(line) for line in (PROMPTS / name).read_text(encoding="utf-8").splitlines() if line.strip()]


FILES = sorted(path.name for path in PROMPTS.glob("*.txt"))


def test_there_are_prompts_to_train_and_to_evaluate_on():
    assert {"shapes_train.txt", "shapes_eval.txt"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_shipped_prompt_is_a_sentence_about_shapes_and_stands_once(name):
    scenes = prompts_in(name)
    assert len(scenes) >= 8
    assert len(set(scenes)) == len(scenes)


@pytest.mark.parametrize("name", FILES)
def test_training_prompts_are_never_held_out_and_evaluation_prompts_always_are(name):
    held = {held_out(scene) for scene in prompts_in(name)}
    assert held == {name.endswith("_eval.txt")}
    assert name.endswith(("_eval.txt", "_train.txt"))


def test_every_scene_with_one_thing_is_in_one_of_the_two_files():
    train, evaluation = set(prompts_in("shapes_train.txt")), set(prompts_in("shapes_eval.txt"))
    assert not train & evaluation
    assert train | evaluation == set(SINGLES)
    assert not train & {scene for scene in SINGLES if held_out(scene)}


def words(scenes):
    return {
        *(thing.colour for scene in scenes for thing in scene.things),
        *(thing.shape for scene in scenes for thing in scene.things),
        *(scene.place or scene.relation for scene in scenes),
    }


@pytest.mark.parametrize(("name", "where"), [("shapes_train.txt", PLACES), ("pairs_train.txt", RELATIONS)])
def test_training_prompts_hold_every_word(name, where):
    assert words(prompts_in(name)) == {*COLOURS, *SHAPES, *where}


@pytest.mark.parametrize("scenes", [SINGLES, PAIRS], ids=["single", "pair"])
def test_held_out_scenes_are_some_and_every_word_is_shown_without_them(scenes):
    shown = [scene for scene in scenes if not held_out(scene)]
    assert 0.1 < 1 - len(shown) / len(scenes) < 0.5
    assert words(shown) == words(scenes) == words([scene for scene in scenes if held_out(scene)])


def test_every_pair_of_colour_and_shape_is_shown_at_some_place():
    """What is new in evaluation is the combination with a place."""
    shown = {scene.things[0] for scene in SINGLES if not held_out(scene)}
    assert shown == {Thing(colour, shape) for colour in COLOURS for shape in SHAPES}
