"""The world of the embedded pipeline: 32×32 pictures of coloured shapes, the sentences that describe them, and a
renderer.

A scene is one shape at a place ("a red circle at the top left") or two shapes in a relation ("a red circle left of a
blue square"). `parse` turns a sentence into a `Scene`, `Scene.caption` turns it back, `render` draws scenes as the
pictures that the pipeline learns from.
"""

import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowgrove.errors import UserError

SIZE = 32
BACKGROUND = (0.90, 0.90, 0.88)
COLOURS = {
    "red": (0.86, 0.15, 0.15),
    "green": (0.15, 0.65, 0.25),
    "blue": (0.18, 0.32, 0.88),
    "yellow": (0.95, 0.80, 0.10),
    "purple": (0.58, 0.20, 0.72),
    "black": (0.08, 0.08, 0.10),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {  # centres in pixels, (x, y), y downwards
    "at the top left": (9.0, 9.0),
    "at the top right": (23.0, 9.0),
    "at the bottom left": (9.0, 23.0),
    "at the bottom right": (23.0, 23.0),
    "at the centre": (16.0, 16.0),
}
# first → second
RELATIONS = {"left of": (1.0, 0.0), "right of": (-1.0, 0.0), "above": (0.0, 1.0), "below": (0.0, -1.0)}


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One thing with a place, or two things with a relation (the other field is None)."""

    things: tuple[Thing, ...]
    place: str | None = None
    relation: str | None = None

    @property
    def caption(self) -> str:
        if self.relation is None:
            return f"{self.things[0]} {self.place}"
        return f"{self.things[0]} {self.relation} {self.things[1]}"


def parse(prompt: str) -> Scene:
    """The scene that `prompt` describes. Raises UserError, with the accepted form, for any other sentence."""
    text = " ".join(prompt.lower().split()).rstrip(".")
    try:
        for place in PLACES:
            if text.endswith(" " + place):
                return Scene((_thing(text.removesuffix(" " + place)),), place=place)
        for relation in RELATIONS:
            first, found, second = text.partition(f" {relation} ")
            if found:
                return Scene((_thing(first), _thing(second)), relation=relation)
    except KeyError:
        pass
    raise UserError(
        f"prompt {prompt!r} is not a sentence about shapes: write 'a COLOUR SHAPE PLACE' or 'a COLOUR SHAPE RELATION a "
        "COLOUR SHAPE' "
        f"with colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}; places {', '.join(PLACES)}; "
        f"relations {', '.join(RELATIONS)}"
    )


def _thing(words: str) -> Thing:
    match words.split():
        case ["a", colour, shape] if colour in COLOURS and shape in SHAPES:
            return Thing(colour, shape)
    raise KeyError(words)


def single_scenes() -> list[Scene]:
    """All scenes with one thing: colours × shapes × places."""
    return [Scene((Thing(c, s),), place=p) for c in COLOURS for s in SHAPES for p in PLACES]


def pair_scenes() -> list[Scene]:
    """All scenes with two things of different colours: relations × ordered pairs."""
    things = [Thing(c, s) for c in COLOURS for s in SHAPES]
    return [Scene((a, b), relation=r) for a in things for b in things if a.colour != b.colour for r in RELATIONS]


def held_out(scene: Scene) -> bool:
    """Whether a scene is kept for evaluation: one colour–shape–place combination in five, no pretraining and no
    training prompt ever shows it.
    """
    if scene.place is None:
        return any((list(COLOURS).index(t.colour) + SHAPES.index(t.shape)) % 5 == 4 for t in scene.things)
    index = (
        list(COLOURS).index(scene.things[0].colour)
        + 2 * SHAPES.index(scene.things[0].shape)
        + list(PLACES).index(scene.place)
    )
    return index % 5 == 4


def confuse(scene: Scene, generator: random.Random) -> Scene:
    """The scene with one detail of it, chosen at random, drawn anew: how a noisy caption differs from its picture."""
    which = generator.randrange(3)
    index = generator.randrange(len(scene.things))
    thing = scene.things[index]
    if which == 0:
        thing = replace(thing, colour=generator.choice(list(COLOURS)))
    elif which == 1:
        thing = replace(thing, shape=generator.choice(SHAPES))
    elif scene.relation is None:
        return replace(scene, place=generator.choice(list(PLACES)))
    else:
        return replace(scene, relation=generator.choice(list(RELATIONS)))
    return replace(scene, things=(*scene.things[:index], thing, *scene.things[index + 1 :]))


def signed_distance(shape: str, x: Tensor, y: Tensor, area: Tensor | float) -> Tensor:
    """Distance in pixels to the outline of `shape` of `area` square pixels around (0, 0): negative inside. Shapes of
    equal area are equally large.
    """
    unit = torch.as_tensor(area, dtype=x.dtype).sqrt()
    if shape == "circle":
        return (x * x + y * y).sqrt() - unit / math.sqrt(math.pi)
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - unit / 2
    if shape == "triangle":  # equilateral, centre of mass at the origin
        inradius = unit / (27**0.25)
        return torch.maximum(y, 0.5 * (math.sqrt(3) * x.abs() - y)) - inradius
    if shape == "cross":  # five equal squares
        arm = unit / math.sqrt(5)
        bar = torch.maximum(x.abs() - 1.5 * arm, y.abs() - 0.5 * arm)
        return torch.minimum(bar, torch.maximum(x.abs() - 0.5 * arm, y.abs() - 1.5 * arm))
    raise ValueError(f"unknown shape {shape!r}: write one of {', '.join(SHAPES)}")


def render(scenes: list[Scene], generator: random.Random) -> Tensor:
    """Pictures of `scenes` with places and sizes varied a little: fp32 [B, 3, 32, 32] in [0, 1]."""
    ys, xs = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    pictures = torch.tensor(BACKGROUND).view(1, 3, 1, 1).repeat(len(scenes), 1, SIZE, SIZE)
    for picture, scene in zip(pictures, scenes, strict=True):
        for thing, (cx, cy, area) in zip(scene.things, _layout(scene, generator), strict=True):
            inside = (0.5 - signed_distance(thing.shape, xs - cx, ys - cy, area)).clamp(0, 1)
            picture.lerp_(torch.tensor(COLOURS[thing.colour]).view(3, 1, 1), inside)
    return pictures


def _layout(scene: Scene, generator: random.Random) -> list[tuple[float, float, float]]:
    """(x, y, area) of every thing, in pixels."""

    def jitter(amount: float) -> float:
        return generator.uniform(-amount, amount)

    if scene.place is not None:
        x, y = PLACES[scene.place]
        return [(x + jitter(1.2), y + jitter(1.2), generator.uniform(80, 125))]
    dx, dy = RELATIONS[scene.relation or "left of"]
    across = jitter(4.0)
    spots = []
    for side in (-1.0, 1.0):
        along = side * generator.uniform(7.2, 8.5)
        spots.append(
            (16 + along * dx + across * abs(dy), 16 + along * dy + across * abs(dx), generator.uniform(65, 95))
        )
    return spots
