"""The tree of modules: what is alike is put away, what is large is divided, and every node is in it once, in order."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from autodeploy.viz.tree import MAX_ITEMS, Group, build_tree, split_path


def tree_of(homes: Sequence[Sequence[str]], looks: Sequence[Hashable]) -> Group:
    return build_tree(dict(enumerate(homes)), dict(enumerate(looks)))


def nodes(group: Group) -> Iterator[int]:
    for item in group.items:
        yield from nodes(item) if isinstance(item, Group) else [item]


def groups(group: Group) -> Iterator[Group]:
    yield group
    for item in group.items:
        if isinstance(item, Group):
            yield from groups(item)


def labels(group: Group) -> list[str]:
    return [item.label if isinstance(item, Group) else str(item) for item in group.items]


def layers(number: int) -> list[tuple[str, ...]]:
    return [split_path(f"model.layers.{layer}.{part}") for layer in range(number) for part in ("attn", "attn", "mlp")]


def test_paths() -> None:
    assert split_path("") == ()
    assert split_path("model.layers.0.attn") == ("model", "layers.0", "attn")
    assert split_path("a.1.2.b3.c") == ("a.1.2", "b3", "c")
    assert len(split_path(".".join("abc" * 100))) == 25


def test_layers_that_are_alike_are_put_away_behind_the_first() -> None:
    tree = tree_of(layers(5), ["q", "k", "up"] * 5)
    (model,) = tree.items
    assert isinstance(model, Group)
    assert labels(model) == ["layers.0", "layers.1 … layers.4"]
    assert [group.alike for group in groups(model)] == [0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0]


def test_the_odd_layer_is_shown_alone() -> None:
    looks = ["q", "k", "up"] * 9
    looks[13] = "other"
    tree = tree_of(layers(9), looks)
    (model,) = tree.items
    assert isinstance(model, Group)
    assert labels(model) == ["layers.0", "layers.1 … layers.3", "layers.4", "layers.5", "layers.6 … layers.8"]


def test_a_module_of_one_node_is_no_group() -> None:
    assert labels(tree_of([("a",), ("b", "c"), ("d",), ("d",)], "wxyz")) == ["0", "1", "d"]
    assert labels(tree_of([("a", "b"), ("a", "b")], "xy")) == ["a.b"]


def test_much_of_the_same_is_divided() -> None:
    tree = tree_of([()] * 10_000, range(10_000))
    assert list(nodes(tree)) == list(range(10_000))
    assert max(len(group.items) for group in groups(tree)) <= MAX_ITEMS


def test_deep_names_need_no_deep_stack() -> None:
    assert list(nodes(tree_of([split_path(".".join("ab" * 5000))] * 2, "xy"))) == [0, 1]


HOMES = st.lists(st.lists(st.sampled_from(["a", "b", "layers.0", "layers.1", "layers.2", "layers.3"]), max_size=4))


@given(HOMES, st.randoms())
def test_every_node_is_there_once(homes: list[list[str]], random) -> None:
    tree = tree_of(homes, [random.choice("xy") for _ in homes])
    found = list(nodes(tree))
    assert sorted(found) == list(range(len(homes)))
    assert all(group.items for group in groups(tree) if group is not tree)
    if all(not home for home in homes):
        assert found == sorted(found)
