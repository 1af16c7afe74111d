"""Priors and head sets on the Hugging Face hub, pushed and pulled by its own mixin."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

from operators import RestoreError
from restore import disk
from restore.paths import EXTRA
from restore.zoo.hub import PIPELINE_FILES, list_transport_errors
from restore.zoo.options import OPTIONS
from restore.zoo.store import Located

_WEIGHTS = {"diffusion_pytorch_model.bin": "diffusion_pytorch_model", "pytorch_model.bin": "model"}  # of pickles
LIBRARY, TAG = "restore-diffusion", "image-restoration"


class Shared(ModelHubMixin, library_name=LIBRARY, tags=[TAG]):
    """What can be pushed to the hub: save_pretrained, push_to_hub and from_pretrained are those of huggingface_hub.

    A subclass has `_save_pretrained(folder)`, which writes a README.md too, and the class method
    `_read_folder(folder, **options)`. shared_files: patterns of the files that are pulled.
    """

    shared_files: Sequence[str] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)  # not the mixin's, which would write the arguments to a config.json

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Push everything in one commit to the model repository `repo_id`, made if there is none; return its address.

        options: private, token, commit_message, branch, create_pr and others, see huggingface_hub's ModelHubMixin.
        Raises RestoreError if the hub refuses it or the upload breaks off; nothing is committed then.
        """
        with explain_hub(repo_id, "pushed to"):
            return super().push_to_hub(repo_id, **options)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Any:
        """Return what the folder or hub id `name` holds. options: revision, token, cache_dir, force_download and
        local_files_only, see huggingface_hub; others are of the loader. Raises RestoreError."""
        if Path(name).expanduser().is_dir():
            return cls._from_pretrained(model_id=str(name), **options)
        with explain_hub(str(name), "read from"):
            return super().from_pretrained(name, **options)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Any:
        hub = {key: options.pop(key) for key in _HUB_OPTIONS if key in options}
        options = {key: value for key, value in options.items() if key not in _UNUSED}
        folder = Path(model_id).expanduser()
        if not folder.is_dir():
            folder = Path(snapshot_download(model_id, allow_patterns=list(cls.shared_files), **hub))
        return cls._read_folder(folder, **options)


_HUB_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")
_UNUSED = ("proxies", "resume_download")  # of older versions of the mixin


class SharedPrior(Shared):
    """The hub's methods of a Restorer; `restore.load("owner/name")` reads what they push.

    Priors of pixels and of unconditional latents are written as their network is, in fp16 where that loses nothing,
    with the model card of the folder they come from and the pictures beside it that it shows; others are that folder,
    as it is. source: what `load` has read.
    """

    shared_files = PIPELINE_FILES
    source: Path | None = None

    def note_source(self, found: Located, given: Mapping[str, Any], vae: str | Path | None = None) -> SharedPrior:
        """Keep where the prior was found, with which options, those of the caller too, and with which autoencoder in
        place of its own; return itself."""
        self.source, self.options, self.model_kind = found.path, dict(found.options), found.kind
        self.other_vae = vae
        self.given = {name: value for name, value in given.items() if value is not None}
        return self

    def _save_pretrained(self, save_directory: Path) -> None:
        """Raises RestoreError for a prior that can neither be written nor comes from a folder, and if that has another
        autoencoder or weights that cannot be written as safetensors."""
        patterns = ["README.md", *_list_pictures(self.source)]
        if hasattr(self.backbone, "save"):
            self.backbone.save(save_directory, "fp16" if _fits_half(self.backbone) else None)
        elif self.source is not None and self.source.is_dir():
            if self.other_vae is not None:
                raise RestoreError(f"a prior with vae={self.other_vae} cannot be saved: its folder has another one")
            patterns += self.shared_files
            convert_pickles(self.source, save_directory)
            options = {name: self.options[name] for name in OPTIONS[self.model_kind] if name in self.options}
            disk.write_json(save_directory / EXTRA, {"options": options})
        else:
            kind = type(self.backbone).__name__
            raise RestoreError(
                f"a {kind} must come from a folder to be saved, got {self.source or 'one made in Python'}"
            )
        _copy_files(self.source, save_directory, patterns)
        readme = save_directory / "README.md"
        write_card(readme, readme.read_text(encoding="utf-8") if readme.is_file() else self._describe())

    def _describe(self) -> str:
        side = self.backbone.resolution * self.backbone.downscale
        count = sum(weight.numel() for weight in self.backbone.network.parameters()) / 1e6
        return (
            f"# {Path(self.name).name}\n\nA diffusion prior of {self.kind}, {side} pixels, {count:.1f} M parameters.\n"
            "\n"
            '```python\nimport restore\n\nrestorer = restore.load("OWNER/NAME")  # this repository\'s\n```\n'
        )

    @classmethod
    def _read_folder(cls, folder: Path, **options: Any) -> Any:
        from restore.restorer import load

        return load(folder, **options)


