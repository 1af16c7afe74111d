"""The classes of diffusers that pixel networks are made of, imported without the rest of diffusers.

Importing any network of diffusers imports all of them, with the loaders of adapters and, for a decorator that concerns
torch.compile, torch._dynamo: two thirds of the time before the first step of a small photo, and nothing of it is used.
Whoever needs one of these classes imports it from here; `import diffusers` stays what it is for everybody else.
"""

from __future__ import annotations

import importlib

from restore.backbones.lazy_modules import defer_decorator, import_lazily

NETWORK = "diffusers.models.unets.unet_2d"
UNUSED = ("diffusers.models.unets", "diffusers.models.transformers")  # all networks of each kind

try:
    with defer_decorator("torch._dynamo", "allow_in_graph"), import_lazily(UNUSED):
        importlib.import_module(NETWORK)
except Exception:  # a version that uses them as it is imported: then the imports below take their time
    pass

from diffusers.models.attention_processor import Attention  # noqa: E402
from diffusers.models.downsampling import Downsample2D  # noqa: E402
from diffusers.models.embeddings import TimestepEmbedding, Timesteps  # noqa: E402
from diffusers.models.resnet import ResnetBlock2D  # noqa: E402
from diffusers.models.unets.unet_2d import UNet2DModel  # noqa: E402
from diffusers.models.upsampling import Upsample2D  # noqa: E402

__all__ = [
    "Attention",
    "Downsample2D",
    "ResnetBlock2D",
    "TimestepEmbedding",
    "Timesteps",
    "UNet2DModel",
    "Upsample2D",
]
