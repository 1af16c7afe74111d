"""JPEG compression (ITU-T T.81, JFIF): the rounding of DCT coefficients as noise, and what a file tells of it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from operators import proximal, validate
from operators.base import Operator, apply_transpose
from operators.errors import RestoreError
from operators.jpeg_tables import SIDE, as_tables, standard_tables
from operators.noise import GaussianNoise
from operators.pointwise import Denoising
from operators.separable import compute_dtype

LEVELS = 127.5  # grey levels of 1 on [-1, 1]
SAMPLINGS = {"4:4:4": (1, 1), "4:2:2": (1, 2), "4:2:0": (2, 2)}  # rows and columns of the picture per value of chroma
# RGB to Y, Cb, Cr (JFIF 1.02).
MATRIX = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
# Standard deviation of a coefficient at the distance f from DC, a f^-b grey levels: brightness and colour of the
# shipped photos, by least squares of logarithms. What is rounded away is never more than there is.
SPREADS = ((75.0, 1.24), (22.0, 1.85))


class JPEGNoise:
    """What JPEG does to a picture y (B, 1 or 3, H, W): each DCT coefficient is rounded to a multiple of its step.

    For the data term Gaussian noise: the variance of a coefficient is step^2 / 12 (of a uniform error), plus that of
    the noise before it. Colour of half the resolution is compared at that resolution.

    quality: 1 to 100 of libjpeg, with its standard tables; or tables: the steps of brightness and of colour, each 64
        numbers in rows (Pillow's `Image.quantization`), as a file has them.
    subsampling: "4:4:4", "4:2:2" or "4:2:0". offset: rows and columns of the first block that were cut off.
    before: GaussianNoise that the picture had when it was compressed, or None.
    loss: standard deviation on [-1, 1] of what the compression changed (`estimate_loss`); None: of an average photo.
    sigma: about the standard deviation of all of it, for samplers that take one number.
    """

    def __init__(self, quality=None, *, tables=None, subsampling="4:2:0", offset=(0, 0), loss=None, before=None):
        if (quality is None) == (tables is None):
            raise RestoreError(f"quality or tables must be given, one of them, got {quality!r} and {tables!r}")
        if before is not None and not isinstance(before, GaussianNoise):
            raise RestoreError(f"noise before JPEG must be Gaussian or None, got {before!r}; try GaussianNoise(0.02)")
        self.subsampling = validate.require_choice(subsampling, "subsampling", tuple(SAMPLINGS))
        self.tables = standard_tables(quality) if tables is None else as_tables(tables)
        self.quality, self.before = quality, before
        self.loss = None if loss is None else validate.require_number(loss, "loss", low=1e-4)
        self.offset = tuple(validate.require_integer(n, "offset", 0, 2 * SIDE - 1) for n in offset)

    @property
    def sigma(self) -> float:
        loss = self._average_loss() if self.loss is None else self.loss
        return math.hypot(loss, 0.0 if self.before is None else self.before.sigma)

    def _average_loss(self) -> float:
        known = [spread.square() for spread in _average_spreads()]
        rounded = [table.square() / 12 for table in self.tables]
        return _join_planes([float(torch.minimum(rounded[k], known[k]).mean()) for k in (0, 1, 1)])

    def estimate_loss(self, y: torch.Tensor) -> float:
        """Return the standard deviation on [-1, 1] of what the compression has changed in a picture that it made.

        Coefficients are taken as Laplacian, with the average photo's spreads times one factor for each plane: that with
        which as many of them are rounded to 0 as are.
        """
        losses, sizes = [], [SIDE**2 * math.prod(shape) for shape in self._shapes(y)]
        for k, plane in enumerate(self.read(y.double()).split(sizes, dim=1)):
            step, average = self.tables[k > 0].to(plane), _average_spreads()[k > 0].to(plane)
            kept = float((plane.view(-1, SIDE, SIDE).abs() > step / 2).double().mean())
            low, high = -6.0, 6.0  # of the factor's logarithm
            for _ in range(40):
                middle = (low + high) / 2
                a = step * math.sqrt(0.5) / (average * math.exp(middle))  # P(|c| > step / 2) = exp(-a)
                low, high = (middle, high) if float((-a).exp().mean()) < kept else (low, middle)
            zeroed = (step / (2 * a)).square() * (2 - (-a).exp() * (a.square() + 2 * a + 2))
            losses.append(float(torch.where(a > 1e-2, zeroed + (-a).exp() * step**2 / 12, step**2 / 12).mean()))
        return _join_planes(losses)

    def __call__(self, y: torch.Tensor, generator=None) -> torch.Tensor:
        """Return y with the noise before, clamped to [-1, 1], compressed and read again by Pillow; no gradient."""
        y = y.detach() if self.before is None else self.before(y.detach(), generator)
        return torch.cat([self._compress(picture) for picture in y])[..., : y.shape[-2], : y.shape[-1]].to(y)

    def after(self, before: GaussianNoise) -> JPEGNoise:
        """Return the same compression of a picture with this noise."""
        how = {"tables": self.tables} if self.quality is None else {"quality": self.quality}
        return JPEGNoise(**how, subsampling=self.subsampling, offset=self.offset, loss=self.loss, before=before)

    def std(self, y: torch.Tensor) -> torch.Tensor:
        """Return the standard deviation of the noise at each entry of the noiseless measurement y."""
        return torch.full_like(y, self.sigma)

    def measure(self, y: torch.Tensor) -> torch.Tensor:
        """Return the DCT coefficients (B, n) in grey levels of pictures y, as an encoder computes them; linear in y.

        The planes Y, Cb, Cr one after the other, each as blocks (rows, columns, 8, 8); Y alone of one channel.
        """
        return torch.cat([_transform(plane).flatten(1) for plane in self._planes(LEVELS * y)], dim=1)

    def read(self, y: torch.Tensor) -> torch.Tensor:
        """Return `measure` of a picture that was decompressed: its chroma, enlarged by the decoder's triangle filter,
        is undone."""
        planes = self._planes(LEVELS * y)
        planes[1:] = [undo_enlargement(plane, SAMPLINGS[self.subsampling]) for plane in planes[1:]]
        return torch.cat([_transform(plane).flatten(1) for plane in planes], dim=1)

    def prox_l2(self, operator, z: torch.Tensor, y: torch.Tensor, gamma, rough: bool = False) -> torch.Tensor:
        """Return argmin_x gamma/2 ||A x - y||_W^2 + 1/2 ||x - z||^2; W weighs each coefficient by sigma^2 over its
        variance.

        With full chroma, sides of whole blocks and A the identity one step of conjugate gradients is the closed form.
        """
        gamma = validate.require_per_image(gamma, "gamma", z)
        gamma = proximal.as_factors(gamma, z.new_empty(0, 1, dtype=compute_dtype(z)))
        x, target = z.to(compute_dtype(z)), y.to(compute_dtype(z))

        def forward(image):
            return self.measure(operator.A(image))

        difference = self.read(target) - forward(x)
        variances = self._place_variances(target) / self.sigma**2
        damping = variances / gamma.clamp_min(1e-12)
        inverse = self._precondition(operator, target, damping)

        def apply(v):
            return forward(apply_transpose(forward, v, x.shape)) + damping * v

        limits = proximal.ROUGH if rough else (None, proximal.MAX_ITERATIONS)
        v = proximal.solve_pcg(apply, inverse, difference, *limits)
        d = apply_transpose(forward, v, x.shape)
        return (x + torch.where((gamma > 0)[..., None, None], d, 0.0)).to(z.dtype)

    def _place_variances(self, y: torch.Tensor) -> torch.Tensor:
        """`variances`, made once for pictures of one kind."""
        key = (repr(self), *y.shape[1:], y.dtype, y.device)
        if self.__dict__.get("_made", (None,))[0] != key:
            with torch.inference_mode(False):  # or it could not be used in a later backward pass
                self._made = key, self.variances(y)
        return self._made[1]

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_made"}

    def variances(self, y: torch.Tensor) -> torch.Tensor:
        """Return the variance (1, n) of every coefficient of pictures like y, on the scale of `measure`."""
        rows = torch.tensor(MATRIX, dtype=torch.float64).square().sum(1).tolist()
        before = 0.0 if self.before is None else (LEVELS * self.before.sigma) ** 2
        parts = []
        for k, shape in enumerate(self._shapes(y)):
            area = math.prod(SAMPLINGS[self.subsampling]) if k else 1
            share = 1.0 if y.shape[1] == 1 else rows[k] / area
            table = self.tables[k > 0].square() / 12 + share * before
            parts.append(table.expand(*shape, SIDE, SIDE).reshape(1, -1))
        return torch.cat(parts, dim=1).to(y)

    def _precondition(self, operator, y: torch.Tensor, damping: torch.Tensor):
        """A function that approximates (C A A^T C^T + damping)^-1, C = `measure`: as if A were stationary, coefficient
        by coefficient, with full chroma for the three planes together."""
        is_stationary = isinstance(operator, Operator) and operator.stationary
        power = y.new_ones(SIDE, SIDE)
        if is_stationary:
            key = ("band power", tuple(y.shape))
            power = operator._buffer(key, lambda: _band_power(operator.respond(y)), y.dtype, y.device)
        # where A loses everything and nothing damps, the approximation must stay finite
        damping = torch.maximum(damping, torch.finfo(y.dtype).eps * power.amax())
        gram = _place(_correlate_colours if y.shape[1] == 3 else _scale_grey, y.dtype, y.device)
        area = 1 if y.shape[1] == 1 else math.prod(SAMPLINGS[self.subsampling])
        if area == 1:
            steps = damping.view(len(damping), len(gram), -1, SIDE, SIDE)[:, :, 0].permute(0, 2, 3, 1)
            # `inv` would wait for its own check, which these matrices, positive, always pass.
            inverted = torch.linalg.inv_ex(gram * power[:, :, None, None] + torch.diag_embed(steps)).inverse

            def invert(v):
                planes = v.view(len(v), len(gram), -1, SIDE, SIDE)
                return torch.einsum("buvij,bjnuv->binuv", inverted, planes).flatten(1)

            return invert
        parts = [gram[0, 0] * power, *[gram[k, k] / area * power.mean().expand(SIDE, SIDE) for k in (1, 2)]]
        sizes = zip(parts, self._shapes(y), strict=True)
        diagonal = torch.cat([part.expand(*shape, SIDE, SIDE).reshape(1, -1) for part, shape in sizes], dim=1) + damping
        return lambda v: v / diagonal

    def _planes(self, y: torch.Tensor) -> list[torch.Tensor]:
        """Y, Cb, Cr (B, 1, h, w) of y, padded to whole blocks, chroma reduced by a box as the encoder does."""
        if y.shape[1] == 1:
            return [_pad(y, self.offset, (SIDE, SIDE))]
        rows, columns = SAMPLINGS[self.subsampling]
        y = _pad(y, self.offset, (SIDE * rows, SIDE * columns))
        planes = torch.einsum("oc,bchw->bohw", _place(_colours, y.dtype, y.device), y).split(1, 1)
        return [planes[0], *(F.avg_pool2d(plane, (rows, columns)) for plane in planes[1:])]

    def _shapes(self, y: torch.Tensor) -> list[tuple[int, int]]:
        """Rows and columns of blocks of each plane of pictures like y."""
        rows, columns = (1, 1) if y.shape[1] == 1 else SAMPLINGS[self.subsampling]
        sides = [
            math.ceil((n + cut) / (SIDE * unit))
            for n, cut, unit in zip(y.shape[2:], self.offset, (rows, columns), strict=True)
        ]
        return [(sides[0] * rows, sides[1] * columns), *([tuple(sides)] * (y.shape[1] - 1))]

    def _compress(self, picture: torch.Tensor) -> torch.Tensor:
        import PIL.Image

        levels = ((picture.float().cpu().clamp(-1, 1) + 1) * LEVELS).round().byte()
        levels = _pad(levels[None].float(), self.offset, (1, 1))[0].byte().permute(1, 2, 0).numpy()
        image = PIL.Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)
        stream = io.BytesIO()
        tables = [table.flatten().int().tolist() for table in self.tables]
        sampling = {} if levels.shape[2] == 1 else {"subsampling": self.subsampling}
        image.save(stream, "JPEG", qtables=tables[: 1 if levels.shape[2] == 1 else 2], **sampling)
        decoded = np.asarray(PIL.Image.open(stream), dtype=np.float32).reshape(levels.shape)
        decoded = decoded[self.offset[0] :, self.offset[1] :]
        return torch.from_numpy(decoded).permute(2, 0, 1)[None] / LEVELS - 1

    def __repr__(self) -> str:
        tables = [table.flatten().int().tolist() for table in self.tables]
        how = f"quality={self.quality}" if self.quality is not None else f"tables={tables}"
        more = f", offset={self.offset}" if any(self.offset) else ""
        more += f", loss={self.loss}" if self.loss is not None else ""
        more += f", before={self.before!r}" if self.before is not None else ""
        return f"JPEGNoise({how}, subsampling={self.subsampling}{more})"


class JPEG(Denoising):
    """A picture kept as JPEG: A(x) = x, and the noise is that of `JPEGNoise`.

    quality, tables, subsampling, offset, loss: as there. noise: GaussianNoise before the compression. In a composition
    it is the last operator.
    """

    name = "jpeg"
    has_reference = False

    def __init__(
        self,
        quality=None,
        *,
        tables=None,
        subsampling="4:2:0",
        offset=(0, 0),
        loss=None,
        noise=None,
        image_size=None,
        adjoint="exact",
    ):
        noise = JPEGNoise(quality, tables=tables, subsampling=subsampling, offset=offset, loss=loss, before=noise)
        super().__init__(noise=noise, image_size=image_size, adjoint=adjoint)


def _average_spreads() -> list[torch.Tensor]:
    """Standard deviations (8, 8) of the coefficients of brightness and of colour in an average photo."""
    f = torch.arange(SIDE, dtype=torch.float64)
    distance = torch.hypot(f[:, None], f[None]).clamp_min(1e-2)
    return [a * distance**-b for a, b in SPREADS]


def _join_planes(variances: Sequence[float]) -> float:
    """The standard deviation on [-1, 1] of R, G, B together, of variances of Y (alone: of grey), Cb, Cr in levels."""
    weights = torch.linalg.inv(torch.tensor(MATRIX, dtype=torch.float64)).square().sum(0).tolist()
    total = sum(w * v / 3 for w, v in zip(weights, variances, strict=True)) if len(variances) == 3 else variances[0]
    return math.sqrt(total) / LEVELS


def undo_enlargement(plane: torch.Tensor, factor: tuple[int, int], iterations: int = 16) -> torch.Tensor:
    """Return c (B, 1, h, w) of the box means of c enlarged by libjpeg's triangle filter, of weights 3/4 and 1/4.

    That is c filtered by (1/8, 3/4, 1/8) along each enlarged axis, which Richardson's iteration inverts.
    """
    taps = _place(_taps, plane.dtype, plane.device)
    for dim, size in zip((-2, -1), factor, strict=True):
        if size == 1:
            continue
        kernel, pad = (taps.view(1, 1, 3, 1), (0, 0, 1, 1)) if dim == -2 else (taps.view(1, 1, 1, 3), (1, 1, 0, 0))
        c = plane
        for _ in range(iterations):
            c = c + (plane - F.conv2d(F.pad(c, pad, mode="replicate"), kernel)) / 0.75
        plane = c
    return plane


@lru_cache(maxsize=32)
def _place(make: Callable, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The constant make() in this dtype and on this device, made once."""
    with torch.inference_mode(False), torch.no_grad():
        return make().to(dtype).to(device)


def _colours() -> torch.Tensor:
    return torch.tensor(MATRIX, dtype=torch.float64)


def _correlate_colours() -> torch.Tensor:
    return LEVELS**2 * (_colours() @ _colours().mT)


def _scale_grey() -> torch.Tensor:
    return LEVELS**2 * torch.ones(1, 1)


def _taps() -> torch.Tensor:
    return torch.tensor([0.125, 0.75, 0.125], dtype=torch.float64)


def _dct() -> torch.Tensor:
    k = torch.arange(SIDE, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * k[None] + 1) * k[:, None] / (2 * SIDE)) * math.sqrt(2 / SIDE)
    matrix[0] /= math.sqrt(2)
    return matrix


