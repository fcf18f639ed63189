"""Anatomy and findings → one synthetic chest X-ray.

An image's density is that of tissue, lower where there is air and higher where there is bone. Each finding is a
function that changes these layers in place, in proportion to its severity. Positions are three-dimensional, so that a
study's frontal and lateral views show the same sign. Lengths are in units of the image's shorter side: x from the
midline to the side, y downward, z from front to back.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.base.csvs import read_data

Array = npt.NDArray[Any]  # float32 throughout, which NumPy's stubs cannot follow
Gray = npt.NDArray[np.uint8]  # [H, W]

ZOOM = 2  # images are sketched at half of the final resolution; metal and grain at full resolution
SEEN = 0.02  # of black to white: a smaller change is lost in the grain
VISIBLE = 0.3  # severity from which a radiologist would call a finding present

Box = tuple[int, int, int, int]  # left, top, width, height in pixels of the image


class Finding(NamedTuple):
    """A sign. Of some, laterals show more: what lies behind the heart and the diaphragm; of others nothing."""

    severity: float  # in [0, 1]
    side: int  # -1 (patient's right) or 1
    x: float
    y: float
    z: float
    lateral: float = 1.0  # on a lateral it looks as many times as severe, up to 1


Findings = dict[str, Finding]  # by label


class Body(NamedTuple):
    """The build that all images of a patient share."""

    width: float  # half the inner thorax
    heart: float  # half the heart's width
    fat: float  # soft tissue beside the ribs
    rib_gap: float
    tilt: float  # of the ribs
    breast: float


class Canvas(NamedTuple):
    """Coordinates and layers of one image, float32 [height / ZOOM, width / ZOOM]; signs change the layers in place."""

    lateral: bool
    body: Body
    wall: Array  # distance to the lateral (on laterals: posterior) chest wall, positive inside
    angle: Array  # y of the costophrenic angle of the pixel's side
    air: Array  # 0 in soft tissue, 1 in the lung
    pose: Array  # float64 [2, 3]: (u, v, 1) to final (column, row)
    u: Array  # x on frontals (patient's left is +), z on laterals
    v: Array  # y
    vessels: Array  # markings, seen only where there is air
    bright: Array  # what lies over the lung: bones, calcium
    metal: Array  # [height, width]: tubes, wires, markers
    coarse: Array  # noise in about [-1, 1]
    fine: Array
    tissue: Array | float = 0.0  # density without air

    def ellipse(self, x: float, y: float, rx: float, ry: float, turn: float = 0.0) -> Array:
        """The distance from the center of an ellipse: 0 there, 1 on its edge."""
        c, s = math.cos(turn), math.sin(turn)
        du, dv = self.u - x, self.v - y
        along, aside = du * (c / rx) + dv * (s / rx), dv * (c / ry) - du * (s / ry)
        return np.sqrt(along * along + aside * aside)

    def opacify(self, amount: Array) -> None:
        """Fill a share `amount` in [0, 1] of the air with fluid or tissue."""
        self.air[...] *= 1 - amount

    def across(self, finding: Finding) -> float:
        """The horizontal place of a finding."""
        return finding.z if self.lateral else finding.side * finding.x

    def on_side(self, side: int) -> Array:
        """A mask of one side's lung; a lateral shows both lungs over each other."""
        return np.full_like(self.u, 0.85) if self.lateral else soft(side * self.u, 0.02)

    def rib_height(self, across: Array | float) -> Array | float:
        """By how much a rib lies lower at a place than at its origin at the spine."""
        return (self.body.tilt - 0.05) * across + (0.6 if self.lateral else 1.1) * across * across

    def stroke(self, layer: Array, curves: npt.ArrayLike, radius: float, value: float) -> None:
        """Draw smooth curves through points [curves, points, 2] (u, v) into a layer; radius in final pixels."""
        zoom = layer.shape[0] / self.metal.shape[0]
        knots = (np.asarray(curves) @ self.pose[:, :2].T + self.pose[:, 2]) * zoom - 0.5
        for _ in range(2):  # Chaikin's corner cutting
            first, last = knots[:, :-1], knots[:, 1:]
            cut = np.stack([0.75 * first + 0.25 * last, 0.25 * first + 0.75 * last], 2)
            knots = np.concatenate([knots[:, :1], cut.reshape(len(knots), -1, 2), knots[:, -1:]], 1)
        steps = np.hypot(*np.moveaxis(np.diff(knots, axis=1), 2, 0)).max()
        radius *= zoom
        share = np.linspace(0, 1, max(1, math.ceil(steps / max(1.0, radius / 3))), endpoint=False)[:, None]
        points = (knots[:, :-1, None] * (1 - share) + knots[:, 1:, None] * share).reshape(-1, 2)
        reach = math.ceil(radius + 1)
        offset = np.arange(-reach, reach + 1)
        nearest = np.rint(points).astype(np.intp)
        columns, rows = (nearest[:, axis, None, None] + offset for axis in (0, 1))
        dx = (columns - points[:, 0, None, None]).astype(np.float32)
        dy = (rows - points[:, 1, None, None]).astype(np.float32)
        profile = np.float32(value) * np.clip(radius + 0.5 - np.sqrt(dx * dx + (dy * dy).swapaxes(1, 2)), 0, 1)
        inside = (columns >= 0) & (columns < layer.shape[1])
        drawn = (profile > 0) & inside & ((rows >= 0) & (rows < layer.shape[0])).swapaxes(1, 2)
        np.maximum.at(layer.reshape(-1), (rows.swapaxes(1, 2) * layer.shape[1] + columns)[drawn], profile[drawn])

    def find_density(self) -> Array:
        """Air darkens tissue, bones brighten: density, mostly in [0, 1]."""
        markings = self.vessels * 0.6 + 0.05 * self.coarse
        density: Array = self.tissue * (1 - self.air * (0.66 - markings)) + self.bright + 0.02 * self.coarse
        return density

    def show(self) -> Array:
        """The sketch's density in [0, 1] with its metal, before exposure and grain."""
        return np.maximum(np.clip(self.find_density(), 0, 1), self.metal[::ZOOM, ::ZOOM])  # type: ignore[no-any-return]


