"""Which attention layers and heads a name means. Exact names only; a wrong one is an error that lists what exists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from operators import RestoreError
from operators.naming import suggest
from restore.backbones.base import AttentionLayer

INNER = re.compile(r"\.transformer_blocks\.\d+\.attn1$")
LOOSE = {"input_blocks.": "input", "middle_block.": "middle.", "output_blocks.": "output"}

Heads = int | Sequence[int] | Mapping[str, Sequence[int]] | None
Strength = float | Mapping[str, float | Mapping[int, float]]


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
    """The layers meant by `layers` (see `choose`), in order of execution, each once."""
    return [layer for layer, _ in choose(layers, None, attention)]


def choose(
    layers: str | Iterable[str], heads: Heads, attention: Mapping[str, AttentionLayer]
) -> list[tuple[AttentionLayer, tuple[int, ...] | None]]:
    """(layer, its heads) in order of execution, each layer once; heads None: all of them.

    layers: names (see `names`), separated by commas or in a list, each with the heads it is about behind a
        colon, or without for all: "i5:0,3,m1" is heads 0 and 3 of i5 and the whole of m1. A name is never
        matched by part or pattern.
    heads: in place of colons, indices for every layer or a mapping from layer name to indices.
    Raises RestoreError when a name matches no layer, or more than one, and for heads that a layer has not.
    """
    chosen: dict[str, Any] = {}
    for name, own in parse(layers, attention):
        if own is not None and heads is not None:
            raise RestoreError(f"heads are given both in the layers, '{name}:...', and in heads={heads!r}; choose one")
        path = find(name, attention).path
        chosen[path] = None if own is None or chosen.get(path, ()) is None else [*chosen.get(path, ()), *own]
    if isinstance(heads, Mapping):
        for name, indices in heads.items():
            path = find(name, attention).path
            if path not in chosen:
                raise RestoreError(f"heads are given for '{name}', which is not among the perturbed layers")
            chosen[path] = indices
    elif heads is not None:
        chosen = dict.fromkeys(chosen, heads)
    return [(layer, _heads(layer, chosen[path])) for path, layer in attention.items() if path in chosen]


def checked(strength: Strength) -> Strength:
    """A strength u in [0, 1], one for each layer {"i5": u}, or for each head {"i5": {0: u, 3: u}}. RestoreError."""
    if isinstance(strength, Mapping):
        return {
            str(name): _checked_heads(name, u) if isinstance(u, Mapping) else checked(u) for name, u in strength.items()
        }
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
        raise RestoreError(f"the strength of a perturbation must lie in [0, 1], not {strength!r}")
    return strength


def strengths(
    chosen: Sequence[tuple[AttentionLayer, tuple[int, ...] | None]],
    strength: Strength,
    attention: Mapping[str, AttentionLayer],
) -> list[tuple[AttentionLayer, tuple[int, ...] | None, float]]:
    """(layer, heads, u) for what `choose` gives: a layer's heads in groups of one u each.

    Raises RestoreError where a mapping does not say u for exactly the chosen layers and heads.
    """
    if not isinstance(strength, Mapping):
        return [(layer, heads, strength) for layer, heads in chosen]
    given = {find(name, attention).path: u for name, u in strength.items()}
    groups: list[tuple[AttentionLayer, tuple[int, ...] | None, float]] = []
    for layer, heads in chosen:
        u = given.pop(layer.path, None)
        if u is None:
            raise RestoreError(f"the strengths {strength} say nothing of the perturbed layer {layer.path}")
        if not isinstance(u, Mapping):
            groups.append((layer, heads, u))
            continue
        heads = tuple(range(layer.heads)) if heads is None else heads
        if sorted(u) != list(heads):
            raise RestoreError(
                f"strengths are given for heads {sorted(u)} of {layer.path}, but {list(heads)} are chosen"
            )
        groups += [(layer, tuple(head for head in heads if u[head] == value), value) for value in sorted({*u.values()})]
    if given:
        raise RestoreError(f"a strength is given for {next(iter(given))}, which is not among the perturbed layers")
    return groups


def require_ran(paths: Iterable[str], ran: Iterable[str]) -> None:
    """Raises RestoreError for the first path of a layer that did not run in a pass which needed it."""
    ran = set(ran)
    missed = [path for path in paths if path not in ran]
    if missed:
        raise RestoreError(
            f"the attention layer {missed[0]} did not run in the perturbed pass, so guidance would do nothing; "
            "its network was replaced, or compiled in a way that cannot be changed: load it anew"
        )


def parse(layers: str | Iterable[str], attention: Mapping[str, AttentionLayer]) -> list[tuple[str, list[int] | None]]:
    """ "i5:0,3,m1" -> [("i5", [0, 3]), ("m1", None)]; a number behind a comma goes on with the heads before it."""
    texts = [layers] if isinstance(layers, str) else list(layers)
    if not all(isinstance(text, str) for text in texts):
        raise RestoreError(f"layers must be a name or a list of names, not {layers!r}")
    wanted: list[tuple[str, list[int] | None]] = []
    for text in texts:
        heads: list[int] | None = None
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, colon, number = (item.strip() for item in part.partition(":"))
            if heads is not None and part.isdecimal():
                heads.append(int(part))
                continue
            if colon and not number.isdecimal():
                raise RestoreError(f"'{part}' is not a layer with a head, such as i5:0 or i5:0,3 for two of them")
            heads = [int(number)] if colon else None
            wanted.append((name, heads))
    if not wanted:
        raise RestoreError(f"no attention layer is named; this network has {_listing(attention)}")
    return wanted


def find(name: str, attention: Mapping[str, AttentionLayer]) -> AttentionLayer:
    """The one layer of that name. Raises RestoreError when there is none, or more than one."""
    matches = [layer for layer in attention.values() if name in names(layer)]
    if len(matches) > 1:
        raise RestoreError(
            f"'{name}' names {len(matches)} attention layers; say which: {', '.join(m.path for m in matches)}"
        )
    if not matches:
        hint = suggest(name, [known for layer in attention.values() for known in names(layer)])
        hint = f"; {hint}" if hint.startswith("did") else "."
        raise RestoreError(f"no attention layer is called '{name}'{hint} This network has {_listing(attention)}")
    return matches[0]


def _heads(layer: AttentionLayer, indices: int | Iterable[int] | None) -> tuple[int, ...] | None:
    if indices is None:
        return None
    given = {indices} if isinstance(indices, int) else set(indices)
    if not all(isinstance(index, int) for index in given):
        raise RestoreError(f"heads are whole numbers, not {indices!r}")
    chosen = tuple(sorted(given))
    if not chosen or chosen[0] < 0 or chosen[-1] >= layer.heads:
        raise RestoreError(f"{layer.path} has heads 0..{layer.heads - 1}, not {list(chosen)}")
    return chosen


def table(
    attention: Mapping[str, AttentionLayer], resolution: int, layers: str | Iterable[str] | None = None
) -> list[str]:
    """One line per layer: short name, paper's name, diffusers path, heads, width, side at that resolution.

    layers: only those that this selects, with the heads that it selects.
    """
    every = [(layer, None) for layer in attention.values()]
    lines = [f"{'short':6} {'paper':18} {'diffusers path':60} heads      width  side"]
    for layer, heads in every if layers is None else choose(layers, None, attention):
        named = f"0..{layer.heads - 1}" if heads is None else ",".join(map(str, heads))
        side = resolution // layer.downsampling
        lines.append(f"{layer.short:6} {layer.paper:18} {layer.path:60} {named:9}  {layer.channels:5}  {side:4}")
    return lines


def _checked_heads(name: str, strengths: Mapping[Any, float]) -> dict[int, float]:
    if not strengths or not all(str(head).isdecimal() for head in strengths):
        raise RestoreError(f"the strengths of {name} are one number, or one for each head such as {{0: 0.5, 3: 1}}")
    return {int(head): checked(u) for head, u in strengths.items()}


def _listing(attention: Mapping[str, AttentionLayer]) -> str:
    if not attention:
        return "no attention layers"
    return ", ".join(f"{layer.short or layer.paper or '-'} ({layer.path})" for layer in attention.values())
