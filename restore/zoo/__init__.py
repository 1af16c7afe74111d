"""Known checkpoints: registry, download, checksums, cache, loading."""

from restore.zoo.load import (
    describe_download,
    describe_model,
    find_autoencoder,
    hash_weights,
    list_models,
    load_backbone,
)
from restore.zoo.registry import find_model, read_registry
from restore.zoo.store import (
    cache_dir,
    explain_download,
    forget_checksum,
    import_file,
    is_offline,
    locate,
    pull,
    pull_configuration,
)

__all__ = [
    "cache_dir",
    "describe_download",
    "describe_model",
    "explain_download",
    "find_autoencoder",
    "find_model",
    "forget_checksum",
    "hash_weights",
    "import_file",
    "is_offline",
    "list_models",
    "load_backbone",
    "locate",
    "pull",
    "pull_configuration",
    "read_registry",
]