def draw_image(
    kind: str, projection: str, sex: str, findings: Findings, patient_rng: np.random.Generator, rng: np.random.Generator
) -> tuple[Gray, dict[str, list[Box]]]:
    """Draw one view, `frontal` or `lateral`, and locate the changes of the signs that are VISIBLE.

    The image is uint8 [height, width], shorter side 320 pixels. `patient_rng` decides the build, which all images of
    a patient share; `rng` everything that differs between images. There is a box for each connected part of a
    change, and one box for a large heart or mediastinum, whose change is a rim; none if the sign is invisible.
    """
    visible = [label for label, finding in findings.items() if finding.severity >= VISIBLE]
    draw_anatomy = draw_lateral if kind == "lateral" else draw_frontal
    if kind == "lateral":
        findings = {label: f._replace(severity=min(1.0, f.lateral * f.severity)) for label, f in findings.items()}
    low, high = (0.35, 0.155, 0.04, 0.073, -0.15, 0.3), (0.4, 0.175, 0.16, 0.085, 0.15, 1.0)
    body = Body(*patient_rng.uniform(low, high).tolist())  # plain floats: NumPy's would turn float32 into float64
    body = body if sex == "Female" else body._replace(breast=0.0)
    before = copy.deepcopy(rng)
    canvas = draw_anatomy(rng, body, findings, projection == "AP")
    changes: dict[str, Array] = {}
    for label in ANATOMY & set(visible):
        without = findings | {label: findings[label]._replace(severity=0.0)}
        healthy = draw_anatomy(copy.deepcopy(before), body, without, projection == "AP")
        changes[label] = np.abs(canvas.show() - healthy.show())
    # Branching lung markings, dense at the hila and fading outwards.
    canvas.vessels[...] = 0.1 - 0.2 * np.abs(canvas.fine)
    side = np.where(np.arange(22) % 2, 1, -1)
    heading = rng.uniform(-1.3, 1.5, 22)
    start = np.column_stack([(0.01 if canvas.lateral else 0.06) * side, 0.43 + 0.05 * heading])
    way = rng.uniform(0.1, 0.3, (22, 1)) * np.column_stack([side * np.cos(heading), np.sin(heading)])
    middle = start + 0.45 * way + rng.normal(0, 0.02, (22, 2))
    curves = np.stack([start, middle, start + way], 1)
    canvas.stroke(canvas.vessels, curves[:, :2], 2.2, 0.3)
    canvas.stroke(canvas.vessels, curves, 1.2, 0.22)
    for label, draw in SIGNS.items():
        if findings[label].severity > 0:
            shown = canvas.show()
            draw(canvas, findings[label], rng)
            changes[label] = np.maximum(np.abs(canvas.show() - shown), changes.get(label, 0))
    x, y = rng.uniform((0.4, 0.04), (0.45, 0.1))  # of an L in the upper right corner
    canvas.stroke(canvas.metal, [[[x, y], [x, y + 0.05]], [[x, y + 0.05], [x + 0.025, y + 0.05]]], 1.3, 0.95)
    boxes = {}
    for label in visible:
        if label in changes:
            seen = cv2.dilate((changes[label] >= SEEN).astype(np.uint8), np.ones((5, 5), np.uint8))  # with some room
            parts = cv2.connectedComponentsWithStats(seen)[2][1:, :4].tolist()
            places = parts if label in SIGNS else [cv2.boundingRect(seen)]
            boxes[label] = [(ZOOM * x, ZOOM * y, ZOOM * w, ZOOM * h) for x, y, w, h in places if w]
    return expose(canvas, rng), boxes


