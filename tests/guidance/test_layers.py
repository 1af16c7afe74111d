"""Names of attention layers: exact, in every accepted spelling, with a helpful error otherwise."""

from __future__ import annotations

import pytest
from torch import nn

from operators import RestoreError
from restore.backbones.base import AttentionLayer
from restore.guidance import resolve_layers
from restore.guidance.layers import choose_layers


def layer(path, paper, short):
    return AttentionLayer(path, paper, short, nn.Identity(), 8, 512, 16)


FFHQ = {
    item.path: item
    for item in (
        layer("down_blocks.4.attentions.0", "input_blocks.9.1", "i9"),
        layer("mid_block.attentions.0", "middle_block.1", "m1"),
        layer("up_blocks.1.attentions.0", "output_blocks.2.1", "o2"),
        layer("up_blocks.1.attentions.1", "output_blocks.3.1", "o3"),
    )
}
INNER = ".transformer_blocks.{}.attn1"
SD = {
    item.path: item
    for item in (
        layer("down_blocks.2.attentions.1" + INNER.format(0), "input_blocks.8.1" + INNER.format(0), "i8"),
        layer("mid_block.attentions.0" + INNER.format(0), "middle_block.1" + INNER.format(0), "m1"),
        layer("up_blocks.0.attentions.0" + INNER.format(0), "output_blocks.0.1" + INNER.format(0), "o0"),
        layer("up_blocks.0.attentions.0" + INNER.format(1), "output_blocks.0.1" + INNER.format(1), "o0"),
    )
}


def shorts(names, attention=FFHQ):
    return [item.short for item in resolve_layers(names, attention)]


@pytest.mark.parametrize(
    "name, short",
    [
        ("i9", "i9"),
        ("input_blocks.9.1", "i9"),
        ("input9.1", "i9"),
        ("down_blocks.4.attentions.0", "i9"),
        ("down_blocks.4.attentions.0.transformer_blocks.0.attn1", "i9"),
        ("input_blocks.9.1.transformer_blocks.0.attn1", "i9"),
        ("m1", "m1"),
        ("middle.1", "m1"),
        ("middle_block.1", "m1"),
        ("output2.1", "o2"),
        ("o3", "o3"),
        (" o3 ", "o3"),
    ],
)
def test_spellings(name, short):
    assert shorts(name) == [short]


@pytest.mark.parametrize(
    "name",
    ["i8", "input8.1", "input_blocks.8.1", "input_blocks.8.1.transformer_blocks.0.attn1"]
    + ["down_blocks.2.attentions.1", "down_blocks.2.attentions.1.transformer_blocks.0.attn1"],
)
def test_stable_diffusion_spellings(name):
    assert shorts(name, SD) == ["i8"]


def test_lists_come_in_order_of_execution_and_once():
    assert shorts("o3, i9,m1") == ["i9", "m1", "o3"]
    assert shorts(["o2", "input_blocks.9.1", "i9"]) == ["i9", "o2"]


@pytest.mark.parametrize("name", ["i", "9", "down_blocks.4", "attentions.0", "i9x", "I9", "input_blocks.9", "i.*", "o"])
def test_parts_and_patterns_match_nothing(name):
    with pytest.raises(RestoreError, match=rf"no attention layer is called '{name.replace('*', '.')}'"):
        resolve_layers(name, FFHQ)


def test_an_unknown_name_lists_all_names_or_the_nearest():
    with pytest.raises(RestoreError) as error:
        resolve_layers("i9,input_blocks.8.1", FFHQ)
    message = str(error.value)
    assert "'input_blocks.8.1'" in message and "did you mean" in message and "input_blocks.9.1" in message
    assert all(f"{item.short} ({item.path})" in message for item in FFHQ.values())


@pytest.mark.parametrize("name", ["o0", "output_blocks.0.1", "up_blocks.0.attentions.0"])
def test_a_name_of_several_layers_is_an_error(name):
    with pytest.raises(RestoreError, match=r"names 2 attention layers.*blocks\.0\.attn1.*blocks\.1\.attn1"):
        resolve_layers(name, SD)
    assert len(resolve_layers("up_blocks.0.attentions.0.transformer_blocks.1.attn1", SD)) == 1


@pytest.mark.parametrize("names", ["", " , ", []])
def test_no_name_at_all(names):
    with pytest.raises(RestoreError, match="must name at least one"):
        resolve_layers(names, FFHQ)


@pytest.mark.parametrize("names", [[9], [None]])
def test_not_a_name(names):
    with pytest.raises(RestoreError, match="a name or a list of names"):
        resolve_layers(names, FFHQ)


def test_a_network_without_attention():
    with pytest.raises(RestoreError, match="no attention layers"):
        resolve_layers("m1", {})


@pytest.mark.parametrize(
    "text, heads",
    [
        ("i9:0,3", {"i9": (0, 3)}),
        ("i9:0,3,m1", {"i9": (0, 3), "m1": None}),
        ("i9:0,3,m1:2", {"i9": (0, 3), "m1": (2,)}),
        (" o3 , i9 : 7 , 1 ", {"i9": (1, 7), "o3": None}),
        (["m1:2,2", "input_blocks.9.1:0"], {"i9": (0,), "m1": (2,)}),
        ("i9:0,i9:3", {"i9": (0, 3)}),
        ("i9:0,i9", {"i9": None}),
        ("i9,i9:0", {"i9": None}),
    ],
)
def test_heads_behind_a_colon(text, heads):
    assert {item.short: chosen for item, chosen in choose_layers(text, None, FFHQ)} == heads
    assert shorts(text) == list(heads)


def test_heads_beside_the_layers():
    assert [chosen for _, chosen in choose_layers("i9,m1", [3, 0], FFHQ)] == [(0, 3)] * 2
    assert [chosen for _, chosen in choose_layers("i9,m1", {"m1": 5}, FFHQ)] == [None, (5,)]


@pytest.mark.parametrize(
    "text, heads, match",
    [
        ("i9:8", None, r"must be in 0\.\.7, got \[8\]"),
        ("i9:x", None, "i9:x"),
        ("i9:", None, "i9:"),
        ("i9:-1", None, "i9:-1"),
        ("i9,3", None, "no attention layer is called '3'"),
        ("i99:0", None, "no attention layer is called 'i99'"),
        (":0", None, "no attention layer is called ''"),
        ("i9:0", [1], "heads are given both"),
        ("i9", "0", "heads must be integers"),
        ("i9", {"m1": [0]}, "not among the perturbed layers"),
    ],
)
def test_bad_heads(text, heads, match):
    with pytest.raises(RestoreError, match=match):
        choose_layers(text, heads, FFHQ)
