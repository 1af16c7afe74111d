"""Known checkpoints: what they are, where from, under which licence; pulled, verified, cached, found, loaded."""

from restore.zoo.load import describe, listing, load_backbone
from restore.zoo.registry import Model, model, models
from restore.zoo.store import Located, by_hand, cache_dir, forget, import_file, is_offline, locate, pull

__all__ = [
    "Located",
    "Model",
    "by_hand",
    "cache_dir",
    "describe",
    "forget",
    "import_file",
    "is_offline",
    "listing",
    "load_backbone",
    "locate",
    "model",
    "models",
    "pull",
]
