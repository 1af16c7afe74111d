"""Training of priors: `restore train configs/train/prior-v2.yaml`."""

from restore.training.train import load_training_config, train

__all__ = ["load_training_config", "train"]