def expose(canvas: Canvas, rng: np.random.Generator) -> Gray:
    """Turn layers into gray values: exposure and grain vary."""
    contrast, bias, gamma, grain = rng.uniform((0.9, -0.03, 0.85, 0.010), (1.1, 0.04, 1.25, 0.022)).tolist()
    density = np.clip(bias + contrast * canvas.find_density(), 0, 1) ** np.float32(gamma)
    density = resize(density, canvas.metal.shape)
    density += np.float32(3.5 * grain) * (rng.random(density.shape, dtype=np.float32) - np.float32(0.5))
    return (np.clip(np.maximum(density, canvas.metal), 0, 1) * 255).astype(np.uint8)


def soft(distance: Array, width: float) -> Array:
    """Return a mask that rises from 0 to 1 over `width` around distance 0."""
    return np.clip(distance * (1 / width) + 0.5, 0, 1)


def zigzag(phase: Array) -> Array:
    """Return the distance of a phase to its nearest half: 0.5 at whole numbers, 0 between them."""
    return np.abs(phase - np.floor(phase) - 0.5)


def resize(grid: Array, shape: tuple[int, ...], smooth: bool = False) -> Array:
    """Interpolate a grid up to a shape, linearly or with a smooth step between the nodes."""
    for axis in (0, 1):
        size = grid.shape[axis]
        place = (np.arange(shape[axis]) + 0.5) * (size / shape[axis]) - 0.5
        below = np.clip(np.floor(place), 0, size - 2).astype(np.intp)
        share = np.clip(place - below, 0, 1).astype(np.float32)
        if smooth:
            share = share * share * (3 - 2 * share)
        low, high = np.take(grid, below, axis), np.take(grid, below + 1, axis)
        grid = low + (high - low) * (share[:, None] if axis == 0 else share)
    return grid


