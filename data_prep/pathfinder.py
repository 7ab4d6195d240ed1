"""Pathfinder (Linsley et al. 2018): are two circles the ends of one dashed contour?

A picture has two contours of dashes, shorter ones as distractors, and a circle at two of the
contours' ends: at both ends of one contour (class `connected`), or at one end of each. It is drawn
as `snakes2.py` of drewlinsley/pathfinder does, with the parameters of Pathfinder32 in Long Range
Arena (Tay et al. 2021; `lra_benchmarks/data/pathfinder.py`):

    window_size 32, padding 1                   pixels
    contour_length 14                           dashes; 6 and 9 are the easier sets
    paddle_length 2, thickness 0.5, margin 1    pixels; the margin is free at both ends of a dash
    seed_distance 7, marker_radius 1.5          pixels: between the first ends; of the circles
    continuity 1.0                              the next dash turns by d with weight cos(d)^2
    distractor_length contour_length // 3       dashes; 20 // distractor_length of them, if they fit
    paddle_contrast 0.75, snake_contrast 2      contours have 1.5, their product, distractors 2
    use_single_paddles false                    no dash stands alone

Two things differ, so that every label can be proven from the picture alone. Dashes are antialiased
by area, not by a Lanczos filter whose traces join neighbours, and all but black pixels are ink. And
the ink of dashes that follow each other is at most sqrt(5) pixels apart, while that of others is
further apart; a circle counts as ink at all four ends, so that contours do not depend on the label.

Pixels are bits of an integer, so that a collision is one `&`. Coordinates are (y, x) in pixels, and
whole ones are the centre of a pixel.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CLASSES = ("unconnected", "connected")
SIZE, BORDER = 32, 2
"""Width of a picture, and of its edge without dashes: the padding, and a margin."""
DASH_LENGTH, DASH_THICKNESS, MARGIN = 2.0, 0.5, 1.0
SEED_DISTANCE, MARKER_RADIUS, CONTINUITY = 7.0, 1.5, 1.0
CONTOUR_CONTRAST, DISTRACTOR_CONTRAST = 0.75 * 2.0, 2.0
DISTRACTOR_DASHES = 20
SHORTEST, LONGEST = 3, 18
"""Bounds of the number of dashes: shorter contours have no distractors, longer ones hardly fit."""
REACH = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if y * y + x * x <= 5]
"""Offsets at which two pixels belong to one contour."""

ROUNDS, TURN_TRIALS, SEED_TRIALS, DISTRACTOR_TRIALS = 1000, 20, 20, 10
"""Limits of two contours' dashes, those taken back included, and of attempts at the next dash, at a
place for a distractor, and at a distractor."""
ANGLES, SAMPLES = 24, 8
"""Number of orientations, and of samples of a pixel's side for antialiasing."""
FAINTEST = 0.125
"""Covered share of a pixel below which it stays black."""
EDGE, HALF = 6, 3
"""Bits around those of a picture, and pixels around the first one of a mark."""
STRIDE, SIDE = SIZE + 2 * EDGE, 2 * HALF + 1
LOW, HIGH = BORDER, SIZE - 1 - BORDER
"""Bounds of the places of dashes."""

Place = tuple[float, float]


class Shape(NamedTuple):
    """A dash of some orientation that starts in pixel (0, 0), or a circle around it."""

    shares: NDArray[np.float32]
    """Covered shares of pixels [SIDE, SIDE], the first of which is (-HALF, -HALF)."""
    ink: int
    """Bits of the pixels that are not black."""
    near: int
    """Bits of all pixels within reach of them."""


@dataclass(frozen=True)
class Contour:
    """A contour so far."""

    tip: Place
    """Its first end."""
    end: Place
    """Its last end."""
    angle: int
    """Orientation of the last dash."""
    last: int
    """Ink of the last dash, and of a circle where one may be drawn."""
    older: int
    """Ink of all other dashes."""
    dashes: tuple[tuple[Place, int], ...]
    """Start and orientation of each dash."""

    @property
    def ink(self) -> int:
        """Ink of all dashes."""
        return self.older | self.last


