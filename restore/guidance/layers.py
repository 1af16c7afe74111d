"""Which attention layers a name means. Exact names only; a wrong one is an error that lists what exists."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from operators import RestoreError
from restore.backbones.base import AttentionLayer

INNER = re.compile(r"\.transformer_blocks\.\d+\.attn1$")
LOOSE = {"input_blocks.": "input", "middle_block.": "middle.", "output_blocks.": "output"}


def names(layer: AttentionLayer) -> set[str]:
    """Every name under which `layer` is found.

    Its diffusers path, the paper's name (`input_blocks.9.1`), the paper's loose spelling (`input9.1`,
    `middle.1`) and the short name (`i9`, `m1`, `o2`), the long ones with and without a trailing
    `.transformer_blocks.0.attn1`.
    """
    result = {layer.path, INNER.sub("", layer.path)}
    if not INNER.search(layer.path):
        result.add(layer.path + ".transformer_blocks.0.attn1")
    if layer.paper:
        stem = INNER.sub("", layer.paper)
        tail = INNER.search(layer.path) or INNER.search(layer.paper)
        result |= {layer.paper, stem, stem + (tail.group() if tail else ".transformer_blocks.0.attn1")}
        result |= {loose + stem[len(exact) :] for exact, loose in LOOSE.items() if stem.startswith(exact)}
    if layer.short:
        result.add(layer.short)
    return result


def resolve(layers: str | Iterable[str], attention: Mapping[str, AttentionLayer]) -> list[AttentionLayer]:
    """The layers meant by `layers`, in order of execution, each once.

    layers: one name, several separated by commas, or a list of names; see `names`. A name is never matched
    by part or pattern. Raises RestoreError when a name matches no layer, or more than one.
    """
    wanted = layers.split(",") if isinstance(layers, str) else list(layers)
    if not all(isinstance(name, str) for name in wanted):
        raise RestoreError(f"layers must be a name or a list of names, not {layers!r}")
    wanted = [name.strip() for name in wanted if name.strip()]
    if not wanted:
        raise RestoreError(f"no attention layer is named; this network has {_listing(attention)}")
    known: dict[str, list[AttentionLayer]] = {}
    for layer in attention.values():
        for name in names(layer):
            known.setdefault(name, []).append(layer)
    chosen = set()
    for name in wanted:
        matches = known.get(name, [])
        if len(matches) > 1:
            raise RestoreError(
                f"'{name}' names {len(matches)} attention layers; say which: {', '.join(m.path for m in matches)}"
            )
        if not matches:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise RestoreError(f"no attention layer is called '{name}'{hint} This network has {_listing(attention)}")
        chosen.add(matches[0].path)
    return [layer for path, layer in attention.items() if path in chosen]


def _listing(attention: Mapping[str, AttentionLayer]) -> str:
    if not attention:
        return "no attention layers"
    return ", ".join(f"{layer.short or layer.paper or '-'} ({layer.path})" for layer in attention.values())
