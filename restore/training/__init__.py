"""Training of the embedded prior: `restore train configs/train/embedded.yaml`."""

from restore.training.train import load_config, train

__all__ = ["load_config", "train"]
