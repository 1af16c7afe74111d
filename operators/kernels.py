"""Blur kernels: float64 tensors (size, size) that sum to one, centred on pixel size // 2."""

from __future__ import annotations

import numpy as np
import scipy.ndimage
import torch
from PIL import Image, ImageDraw, ImageFilter

from operators import validate

TRAJECTORY_STEPS = 512
LARGEST = 4096  # side and std, in pixels: beyond any camera's blur, and a matter of memory


def gaussian_profile(size: int = 61, std: float = 3.0) -> np.ndarray:
    """Return the Gaussian kernel's 1-D profile: scipy's gaussian_filter of a unit impulse, as in DPS.

    The tails are cut at 4 std, so that a kernel of size 61 and std 3 has 25 nonzero taps; a size too
    small for std folds the missing tails back in. size, std: in pixels.
    """
    size = validate.require_integer(size, "kernel_size", maximum=LARGEST)
    std = validate.require_number(validate.require_positive(std, "std"), "std", high=LARGEST)
    impulse = np.zeros(size)
    impulse[size // 2] = 1.0
    return scipy.ndimage.gaussian_filter1d(impulse, std)


def gaussian_kernel(size: int = 61, std: float = 3.0) -> torch.Tensor:
    """Return a Gaussian kernel (size, size): the outer product of `gaussian_profile` with itself."""
    profile = gaussian_profile(size, std)
    return torch.from_numpy(np.outer(profile, profile))


def motion_kernel(size: int = 61, intensity: float = 0.5, seed: int = 0) -> torch.Tensor:
    """Return the blur kernel of a camera that moves along a random path during the exposure, determined by the seed.

    After Boracchi & Foi, "Modeling the performance of image restoration from motion blur" (IEEE TIP 2012), Sec. II: a
    particle of constant speed and random first direction is steered by small random forces (tremor), pulled back to
    where it started (the hand corrects its drift) and now and then thrown almost backwards (a jerk). The kernel is the
    time it spends in each pixel.

    size: in pixels. The path is 0.3 to 1 times as long, centred by its mass, and shrunk if it would leave the square.
    intensity: in [0, 1], strength of all three disturbances; 0 is a straight line.
    """
    size = validate.require_integer(size, "kernel_size", maximum=LARGEST)
    intensity = validate.require_number(intensity, "intensity", low=0.0, high=1.0)
    random = validate.make_random_state(seed)
    path = _draw_trajectory(random, intensity) * size * random.uniform(0.3, 1.0)
    coarse = np.arange(len(path))
    times = np.linspace(0, coarse[-1], max(len(path), 8 * size))  # samples an eighth of a pixel apart at most
    path = np.stack([np.interp(times, coarse, path[:, axis]) for axis in (0, 1)], axis=1)
    path -= path.mean(axis=0)
    room = (size - 1) / 2 if size % 2 else size / 2 - 1
    path *= min(1.0, room / max(np.abs(path).max(), 1e-12))
    return torch.from_numpy(rasterise(path + size // 2, size))


def dps_motion_kernel(size: int = 61, intensity: float = 0.5, seed: int = 0) -> torch.Tensor:
    """Return a motion blur kernel of the law that DPS, PSLD and PAG draw from: that of the `motionblur` package (L.
    Borodenko, 2020), whose `Kernel((size, size), intensity)` it equals after `numpy.random.seed(seed)`.

    On a canvas of twice the size, with diagonal D: a path of length 3/4 D (U(0, 1) + U(0, intensity^2)) in steps of
    D (1.1 - intensity) Beta(1, 30), longer ones than the path being drawn again. The angle of a step to a common
    direction is triangular on [0, m + 0.1] with mode intensity m, where m is U(0, pi intensity); its sign changes from
    step to step with a probability of Beta(2, 20). The path is centred by its mass, turned by U(0, pi), drawn as a line
    D/150 wide (at least one pixel: the package draws nothing below a size of 54), blurred by a Gaussian of D/100 and
    reduced to `size` by Lanczos' filter. Rounded to 8 bits before it is divided by its sum.
    """
    size = validate.require_integer(size, "kernel_size", maximum=LARGEST)
    intensity = validate.require_number(intensity, "intensity", low=0.0, high=1.0)
    return render_dps_path(draw_dps_path(validate.make_random_state(seed), size, intensity), size)


def draw_dps_path(random: np.random.RandomState, size: int, intensity: float) -> np.ndarray:
    """Return the corners (n, 2) of the path of `dps_motion_kernel`, x and y on its canvas."""
    diagonal = (2 * (2 * size) ** 2) ** 0.5
    length = 0.75 * diagonal * (random.uniform() + random.uniform(0, intensity**2))
    steps: list[float] = []
    while sum(steps) < length:
        step = random.beta(1, 30) * (1 - intensity + 0.1) * diagonal
        steps += [step] if step < length else []
    widest = random.uniform(0, intensity * np.pi)
    turning = random.beta(2, 20)
    angles = [random.uniform(-widest, widest)]
    for _ in steps[1:]:
        angle = random.triangular(0, intensity * widest, widest + 0.1)
        angles.append(angle * np.sign(angles[-1]) * (-1 if random.uniform() < turning else 1))
    path = np.cumsum(np.array(steps) * np.exp(1j * np.array(angles)))
    path = (path - path.mean()) * np.exp(1j * random.uniform(0, np.pi)) + size * (1 + 1j)
    return np.stack([path.real, path.imag], axis=1)


def render_dps_path(path: np.ndarray, size: int) -> torch.Tensor:
    """Return the kernel of `dps_motion_kernel` that shows this path."""
    diagonal = (2 * (2 * size) ** 2) ** 0.5
    canvas = Image.new("RGB", (2 * size, 2 * size))
    ImageDraw.Draw(canvas).line([tuple(point) for point in path], width=max(1, int(diagonal / 150)))
    canvas = canvas.filter(ImageFilter.GaussianBlur(int(diagonal * 0.01))).resize(
        (size, size), Image.Resampling.LANCZOS
    )
    kernel = torch.from_numpy(np.array(canvas.convert("L"), dtype=np.float64))
    return kernel / kernel.sum()


def _draw_trajectory(random: np.random.RandomState, intensity: float) -> np.ndarray:
    """Positions (TRAJECTORY_STEPS + 1, 2) of the particle at equal times, in units of the path's length."""
    dt = 1.0 / TRAJECTORY_STEPS
    tremor = intensity * random.uniform(1.0, 4.0)  # radians of heading lost per exposure
    pull = intensity * random.uniform(0.0, 8.0)
    jerks = intensity * random.uniform(0.0, 4.0)  # expected number per exposure
    angle = random.uniform(0.0, 2 * np.pi)
    forces = random.standard_normal((TRAJECTORY_STEPS, 2)) * tremor * np.sqrt(dt)
    is_jerk = random.uniform(size=TRAJECTORY_STEPS) < jerks * dt
    jerk_angle = np.pi + random.uniform(-np.pi / 4, np.pi / 4, size=TRAJECTORY_STEPS)

    heading = np.array([np.cos(angle), np.sin(angle)])
    positions = np.zeros((TRAJECTORY_STEPS + 1, 2))
    for k in range(TRAJECTORY_STEPS):
        if is_jerk[k]:
            cos, sin = np.cos(jerk_angle[k]), np.sin(jerk_angle[k])
            heading = np.array([cos * heading[0] - sin * heading[1], sin * heading[0] + cos * heading[1]])
        heading = heading + forces[k] - pull * dt * positions[k]
        heading /= np.linalg.norm(heading)
        positions[k + 1] = positions[k] + dt * heading
    return positions


def rasterise(path: np.ndarray, size: int) -> np.ndarray:
    """Return the share of time spent in each pixel (row, column); a sample is split among its four nearest pixels.

    path: (n, 2) positions in pixels at equal times, inside [0, size - 1].
    """
    points = np.clip(path, 0, size - 1)
    corner = np.minimum(np.floor(points).astype(int), max(size - 2, 0))
    fraction = points - corner
    kernel = np.zeros((size, size))
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = np.abs(1 - row - fraction[:, 0]) * np.abs(1 - column - fraction[:, 1])
        index = np.minimum(corner + (row, column), size - 1)
        np.add.at(kernel, (index[:, 0], index[:, 1]), weight)
    return kernel / kernel.sum()


MOTION_LAWS = {"boracchi-foi": motion_kernel, "dps": dps_motion_kernel}
