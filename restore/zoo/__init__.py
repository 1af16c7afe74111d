"""Known checkpoints: what they are, where from, under which licence; pulled, verified, cached, found."""

from restore.zoo.registry import Model, model, models
from restore.zoo.store import Located, by_hand, cache_dir, import_file, is_offline, locate, pull

__all__ = ["Located", "Model", "by_hand", "cache_dir", "import_file", "is_offline", "locate", "model", "models", "pull"]