def _transform(plane: torch.Tensor) -> torch.Tensor:
    """The orthonormal DCT of the blocks of (B, 1, H, W): (B, H / 8, W / 8, 8, 8)."""
    blocks = plane[:, 0].unflatten(1, (-1, SIDE)).unflatten(3, (-1, SIDE)).transpose(2, 3)
    D = _place(_dct, plane.dtype, plane.device)
    return D @ blocks @ D.mT


def _band_power(response: torch.Tensor) -> torch.Tensor:
    """The power (8, 8) that a stationary map, by its response (h, w) to a point at [0, 0], gives each coefficient."""
    at = torch.arange(SIDE)
    lag = at[:, None] - at[None]
    rows, columns = lag % response.shape[-2], lag % response.shape[-1]
    local = response[0, 0].double().cpu()[rows[:, None, :, None], columns[None, :, None, :]]  # (i, j, k, l)
    D = _dct()
    return torch.einsum("ui,vj,ijkl,uk,vl->uv", D, D, local, D, D).clamp_min(0)


def _pad(y: torch.Tensor, offset: tuple[int, int], unit: tuple[int, int]) -> torch.Tensor:
    """Replicate the edges: by `offset` at the top and left, then to a multiple of `unit` at the bottom and right."""
    more = [-(n + cut) % size for n, cut, size in zip(y.shape[-2:], offset, unit, strict=True)]
    return F.pad(y, (offset[1], more[1], offset[0], more[0]), mode="replicate")
