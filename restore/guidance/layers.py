"""Which attention layers and heads a name means. Exact names only; an unknown one is an error that lists all."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from torch import nn

from operators import RestoreError
from operators.naming import suggest
from operators.ranges import Range, Share, fits
from restore.backbones.base import AttentionLayer

INNER = re.compile(r"\.transformer_blocks\.\d+\.attn1$")
LOOSE = {"input_blocks.": "input", "middle_block.": "middle.", "output_blocks.": "output"}

Attention = Mapping[str, AttentionLayer]  # by path, as `Backbone.attention`
Head = Annotated[int, Range(0)]
Heads = Head | Sequence[Head] | Mapping[str, Head | Sequence[Head]] | None
Strength = Share | Mapping[str, Share | Mapping[int, Share]]
LayerHeads = tuple[AttentionLayer, tuple[int, ...] | None]  # a layer with some of its heads; None: all of them


def layer_names(layer: AttentionLayer) -> set[str]:
    """Return every name of `layer`: its diffusers path, the paper's name (`input_blocks.9.1`), its loose spelling
    (`input9.1`, `middle.1`) and the short name (`i9`), the long ones also without `.transformer_blocks.0.attn1`."""
    names = {layer.path, INNER.sub("", layer.path)}
    if not INNER.search(layer.path):
        names.add(layer.path + ".transformer_blocks.0.attn1")
    if layer.paper:
        stem = INNER.sub("", layer.paper)
        tail = INNER.search(layer.path) or INNER.search(layer.paper)
        names |= {layer.paper, stem, stem + (tail.group() if tail else ".transformer_blocks.0.attn1")}
        names |= {loose + stem[len(exact) :] for exact, loose in LOOSE.items() if stem.startswith(exact)}
    if layer.short:
        names.add(layer.short)
    return names


def find_layer(name: str, attention: Attention) -> AttentionLayer:
    """Return the layer of that name. Raises RestoreError if there is none, or more than one."""
    matches = [layer for layer in attention.values() if name in layer_names(layer)]
    if len(matches) > 1:
        paths = ", ".join(layer.path for layer in matches)
        raise RestoreError(f"'{name}' names {len(matches)} attention layers; try one of {paths}")
    if not matches:
        hint = suggest(name, [known for layer in attention.values() for known in layer_names(layer)])
        hint = f"{hint} " if hint.startswith("did") else ""
        raise RestoreError(f"no attention layer is called '{name}'; {hint}this network has {_list_layers(attention)}")
    return matches[0]


def resolve_layers(layers: str | Iterable[str], attention: Attention) -> list[AttentionLayer]:
    """Return the layers meant by `layers` (see choose_layers), in order of execution, each once."""
    return [layer for layer, _ in choose_layers(layers, None, attention)]


def choose_layers(layers: str | Iterable[str], heads: Heads, attention: Attention) -> list[LayerHeads]:
    """Return (layer, its heads) in order of execution, each layer once; heads None: all of them.

    layers: names (see layer_names), separated by commas or in a list, each with its heads after a colon, or without
        for all: "i5:0,3,m1" is heads 0 and 3 of i5 and the whole of m1.
    heads: in place of colons, indices for every layer or a mapping from layer name to indices.
    Raises RestoreError if a name matches no layer, or more than one, and for heads that a layer does not have.
    """
    selected: dict[str, Any] = {}
    for name, indices in _parse(layers, attention):
        if indices is not None and heads is not None:
            raise RestoreError(f"heads are given both in the layers, '{name}:...', and as heads={heads!r}; use one")
        path = find_layer(name, attention).path
        before = selected.get(path, ())
        selected[path] = None if indices is None or before is None else [*before, *indices]
    if isinstance(heads, Mapping):
        for name, indices in heads.items():
            path = find_layer(name, attention).path
            if path not in selected:
                raise RestoreError(f"heads are given for '{name}', which is not among the perturbed layers")
            selected[path] = indices
    elif heads is not None:
        selected = dict.fromkeys(selected, heads)
    return [(layer, _check_heads(layer, selected[path])) for path, layer in attention.items() if path in selected]


def find_cross_attention(layer: AttentionLayer, network: nn.Module) -> AttentionLayer:
    """Return the cross-attention of the block whose self-attention is `layer`. Raises RestoreError if it has none."""
    block = network.get_submodule(layer.path.rpartition(".")[0])
    module = getattr(block, "attn2", None)
    if not layer.path.endswith(".attn1") or module is None or not module.is_cross_attention:
        raise RestoreError(f"scope cross needs layers with cross-attention, which {layer.path} does not have")
    return replace(layer, path=layer.path[: -len("attn1")] + "attn2", module=module, heads=module.heads)


def normalize_strength(strength: Strength) -> Strength:
    """Return u in [0, 1], {"i5": u} or {"i5": {0: u, 3: u}}, heads as integers. Raises RestoreError otherwise."""
    if not isinstance(strength, Mapping):
        if not fits(strength, Share):
            raise RestoreError(f"strength must be a number in [0, 1], got {strength!r}")
        return strength
    result: dict[str, Any] = {}
    for name, u in strength.items():
        if isinstance(u, Mapping):
            if not u or not all(str(head).isdecimal() for head in u):
                raise RestoreError(f"strength of {name} must be one number, or one for each head such as {{0: 0.5}}")
            result[str(name)] = {int(head): normalize_strength(value) for head, value in u.items()}
        else:
            result[str(name)] = normalize_strength(u)
    return result


def split_by_strength(layers: Sequence[LayerHeads], strength: Strength, attention: Attention) -> list[tuple]:
    """Return (layer, heads, u) for the result of choose_layers: each layer's heads in groups of equal u. Raises
    RestoreError if a mapping does not give u for exactly the chosen layers and heads."""
    if not isinstance(strength, Mapping):
        return [(layer, heads, strength) for layer, heads in layers]
    strengths = {find_layer(name, attention).path: u for name, u in strength.items()}
    groups: list[tuple] = []
    for layer, heads in layers:
        u = strengths.pop(layer.path, None)
        if u is None:
            raise RestoreError(f"strength must be given for every perturbed layer, got {strength} without {layer.path}")
        if not isinstance(u, Mapping):
            groups.append((layer, heads, u))
            continue
        heads = tuple(range(layer.heads)) if heads is None else heads
        if sorted(u) != list(heads):
            raise RestoreError(f"strength of {layer.path} must be given for heads {list(heads)}, got {sorted(u)}")
        groups += [(layer, tuple(head for head in heads if u[head] == value), value) for value in sorted({*u.values()})]
    if strengths:
        raise RestoreError(f"strength is given for {next(iter(strengths))}, which is not among the perturbed layers")
    return groups


def require_ran(paths: Iterable[str], ran: Collection[str]) -> None:
    """Raises RestoreError for the first of `paths` whose layer did not run in the weak pass."""
    missed = [path for path in paths if path not in ran]
    if missed:
        reason = "its network was replaced, or compiled in a way that cannot be changed; try loading it again"
        raise RestoreError(f"the attention layer {missed[0]} did not run in the perturbed pass: {reason}")


def format_layer_table(attention: Attention, resolution: int, layers: str | Iterable[str] | None = None) -> list[str]:
    """Return one line per layer: short name, paper's name, diffusers path, heads, width, side at that resolution.

    layers: only those that this selects, with the heads that it selects.
    """
    rows = [(layer, None) for layer in attention.values()]
    lines = [f"{'short':6} {'paper':18} {'diffusers path':60} heads      width  side"]
    for layer, heads in rows if layers is None else choose_layers(layers, None, attention):
        indices = f"0..{layer.heads - 1}" if heads is None else ",".join(map(str, heads))
        side = resolution // layer.downsampling
        lines.append(f"{layer.short:6} {layer.paper:18} {layer.path:60} {indices:9}  {layer.channels:5}  {side:4}")
    return lines


def _parse(layers: str | Iterable[str], attention: Attention) -> list[tuple[str, list[int] | None]]:
    """ "i5:0,3,m1" -> [("i5", [0, 3]), ("m1", None)]; a bare number continues the heads before it."""
    texts = [layers] if isinstance(layers, str) else list(layers)
    if not all(isinstance(text, str) for text in texts):
        raise RestoreError(f"layers must be a name or a list of names, got {layers!r}")
    parsed: list[tuple[str, list[int] | None]] = []
    for text in texts:
        heads: list[int] | None = None
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, colon, number = (item.strip() for item in part.partition(":"))
            if heads is not None and part.isdecimal():
                heads.append(int(part))
                continue
            if colon and not number.isdecimal():
                raise RestoreError(f"layers must be names with or without heads such as i5:0 or i5:0,3, got '{part}'")
            heads = [int(number)] if colon else None
            parsed.append((name, heads))
    if not parsed:
        raise RestoreError(f"layers must name at least one attention layer; this network has {_list_layers(attention)}")
    return parsed


def _check_heads(layer: AttentionLayer, indices: int | Iterable[int] | None) -> tuple[int, ...] | None:
    if indices is None:
        return None
    heads = {indices} if isinstance(indices, int) else set(indices)
    if not all(isinstance(index, int) for index in heads):
        raise RestoreError(f"heads must be integers, got {indices!r}")
    if not heads or min(heads) < 0 or max(heads) >= layer.heads:
        raise RestoreError(f"heads of {layer.path} must be in 0..{layer.heads - 1}, got {sorted(heads)}")
    return tuple(sorted(heads))


def _list_layers(attention: Attention) -> str:
    layers = (f"{layer.short or layer.paper or '-'} ({layer.path})" for layer in attention.values())
    return ", ".join(layers) or "no attention layers"