def write_card(path: Path, text: str) -> None:
    """Write a model card with the hub's header; one that `text` has already is kept."""
    header = "" if text.startswith("---\n") else f"---\nlibrary_name: {LIBRARY}\ntags:\n- {TAG}\n---\n\n"
    disk.write_bytes(path, (header + text).encode())


@contextmanager
def explain_hub(name: str, done: str) -> Iterator[None]:
    """Raise what the hub's client raises within the block as one RestoreError: name could not be `done` the hub."""
    transport = list_transport_errors()
    try:
        yield
    except RestoreError:
        raise
    except (*transport, RuntimeError) as error:
        if not isinstance(error, transport) and not isinstance(error.__cause__, transport):
            raise  # not the RuntimeError with which an upload breaks off
        reason = " ".join((getattr(error, "server_message", None) or str(error) or type(error).__name__).split())
        status = getattr(getattr(error, "response", None), "status_code", None)
        is_closed = status in (401, 403) or isinstance(error, RepositoryNotFoundError)
        remedy = "; try token=TOKEN, or `hf auth login`" if is_closed else ""
        raise RestoreError(f"{name} could not be {done} the hub: {reason.rstrip('.')}{remedy}") from error


def convert_pickles(source: Path, target: Path) -> None:
    """Write the weights of a folder's networks that are pickles alone as safetensors to the same places of `target`.

    Raises RestoreError for those in several files, or with anything but tensors."""
    from restore.backbones.weights import read_weights

    for path in sorted(source.rglob("*model.bin")) + sorted(source.rglob("*model-*-of-*.bin")):
        if any(path.parent.glob("*.safetensors")):
            continue
        place = target / path.relative_to(source)
        content = read_weights(path) if path.name in _WEIGHTS else None
        if not isinstance(content, Mapping) or not all(hasattr(value, "detach") for value in content.values()):
            raise RestoreError(f"{path} must be one file of tensors to be saved; save the model as safetensors first")
        disk.make_folder(place.parent)
        weights = {name: value.detach().clone().contiguous() for name, value in content.items()}
        disk.write_safetensors(place.with_name(f"{_WEIGHTS[path.name]}.safetensors"), weights, {"format": "pt"})


def _fits_half(backbone: Any) -> bool:
    """Whether no weight changes in fp16."""
    import torch

    parts = [part for part in (backbone.network, getattr(backbone, "vae", None)) if part is not None]
    weights = [weight for part in parts for weight in part.state_dict().values() if weight.is_floating_point()]
    return all(torch.equal(weight, weight.half().to(weight.dtype)) for weight in weights)


def _list_pictures(folder: Path | None) -> list[str]:
    """The names that a folder's model card gives of pictures beside it: not every photo in it belongs to the model."""
    card = None if folder is None else folder / "README.md"
    text = card.read_text(encoding="utf-8") if card is not None and card.is_file() else ""
    return sorted({name for name in re.findall(r"[\w./-]+\.png", text) if "/" not in name})


def _copy_files(source: Path | None, target: Path, patterns: Sequence[str]) -> None:
    """Copy the files of a folder that match a pattern."""
    files = source.rglob("*") if source is not None and source.is_dir() else ()
    for path in sorted(path for path in files if path.is_file()):
        name = path.relative_to(source)
        if any(fnmatch(name.as_posix(), pattern) for pattern in patterns):
            disk.make_folder((target / name).parent)
            shutil.copyfile(path, target / name)