def draw_picture(rng: random.Random, connected: bool, length: int = 14) -> NDArray[np.uint8]:
    """Draw a picture, uint8 [32, 32]; only the second circle's place depends on `connected`.

    Args:
        length: number of dashes of a contour.
    """
    contours = None
    while contours is None:
        contours = grow_two(rng, length)
    taken = contours[0].ink | contours[1].ink
    short, distractors = length // 3, []
    for _ in range(DISTRACTOR_DASHES // short):
        for _ in range(DISTRACTOR_TRIALS):
            if distractor := grow_one(rng, short, taken):
                taken |= distractor.ink
                distractors.append(distractor)
                break
    picture = np.zeros((STRIDE, STRIDE), np.float32)
    for group, contrast in ((contours, CONTOUR_CONTRAST), (distractors, DISTRACTOR_CONTRAST)):
        for contour in group:
            for start, angle in contour.dashes:
                blend(picture, DASHES[angle], start, contrast)
    first = rng.randrange(2)
    second = first if connected else 1 - first
    for place in (contours[first].tip, contours[second].end):
        blend(picture, CIRCLE, place, 1.0)
    values = np.minimum(np.rint(picture[EDGE:-EDGE, EDGE:-EDGE] * 255.0), 255.0)
    grey: NDArray[np.uint8] = values.astype(np.uint8)
    return grey


def grow_two(rng: random.Random, length: int) -> tuple[Contour, Contour] | None:
    """Grow two contours dash by dash in turn; None after too many dead ends.

    A dead end takes back the last few dashes, where the published code starts over.
    """
    low, high = int(2 * SEED_DISTANCE), SIZE - 1 - int(2 * SEED_DISTANCE)
    tip = float(rng.randint(low, high)), float(rng.randint(low, high))
    first = seed_contour(rng, tip, 0, True)
    away = rng.random() * 2.0 * math.pi
    tip = tip[0] + SEED_DISTANCE * math.sin(away), tip[1] + SEED_DISTANCE * math.cos(away)
    second = first and seed_contour(rng, tip, first.ink, True)
    if not (first and second):
        return None
    grown = [(first, second)]  # The contours after each round.
    for _ in range(ROUNDS):
        is_last = len(grown) == length - 1
        one, other = grown[-1]
        longer = extend(rng, one, other.ink, is_last)
        further = longer and extend(rng, other, longer.ink, is_last)
        if not (longer and further):
            del grown[max(1, len(grown) - rng.randint(1, 3)) :]
        elif is_last:
            return longer, further
        else:
            grown.append((longer, further))
    return None


def grow_one(rng: random.Random, length: int, taken: int) -> Contour | None:
    """Grow a distractor where nothing is yet; None if it finds no room."""
    contour = None
    for _ in range(SEED_TRIALS):
        tip = float(rng.randint(LOW, HIGH)), float(rng.randint(LOW, HIGH))
        if contour := seed_contour(rng, tip, taken, False):
            break
    for _ in range(1, length):
        contour = contour and extend(rng, contour, taken, False)
    return contour


def seed_contour(rng: random.Random, tip: Place, taken: int, has_circle: bool) -> Contour | None:
    """Begin a contour with a dash in any direction; None if it does not fit."""
    angle = rng.randrange(ANGLES)
    end = move(tip, angle, DASH_LENGTH)
    if not (is_inside(tip) and is_inside(end)):
        return None
    shift = shift_to(tip)
    ink, near = DASHES[angle].ink, DASHES[angle].near
    if has_circle:
        ink, near = ink | CIRCLE.ink, near | CIRCLE.near
    if near << shift & taken:
        return None
    return Contour(tip, end, angle, ink << shift, 0, ((tip, angle),))


def extend(rng: random.Random, contour: Contour, taken: int, is_last: bool) -> Contour | None:
    """Return the contour with a further dash, drawn among those that fit; None if none is found.

    Args:
        taken: ink of everything else.
        is_last: whether a circle must also fit at the end of the dash.
    """
    pivot, blocked = move(contour.end, contour.angle, MARGIN), taken | contour.older
    for turn in rng.choices(TURNS, cum_weights=WEIGHTS, k=TURN_TRIALS):
        angle = (contour.angle + turn) % ANGLES
        start, end = move(pivot, angle, MARGIN), move(pivot, angle, MARGIN + DASH_LENGTH)
        if not (is_inside(start) and is_inside(end)):
            continue
        dash, shift = DASHES[angle], shift_to(start)
        ink, near = dash.ink << shift, dash.near << shift
        if near & blocked or ink & contour.last or not near & contour.last:
            continue
        if is_last:
            shift = shift_to(end)
            if CIRCLE.near << shift & contour.ink | CIRCLE.near << shift & taken:
                continue
            ink |= CIRCLE.ink << shift
        dashes = (*contour.dashes, (start, angle))
        return Contour(contour.tip, end, angle, ink, contour.ink, dashes)
    return None


def is_inside(place: Place) -> bool:
    """Return True if a place is not in the edge of a picture."""
    return LOW <= place[0] <= HIGH and LOW <= place[1] <= HIGH


def move(place: Place, angle: int, distance: float) -> Place:
    """Return the place at a distance from another one."""
    sine, cosine = DIRECTIONS[angle]
    return place[0] + distance * sine, place[1] + distance * cosine


def shift_to(place: Place) -> int:
    """Return by how many bits a shape is shifted to a place."""
    return STRIDE * round(place[0]) + round(place[1])


def blend(picture: NDArray[np.float32], shape: Shape, place: Place, contrast: float) -> None:
    """Draw a shape at a place of a picture that has EDGE more pixels on all sides."""
    row, column = (round(value) + EDGE - HALF for value in place)
    part = picture[row : row + SIDE, column : column + SIDE]
    np.maximum(part, contrast * shape.shares, out=part)


def make_shape(covered: NDArray[np.bool_]) -> Shape:
    """Return the shape that covers some samples [SIDE * SAMPLES, SIDE * SAMPLES]."""
    shares = covered.reshape(SIDE, SAMPLES, SIDE, SAMPLES).mean((1, 3))
    shares = np.where(shares < FAINTEST, 0.0, shares).astype(np.float32)
    ink = near = 0
    for y, x in np.argwhere(shares).tolist():
        ink |= 1 << STRIDE * (y + EDGE - HALF) + x + EDGE - HALF
        for dy, dx in REACH:
            near |= 1 << STRIDE * (y + dy + EDGE - HALF) + x + dx + EDGE - HALF
    return Shape(shares, ink, near)


def make_dash(angle: int) -> Shape:
    """Return a dash of an orientation."""
    sine, cosine = DIRECTIONS[angle]
    along, aside = FINE_Y * sine + FINE_X * cosine, FINE_Y * cosine - FINE_X * sine
    return make_shape(
        (along >= 0.0) & (along <= DASH_LENGTH) & (np.abs(aside) <= DASH_THICKNESS / 2)
    )


def weigh_turns() -> dict[int, float]:
    """Return the turns between two dashes, in steps of an orientation, with their weights."""
    deltas = {n: abs(n) * 2.0 * math.pi / ANGLES for n in range(-ANGLES // 2, ANGLES // 2)}
    weights = {n: math.cos(min(CONTINUITY * d, math.pi / 2)) ** 2 for n, d in deltas.items()}
    return {turn: weight for turn, weight in weights.items() if weight > 1e-9}


DIRECTIONS = [
    (math.sin(turn), math.cos(turn))
    for turn in (2.0 * math.pi * angle / ANGLES for angle in range(ANGLES))
]
FINE = (np.arange(SIDE * SAMPLES) + 0.5) / SAMPLES - 0.5 - HALF
FINE_Y, FINE_X = FINE[:, None], FINE[None, :]
DASHES = [make_dash(angle) for angle in range(ANGLES)]
CIRCLE = make_shape(FINE_Y**2 + FINE_X**2 <= MARKER_RADIUS**2)
TURNS = list(weigh_turns())
WEIGHTS = np.cumsum(list(weigh_turns().values())).tolist()