def start_canvas(rng: np.random.Generator) -> tuple[float, list[Array]]:
    """Draw a share by which the diaphragm lies lower; and a canvas's pose, coordinates, empty layers and noise."""
    height, width = (320, 390) if rng.random() < 0.85 else (390, 320)
    angle, du, dv, scale = rng.uniform((-0.06, -0.03, -0.03, 0.94), (0.06, 0.03, 0.03, 1.05))
    turn = 320 * scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    origin = np.array([width / 2, height / 2]) + turn @ (du, dv - 0.5)
    column = (np.arange(width // ZOOM) + 0.5) * ZOOM - origin[0]
    row = (np.arange(height // ZOOM)[:, None] + 0.5) * ZOOM - origin[1]
    u, v = ((weights[0] * column + weights[1] * row).astype(np.float32) for weights in np.linalg.inv(turn))
    lower, empty = rng.random(), [np.zeros_like(u), np.zeros_like(u), np.zeros((height, width), np.float32)]
    nodes = [rng.uniform(-1, 1, (cells, cells)).astype(np.float32) for cells in (8, 50)]
    noise = [resize(grid, u.shape, smooth=True) for grid in nodes]
    return lower, [np.column_stack([turn, origin]), u, v, *empty, *noise]


def bulge(v: Array, top: float, widest: float) -> Array:
    """Return the thorax's width at height v in [0, 1]: 0 above `top`, 1 below `widest`, round between."""
    rise = np.clip((widest - v) / (widest - top), 0, 1)
    return (1 - rise * rise * rise) ** np.float32(0.6)


def raised(findings: Findings, side: int) -> float:
    """Return how far volume loss lifts the diaphragm of a side."""
    return 0.09 * findings["Atelectasis"].severity if side == findings["Atelectasis"].side else 0.0


def draw_frontal(rng: np.random.Generator, body: Body, findings: Findings, portable: bool) -> Canvas:
    """Draw the anatomy of an AP (portable) or PA image."""
    lower, layers = start_canvas(rng)
    u, v, a = layers[1], layers[2], np.abs(layers[1])
    base = 0.73 + (0.77 - 0.73) * lower - (0.03 if portable else 0.0)
    right, left = base - raised(findings, -1), base + 0.025 - raised(findings, 1)
    top = np.where(u < 0, np.float32(right), np.float32(left))
    dome = top + 2.6 * (a - 0.5 * body.width) ** 2
    wall = body.width * bulge(v, 0.065, 0.7) - a
    apex = 0.05 + 0.1 * np.clip((0.22 - v) * 7, 0, 1) ** 2
    air = soft(wall, 0.014) * soft(dome - v, 0.014) * soft(a - apex, 0.02)
    canvas = Canvas(False, body, wall, top + 0.65 * body.width**2, air, *layers)
    size = body.heart * (1 + 0.72 * findings["Cardiomegaly"].severity) * (1.06 if portable else 1.0)
    heart = soft(1 - canvas.ellipse(0.3 * size, 0.655, 1.1 * size, 0.1 + 0.24 * size, 0.55), 0.08)
    spread = 0.085 * findings["Enlarged Cardiomediastinum"].severity
    knob = 0.02 * soft(0.045 - np.abs(v - 0.33), 0.05) * (u > 0)
    edge = 0.05 + spread - 0.3 * spread * np.abs(v - 0.25) + 0.35 * np.clip(v - 0.42, 0, 0.2) + knob
    middle = soft(edge - a, 0.022) * soft(v - 0.12, 0.1)
    canvas.air[...] *= (1 - heart) * (1 - middle)
    neck = soft(v - 0.02 - 0.26 * np.maximum(a - 0.12, 0), 0.03) + soft(0.125 - a, 0.03)
    flank = body.width + body.fat + 0.02 * canvas.coarse - a + 0.6 * np.maximum(0.3 - v, 0)
    inside = np.minimum(neck, 1) * (0.12 + 0.88 * soft(flank, 0.04))
    spine = soft(0.042 - a, 0.012) * (0.75 + 0.25 * soft(zigzag(v * 17) - 0.1, 0.12))
    trachea = soft(0.018 - np.abs(u - 0.004), 0.012) * soft(0.37 - v, 0.06)
    belly = np.maximum(0.14 * soft(v - dome, 0.05), 0.09 * np.maximum(heart, middle))
    tissue = inside * (0.68 + belly + 0.08 * spine - 0.14 * trachea)
    for x in (-0.19, 0.19):
        canvas.bright[...] += 0.06 * body.breast * soft(1 - canvas.ellipse(x, 0.62, 0.17, 0.18), 0.15)
    draw_ribs(canvas, a, 1.0)
    collar = 0.215 - 0.34 * a + 0.45 * a * a
    clavicle = soft(0.012 - np.abs(v - collar), 0.012) * soft(a - 0.035, 0.02) * soft(0.36 - a, 0.03)
    canvas.bright[...] += 0.13 * clavicle * inside
    if rng.random() < 0.4:  # gas in the stomach
        canvas.air[...] += 0.5 * soft(1 - canvas.ellipse(0.2, left + 0.08, 0.07, 0.03), 0.3)
    return canvas._replace(tissue=tissue)


def draw_lateral(rng: np.random.Generator, body: Body, findings: Findings, portable: bool) -> Canvas:
    """Draw the anatomy of a lateral image, the patient facing left."""
    lower, layers = start_canvas(rng)
    u, v, depth = layers[1], layers[2], 0.88 * body.width
    reach = bulge(v, 0.05, 0.62)
    wall = depth * reach + 0.03 - u
    front = u + depth * (0.25 + 0.75 * reach)
    low = 0.72 + (0.76 - 0.72) * lower - 0.5 * (raised(findings, 1) + raised(findings, -1))
    dome = low + 1.3 * (u + 0.06) ** 2 + 0.2 * np.maximum(u, 0)
    air = soft(wall, 0.014) * soft(front, 0.014) * soft(dome - v, 0.014) * soft(v - 0.1, 0.08)
    angle = np.full_like(u, low + 1.3 * (depth + 0.06) ** 2 + 0.2 * depth)
    canvas = Canvas(True, body, wall, angle, air, *layers)
    size = body.heart * (1 + 0.75 * findings["Cardiomegaly"].severity)
    heart = soft(1 - canvas.ellipse(0.9 * size - 0.27, 0.63, 1.05 * size, 0.07 + 0.35 * size, -0.7), 0.1)
    spread = 0.03 + 0.06 * findings["Enlarged Cardiomediastinum"].severity
    middle = soft(spread - np.abs(u + 0.04), 0.04) * soft(0.5 - v, 0.1)
    canvas.air[...] *= (1 - 0.85 * heart) * (1 - 0.6 * middle)
    column = u - depth * (0.62 + 0.38 * reach) + 0.02
    spine = soft(0.04 - np.abs(column), 0.015) * (0.6 + 0.4 * soft(zigzag(v * 15) - 0.1, 0.12))
    arms = soft(0.2 - v + 0.15 * np.abs(u), 0.15)
    canvas.air[...] *= (1 - 0.5 * spine) * (1 - 0.6 * arms)
    inside = soft(wall + body.fat + 0.05, 0.04) * soft(front + 0.5 * body.fat + 0.03, 0.04)
    inside = np.maximum(inside, arms * soft(0.3 - np.abs(u), 0.05))
    trachea = soft(0.02 - np.abs(u - 0.02), 0.012) * soft(0.4 - v, 0.06)
    tissue = inside * (0.68 + 0.12 * soft(v - dome, 0.05) + 0.05 * heart + 0.1 * spine - 0.12 * trachea)
    canvas.bright[...] += 0.1 * soft(0.01 - np.abs(front + 0.01), 0.01) * soft(0.6 - v, 0.05)  # sternum
    draw_ribs(canvas, 0.25 - u, 0.6)
    return canvas._replace(tissue=tissue)


def draw_ribs(canvas: Canvas, across: Array, value: float) -> None:
    """Posterior ribs as bands with a bright cortex, and fainter anterior ones that cross them."""
    thorax = soft(canvas.wall + 0.012, 0.01) * soft(across - 0.045, 0.02) * soft(canvas.v - 0.08, 0.04)
    thorax *= 0.15 + 0.85 * canvas.air
    for share, level in ((0.075, canvas.v - canvas.rib_height(across)), (0.03, canvas.v + 0.5 * across - 0.2)):
        phase = zigzag(level * (1 / canvas.body.rib_gap))
        band = soft(0.17 - phase, 0.06) + 0.5 * soft(0.035 - np.abs(phase - 0.15), 0.03)
        canvas.bright[...] += value * share * band * thorax


# Signs: each draws one finding into the image. Heart, mediastinum and diaphragm are the anatomy's.
ANATOMY = {"Enlarged Cardiomediastinum", "Cardiomegaly", "Atelectasis"}


def draw_opacity(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> None:
    """Hazy veil over a zone of one lung; vessels stay visible through it."""
    r = canvas.ellipse(canvas.across(finding), finding.y, 0.17, 0.2)
    veil = soft(1 - r + 0.3 * canvas.coarse, 0.6) * canvas.on_side(finding.side)
    canvas.opacify(0.62 * finding.severity * veil)


def draw_lesion(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> None:
    """Round, sharply bounded nodule or mass."""
    radius = 0.025 + 0.033 * finding.severity
    r = canvas.ellipse(canvas.across(finding), finding.y, radius, 0.9 * radius)
    canvas.opacify((0.4 + 0.55 * finding.severity) * soft(1.05 - r + 0.08 * canvas.fine, 0.35))


def draw_edema(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> None:
    """Perihilar haze of both lungs (bat wings), thick vessels and short septal lines at the bases."""
    for x in (0.0,) if canvas.lateral else (-0.13, 0.13):
        r = canvas.ellipse(x, 0.47, 0.2, 0.27)
        canvas.opacify(0.72 * finding.severity * soft(0.85 - r + 0.15 * canvas.coarse, 0.9))
    canvas.vessels[...] *= 1 + 1.2 * finding.severity
    count = round(18 * finding.severity)
    outer = np.where(np.arange(count) % 2, 1, -1) * canvas.body.width * (0.7 if canvas.lateral else 0.95)
    start = np.column_stack([outer, rng.uniform(0.52, 0.72, count)])
    if count:
        canvas.stroke(canvas.vessels, np.stack([start, start * (0.86, 1.01)], 1), 1.0, 0.7 * finding.severity)


def draw_consolidation(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> None:
    """Dense lobar patch with one straight border, the fissure."""
    x, up = canvas.across(finding), 1 if finding.y < 0.5 else -1
    r = canvas.ellipse(x, finding.y, 0.15, 0.16)
    fissure = up * (finding.y + 0.07 * up - canvas.v + 0.25 * (canvas.u - x))
    patch = soft(1 - r + 0.12 * canvas.coarse + 0.05 * canvas.fine, 0.15) * soft(fissure, 0.012)
    canvas.opacify(0.97 * min(1.0, 1.1 * finding.severity) * patch * canvas.on_side(finding.side))


def draw_pneumonia(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> None:
    """Patchy, ill-defined focus: many small soft spots that run together."""
    x = canvas.across(finding)
    clear = np.ones_like(canvas.air)
    for du, dv, radius in rng.uniform((-0.09, -0.11, 0.025), (0.09, 0.11, 0.05), (9, 3)).tolist():
        r = canvas.ellipse(x + du, finding.y + dv, radius, radius)
        clear *= 1 - 0.75 * finding.severity * soft(0.8 - r, 0.9)
    canvas.opacify((1 - clear) * canvas.on_side(finding.side))


def draw_atelectasis(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> None:
    """Plate-like bands above the raised diaphragm."""
    x, lift = canvas.across(finding), 0.09 * finding.severity
    for step in range(1 + round(1.5 * finding.severity)):
        y, turn = finding.y + 0.03 - lift - 0.05 * step, 0.15 * step - 0.3 * finding.side
        r = canvas.ellipse(x, y, 0.15, 0.014, turn)
        canvas.opacify(0.9 * finding.severity * soft(1 - r, 0.4) * canvas.on_side(finding.side))


def draw_pneumothorax(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> None:
    """Dark apical and lateral rim without markings, and the thin white pleural line."""
    side = canvas.on_side(finding.side)
    gap = canvas.wall - (0.02 + 0.14 * finding.severity) * np.clip((0.78 - canvas.v) * 1.7, 0, 1)
    empty = soft(-gap, 0.01) * side
    canvas.vessels[...] *= 1 - empty
    canvas.air[...] *= 1 + 0.3 * empty - 0.12 * (1 - empty) * side * finding.severity
    line = soft(0.004 - np.abs(gap), 0.005) * side * np.minimum(canvas.air, 1)
    canvas.bright[...] += 0.22 * line * soft(0.74 - canvas.v, 0.05)


def draw_effusion(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> None:
    """White base: a meniscus that blunts the costophrenic angle and climbs the wall."""
    climb = (0.05 + 0.1 * finding.severity) * np.exp(-np.maximum(canvas.wall, 0) * 14)
    depth = canvas.v - canvas.angle + 0.33 * finding.severity**1.5 + climb
    canvas.opacify(soft(depth, 0.03) * canvas.on_side(finding.side))


def draw_pleural_other(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> None:
    """Thickened, calcified pleura: a bright lumpy plaque along the wall."""
    thickness = (0.01 + 0.045 * finding.severity) * (1 + 0.4 * canvas.coarse)
    reach = soft(0.2 - np.abs(canvas.v - finding.y), 0.06)
    plaque = soft(thickness - canvas.wall, 0.008) * soft(canvas.wall, 0.008) * reach * canvas.on_side(finding.side)
    canvas.opacify(0.85 * plaque)
    canvas.bright[...] += (0.06 + 0.14 * finding.severity) * plaque * (1 + 0.8 * canvas.fine)


def draw_fracture(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> None:
    """Break neighboring ribs: a step between the fragments and a ball of callus at each."""
    x, step = canvas.across(finding), 0.035 * finding.side
    drop = float(canvas.rib_height(0.25 - x if canvas.lateral else abs(x)))
    first = math.floor((finding.y - drop) / canvas.body.rib_gap)
    y = drop + (first + np.arange(1 + round(3 * finding.severity)) + 0.5) * canvas.body.rib_gap
    fragments = ((-step, -0.1 * step, -0.008, 3.5, 0.24), (0.1 * step, step, 0.016, 3.5, 0.24))
    callus = (-0.1 * step, 0.1 * step, 0.003, 6.0, 0.42)
    for start, stop, shift, radius, value in (*fragments, callus):
        ends = [np.column_stack([np.full_like(y, x + at), y + shift]) for at in (start, stop)]
        canvas.stroke(canvas.bright, np.stack(ends, 1), radius, value * (0.3 + 0.8 * finding.severity))


# Each device's curves: the radius in pixels, and points (x, y, z) in hundredths. A short, thick one is a disc or box.
DEVICES: dict[str, list[tuple[float, Array]]] = {}
for _row in read_data(Path(__file__).parent, "devices.csv"):
    _points = np.array([point.split() for point in _row["points"].split(",")], float)
    DEVICES.setdefault(_row["device"], []).append((float(_row["radius"]), _points))


def draw_devices(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> None:
    """Tubes, lines, a pacemaker, electrodes, sternal wires: bright thin curves."""
    shift = rng.normal(0, 0.012, 3)
    for kit in rng.permutation(len(DEVICES))[: 1 + round(2.5 * finding.severity)]:
        for radius, points in [*DEVICES.values()][kit]:
            place = (points / 100 + shift)[None, :, [2, 1] if canvas.lateral else [0, 1]]
            canvas.stroke(canvas.metal, place, radius, 0.55 + 0.4 * finding.severity)


SIGNS: dict[str, Callable[[Canvas, Finding, np.random.Generator], None]] = {
    **{"Lung Opacity": draw_opacity, "Edema": draw_edema, "Consolidation": draw_consolidation},
    **{"Pneumonia": draw_pneumonia, "Lung Lesion": draw_lesion, "Atelectasis": draw_atelectasis},
    **{"Pneumothorax": draw_pneumothorax, "Pleural Effusion": draw_effusion},
    **{"Pleural Other": draw_pleural_other, "Fracture": draw_fracture, "Support Devices": draw_devices},
}
