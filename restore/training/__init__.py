"""Training of the embedded prior: `restore train configs/train/embedded.yaml`."""

from restore.training.train import train

__all__ = ["train"]
