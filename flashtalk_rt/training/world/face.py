"""The procedural talking head: identity and motion parameters to pictures, exactly known.

Everything is drawn by signed distances over one coordinate grid whose shorter side spans [-1, 1], so
any size works and the head stays centred. Edges are about one pixel soft at every size. Layers are
blended back to front; nothing is written in place, so pictures are differentiable in all parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IDENTITY_NAMES = (
    "skin", "hair_hue", "hair_shape", "face_aspect", "eye_size", "eye_spacing",
    "eye_colour", "brow", "mouth_width", "background_hue", "background_texture", "clothing_hue",
)  # fmt: skip
MOTION_NAMES = (
    "yaw", "pitch", "roll", "shift_x", "shift_y", "blink", "gaze_x", "gaze_y", "mouth_open", "mouth_round",
)  # fmt: skip

_HELD_OUT_NAMES = ("skin", "hair_hue", "hair_shape", "face_aspect")  # the four that decide the split
_BINS = 4

Palette = tuple[tuple[float, float, float], ...]

# Paths through sRGB that never return to a colour they passed: every hue is a plain number in [0, 1].
# None of them comes within _CAVITY_RADIUS of the cavity's colour.
_SKIN: Palette = ((0.99, 0.87, 0.78), (0.94, 0.74, 0.58), (0.72, 0.49, 0.34), (0.46, 0.30, 0.22))
_HAIR: Palette = (
    (0.15, 0.13, 0.17), (0.34, 0.22, 0.14), (0.66, 0.32, 0.15), (0.88, 0.62, 0.27), (0.96, 0.87, 0.66),
)  # fmt: skip
_EYE: Palette = ((0.30, 0.17, 0.08), (0.52, 0.42, 0.12), (0.22, 0.58, 0.32), (0.25, 0.62, 0.86))
_BACKGROUND: Palette = ((0.55, 0.78, 0.93), (0.64, 0.88, 0.78), (0.96, 0.88, 0.64), (0.95, 0.68, 0.66))
_CLOTHES: Palette = (
    (0.24, 0.32, 0.62), (0.16, 0.56, 0.60), (0.45, 0.68, 0.34), (0.92, 0.66, 0.24), (0.85, 0.32, 0.26),
)  # fmt: skip
_CAVITY = (0.45, 0.0, 0.22)
_CAVITY_RADIUS = 0.2  # sRGB distance at which a colour stops counting as cavity
_TEETH = (0.98, 0.97, 0.94)
_TONGUE = (0.88, 0.45, 0.50)
_SCLERA = (0.98, 0.98, 0.97)
_LASH = (0.16, 0.11, 0.13)

_OPEN_FULL = 0.22  # height of the fully open mouth; the face is about 1.2 high and 0.95 wide
_MAX_PIXELS_CPU = 1 << 16  # frames of one pass stay within a core's cache
_MAX_PIXELS_GPU = 1 << 24  # and within about 2 GB of a GPU's memory


def sample_identities(count: int, generator: torch.Generator, held_out: bool = False) -> Tensor:
    """Draw identities: [count, 12] float32 in [0, 1], on the generator's device, columns IDENTITY_NAMES.

    Skin, hair hue, hair shape and face aspect are cut into 4 bins each. An identity whose bin indices
    sum to 3 modulo 4 is held out: a 4-D checkerboard, a quarter of all identities. Training
    (held_out=False) never draws one, a held-out draw is always one, and every single value of every
    parameter is still seen in training. All else is uniform.
    """
    device = generator.device
    values = torch.rand(count, len(IDENTITY_NAMES), generator=generator, device=device)
    *others, last = (IDENTITY_NAMES.index(name) for name in _HELD_OUT_NAMES)
    residue = torch.randint(_BINS - 1, (count,), generator=generator, device=device)
    if held_out:
        residue = torch.full_like(residue, _BINS - 1)
    chosen = (residue - _bins(values[:, others]).sum(-1)) % _BINS
    # The bin of the last parameter makes the sum; kept off the upper edge, where float32 would round up.
    values[:, last] = (chosen + values[:, last].clamp(max=0.999)) / _BINS
    return values


def is_held_out(identity: Tensor) -> Tensor:
    """Whether identities [..., 12] lie in the region that training never draws: bool [...]."""
    columns = [IDENTITY_NAMES.index(name) for name in _HELD_OUT_NAMES]
    return _bins(identity[..., columns]).sum(-1) % _BINS == _BINS - 1


def _bins(values: Tensor) -> Tensor:
    return (values * _BINS).long().clamp(0, _BINS - 1)


def render(identity: Tensor, motion: Tensor, height: int, width: int) -> Tensor:
    """Draw clips: identity [N, 12], motion [N, T, 10] -> float32 [N, T, 3, height, width] in [-1, 1].

    Values are read as documented by IDENTITY_NAMES ([0, 1]) and MOTION_NAMES (yaw, pitch, roll, shift and
    gaze in [-1, 1]; blink, mouth_open, mouth_round in [0, 1]). Differentiable in both arguments.
    """
    n, t = motion.shape[:2]
    flat = torch.cat([identity[:, None].expand(n, t, -1), motion], -1).reshape(n * t, -1).float()
    budget = _MAX_PIXELS_CPU if flat.device.type == "cpu" else _MAX_PIXELS_GPU
    pictures = [_draw(part, height, width) for part in flat.split(max(1, budget // (height * width)))]
    return torch.cat(pictures).reshape(n, t, 3, height, width)


def cavity_height(frames: Tensor) -> Tensor:
    """Height of the dark mouth cavity, as a fraction of H: frames [..., 3, H, W] in [-1, 1] -> [...].

    By colour alone, with no network: a pixel counts 1 at the cavity's colour, falling to 0 at a
    distance that no other colour of the palette reaches. The highest columns (a 32nd of the shorter
    side) are averaged.
    """
    colour = torch.tensor(_CAVITY, device=frames.device, dtype=frames.dtype).reshape(3, 1, 1)
    distance2 = ((frames + 1) / 2 - colour).square().sum(-3)
    inside = (1 - distance2 / _CAVITY_RADIUS**2).clamp(min=0)
    columns = inside.mean(-2)
    return columns.topk(max(1, min(frames.shape[-2:]) // 32), dim=-1).values.mean(-1)


def _palette(value: Tensor, palette: Palette) -> Tensor:
    """Piecewise linear colour: value [B, 1, 1, 1] in [0, 1] -> [B, 3, 1, 1] sRGB in [0, 1]."""
    stops = torch.tensor(palette, device=value.device)
    place = value * (len(palette) - 1)
    knots = torch.arange(len(palette), device=value.device).reshape(1, -1, 1, 1)
    weights = (1 - (place - knots).abs()).clamp(min=0)
    return torch.einsum("bkij,kc->bcij", weights, stops)


def _blend(image: Tensor, colour: Tensor | Sequence[float], cover: Tensor) -> Tensor:
    """Lay `colour` over `image` where `cover` [B, 1, H, W] is 1."""
    if not isinstance(colour, Tensor):
        colour = torch.tensor(colour, device=image.device).reshape(1, 3, 1, 1)
    return torch.lerp(image, colour, cover)


def _ellipse(x: Tensor, y: Tensor, rx: Tensor | float, ry: Tensor | float) -> Tensor:
    """Approximate signed distance to an ellipse at the origin; exact for a circle."""
    r = ((x / rx).square() + (y / ry).square() + 1e-9).sqrt()
    return (r - 1) * (rx * ry) ** 0.5


def _box(x: Tensor, y: Tensor, rx: Tensor | float, ry: Tensor | float, corner: float) -> Tensor:
    """Signed distance to a box with rounded corners at the origin."""
    qx, qy = x.abs() - rx + corner, y.abs() - ry + corner
    outside = (qx.clamp(min=0).square() + qy.clamp(min=0).square() + 1e-9).sqrt()
    return outside + torch.maximum(qx, qy).clamp(max=0) - corner


def _spot(x: Tensor, y: Tensor, rx: float, ry: float) -> Tensor:
    """A soft round stain in [0, 1]: for blush, gloss and shade."""
    return (1 - (x / rx).square() - (y / ry).square()).clamp(min=0).square()


def _arc(x: Tensor, rx: Tensor | float) -> Tensor:
    """The half-ellipse sqrt(1 - (x / rx)^2), 0 outside."""
    return (1 - (x / rx).square()).clamp(min=1e-6).sqrt()


class _Draw:
    """Pictures of one pass: the grid, the parameters, and the layers in the order they are painted."""

    def __init__(self, values: Tensor, height: int, width: int) -> None:
        short = min(height, width)
        self.soft = 2.5 / short  # width of an edge: 1.25 pixels
        columns = values.reshape(len(values), -1, 1, 1, 1).unbind(1)
        self.p = dict(zip(IDENTITY_NAMES + MOTION_NAMES, columns, strict=True))
        p = self.p
        rows = torch.arange(height, device=values.device, dtype=torch.float32)
        cols = torch.arange(width, device=values.device, dtype=torch.float32)
        self.y = ((2 * rows + 1 - height) / short).reshape(1, 1, -1, 1)
        self.x = ((2 * cols + 1 - width) / short).reshape(1, 1, 1, -1)
        # Head coordinates: origin between the ears; rolled about the neck; the outline follows yaw little.
        x, y = self.x - 0.09 * p["shift_x"], self.y - 0.55 - 0.06 * p["shift_y"]
        angle = 0.17 * p["roll"]
        self.hx = angle.cos() * x + angle.sin() * y - 0.035 * p["yaw"]
        self.hy = angle.cos() * y - angle.sin() * x + 0.67 - 0.02 * p["pitch"]
        # Face coordinates: the surface bulges, so its middle travels and its rim stays (parallax).
        bulge = (1 - (self.hx / 0.62).square() - (self.hy / 0.75).square()).clamp(min=0)
        self.fx = self.hx - 0.15 * p["yaw"] * bulge
        self.fy = self.hy - 0.105 * p["pitch"] * bulge
        self.skin = _palette(p["skin"], _SKIN)
        self.hair = _palette(p["hair_hue"], _HAIR)
        tint = torch.tensor((0.80, 0.68, 0.66), device=values.device).reshape(1, 3, 1, 1)
        self.shade = self.skin * tint
        self.rx = 0.44 + 0.075 * p["face_aspect"]
        self.ry = 0.645 - 0.075 * p["face_aspect"]

    def fill(self, distance: Tensor) -> Tensor:
        """Coverage of the inside of a signed distance."""
        return (0.5 - distance / self.soft).clamp(0, 1)

    def band(self, y: Tensor, top: Tensor, bottom: Tensor) -> Tensor:
        """Coverage of top < y < bottom; fades out as the band closes."""
        above = ((y - top) / self.soft + 0.5).clamp(0, 1)
        below = ((bottom - y) / self.soft + 0.5).clamp(0, 1)
        return (above + below - 1).clamp(min=0)

    def background(self) -> Tensor:
        p = self.p
        colour = _palette(p["background_hue"], _BACKGROUND)
        glow = 1.04 - 0.10 * (self.x.square() + (self.y + 0.2).square())
        weave = (self.x * 38).sin() * (self.y * 38).sin()
        return colour * (glow.clamp(min=0.75) + 0.12 * p["background_texture"] * weave)

    def body(self, image: Tensor) -> Tensor:
        p = self.p
        shape = p["hair_shape"]
        # Hair behind the head hangs lower and wider with hair_shape; it is behind the turning axis.
        low = -0.02 + 0.72 * shape
        top = -self.ry - 0.09
        x = self.hx + 0.04 * p["yaw"]
        back = _box(x, self.hy - (low + top) / 2, self.rx + 0.055 + 0.075 * shape, (low - top) / 2, 0.42)
        image = _blend(image, self.hair * 0.78, self.fill(back))
        x = self.x - 0.03 * p["shift_x"]
        clothes = _palette(p["clothing_hue"], _CLOTHES)
        torso = self.fill(_box(x, self.y - 10.70, 0.86, 10.0, 0.34))
        image = _blend(image, clothes * (1.05 - 0.25 * (x - 0.25).square()), torso)
        neck_x = torch.lerp(x, self.hx, ((0.8 - self.y) / 0.6).clamp(0, 1))
        collar = self.fill(_ellipse(x, self.y - 0.70, 0.27, 0.17))
        image = _blend(image, clothes * 0.72, collar)
        neckline = torch.minimum(_ellipse(x, self.y - 0.60, 0.25, 0.20), self.y - 0.60)
        neck = torch.maximum(neck_x.abs() - 0.16, torch.maximum(0.1 - self.hy, neckline))
        image = _blend(image, self.skin, self.fill(neck))
        chin = _spot(self.hx, self.hy - 0.52, 0.46, 0.30)
        return _blend(image, self.shade * 0.88, self.fill(neck) * chin.sqrt())

    def head(self, image: Tensor) -> Tensor:
        p = self.p
        side = self.hx.abs() - self.rx
        ear = _ellipse(side - 0.015 + 0.10 * p["hair_shape"], self.hy - 0.03, 0.075, 0.115)
        image = _blend(image, self.shade, self.fill(ear))
        image = _blend(image, self.skin, self.fill(ear + 0.02))
        lower = (self.hy / self.ry).clamp(min=0).square()
        jaw_y = self.hy - 0.05 * p["mouth_open"] * lower.clamp(max=1.5)
        distance = _ellipse(self.hx * (1 + 0.13 * lower), jaw_y, self.rx, self.ry)
        light = 1.03 - 0.10 * self.fx - 0.06 * self.fy
        rim = ((distance + 0.16) / 0.16).clamp(0, 1).square() * 0.55
        colour = _blend(self.skin * light, self.shade, rim)
        blush = self.skin * self.skin.new_tensor((0.98, 0.66, 0.66)).reshape(1, 3, 1, 1)
        colour = _blend(colour, blush, 0.6 * _spot(self.fx.abs() - 0.27, self.fy - 0.17, 0.17, 0.13))
        return _blend(image, colour, self.fill(distance))

    def nose(self, image: Tensor) -> Tensor:
        p = self.p
        # The nose stands out of the face, so it travels further than the eyes.
        x, y = self.fx - 0.055 * p["yaw"], self.fy - 0.095 - 0.035 * p["pitch"]
        image = _blend(image, self.shade * 0.96, 0.9 * self.fill(_ellipse(x, y - 0.012, 0.066, 0.046)))
        image = _blend(image, self.skin, self.fill(_ellipse(x, y + 0.006, 0.060, 0.042)))
        return _blend(image, (1.0, 0.95, 0.90), 0.45 * _spot(x + 0.02, y + 0.02, 0.045, 0.04))

    def eyes(self, image: Tensor) -> Tensor:
        p = self.p
        # Both eyes at once: local x from the nearer eye's centre, not mirrored, so gaze moves both alike.
        side = torch.where(self.fx < 0, -1.0, 1.0)
        x = self.fx - side * (0.165 + 0.065 * p["eye_spacing"])
        y = self.fy + 0.06
        rx = 0.082 + 0.044 * p["eye_size"]
        ry = 1.02 * rx
        arc = _arc(x, rx)
        inside = (x.abs() < rx).float()
        lid = torch.lerp(-ry, 0.8 * ry, p["blink"])
        image = _blend(image, self.shade, 0.75 * self.band(y, -(ry + 0.022) * arc, 0.8 * ry * arc) * inside)
        opening = self.band(y, lid * arc, 0.8 * ry * arc) * inside
        gx, gy = x - 0.040 * p["gaze_x"], y - 0.012 - 0.032 * p["gaze_y"]
        r = 0.70 * rx
        ball = _blend(image, _SCLERA, opening)
        ball = _blend(ball, _palette(p["eye_colour"], _EYE), opening * self.fill(_ellipse(gx, gy, r, r)))
        ball = _blend(ball, _LASH, opening * self.fill(_ellipse(gx, gy, 0.5 * r, 0.5 * r)))
        ball = _blend(ball, _SCLERA, opening * self.fill(_ellipse(gx + 0.02, gy + 0.026, 0.02, 0.02)))
        lash = self.band(y, lid * arc - 0.022, lid * arc + 0.012)
        return _blend(ball, _LASH, lash * self.fill(x.abs() - rx))

    def mouth(self, image: Tensor) -> Tensor:
        p = self.p
        rounding, gap = p["mouth_round"], _OPEN_FULL * p["mouth_open"]
        rx = (0.125 + 0.08 * p["mouth_width"]) * (1 - 0.42 * rounding)
        # The corners smile unless the lips are rounded; the jaw takes most of the opening.
        bend = 0.03 * (1 - rounding) * (self.fx / rx).square().clamp(max=1.5)
        y = self.fy - 0.305 + bend
        top, low = -0.3 * gap, 0.7 * gap
        lips = self.skin * 0.45 + self.skin.new_tensor((0.80, 0.25, 0.30)).reshape(1, 3, 1, 1) * 0.55
        outer, inner = _arc(self.fx, rx + 0.035), _arc(self.fx, rx)
        width = self.fill(self.fx.abs() - rx - 0.035)
        thick = 0.038 + 0.034 * rounding
        image = _blend(image, lips, width * self.band(y, (top - thick) * outer, (low + 1.25 * thick) * outer))
        gloss = _spot(self.fx, y - low - 0.6 * thick, 0.08, 0.03)
        image = _blend(image, (1.0, 0.80, 0.78), 0.35 * gloss)
        inside = self.fill(self.fx.abs() - rx)
        seam = self.band(y, top * inner - 0.008, low * inner + 0.008)
        image = _blend(image, lips * 0.62, 0.85 * inside * seam)
        cavity = inside * self.band(y, top * inner, low * inner)
        image = _blend(image, _CAVITY, cavity)
        # Teeth and tongue appear once there is room, so a small opening is all cavity and can be measured.
        room = (gap - 0.035).clamp(min=0)
        teeth = self.band(y, top * inner, top * inner + 0.25 * room)
        image = _blend(image, _TEETH, cavity * teeth * self.fill(self.fx.abs() - 0.85 * rx))
        tongue = self.fill(_ellipse(self.fx, y - low, 0.62 * rx, 0.28 * room + 1e-3))
        return _blend(image, _TONGUE, cavity * tongue * (room / 0.03).clamp(max=1))

    def fringe(self, image: Tensor) -> Tensor:
        p = self.p
        shape = p["hair_shape"]
        volume = 0.055 + 0.05 * shape
        cap = _ellipse(self.hx, self.hy + 0.03, self.rx + volume, self.ry + volume)
        x = self.fx - 0.10
        line = -0.44 + 0.08 * shape + 0.75 * x.square() + (1.5 + 5.5 * shape) * self.fx.square().square()
        front = torch.maximum(cap, (self.fy - line) / 1.3)
        shine = _spot(self.hx + 0.16, self.hy + self.ry - 0.03, 0.26, 0.10)
        colour = _blend(self.hair, self.hair * 0.6 + 0.4, 0.55 * shine)
        image = _blend(image, colour, self.fill(front))
        heavy = p["brow"]
        bx = self.fx.abs() - 0.205 - 0.03 * p["eye_spacing"]
        by = self.fy + 0.265 - 0.02 * heavy - 1.3 * bx.square() + 0.20 * (heavy - 0.4) * bx
        brow = _ellipse(bx, by, 0.105, 0.014 + 0.030 * heavy)
        return _blend(image, self.hair * 0.62, self.fill(brow))


def _draw(values: Tensor, height: int, width: int) -> Tensor:
    """values [B, 22] (identity, then motion) -> [B, 3, height, width] in [-1, 1]."""
    d = _Draw(values, height, width)
    image = d.head(d.body(d.background()))
    image = d.fringe(d.mouth(d.eyes(d.nose(image))))
    return (2 * image - 1).clamp(-1, 1)
