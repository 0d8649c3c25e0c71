from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import chisquare

from space import Architecture, InputError, Layer, Space
from space.genome import (
    Genomes,
    canonical,
    contains,
    decode,
    encode,
    largest,
    pattern_counts,
    size,
    slot_classes,
    smallest,
)
from space.variation import crossover, mutate, repair, sample
from tests.contracts import TINY_SPACES, belongs, every_architecture, every_genome, every_row, tiny_space

SPACES = {name: tiny_space(**changes) for name, changes in TINY_SPACES.items()}
each_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)


@lru_cache(maxsize=1)
def wide_space() -> Space:
    """All features at once; too large to enumerate."""
    return tiny_space(
        mixer=["attention", "sliding", "linear", "retnet", "gated_deltanet", "none"],
        heads=[2, 4, 6],
        kv_heads=[1, 2],
        ffn=[0, 16, 64],
        window=[4, 16],
        width=[16, 32, 48],
        depth=[2, 3, 5, 8],
        ratios=["full", 1, 3, "linear"],
        max_linear_kinds=2,
    )


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def as_set(genomes: Genomes) -> set[tuple[int, ...]]:
    return {tuple(row) for row in genomes.tolist()}


# Counting and membership.


@each_space
def test_size_equals_number_of_architectures(space: Space) -> None:
    assert size(space) == len(every_architecture(space)) == len(every_genome(space))


def test_size_of_space_too_large_to_enumerate() -> None:
    """Three equal choices in each of 40 slots, all of them full."""
    space = tiny_space(
        mixer=["attention"], ratios=["full"], heads=[1], ffn=[0, 16, 32], depth=[40], width=[16]
    )
    assert size(space) == 3**40


@each_space
def test_contains_exactly_canonical_genomes(space: Space) -> None:
    rows = every_row(space)
    members = as_set(every_genome(space))
    expected = [tuple(row) in members for row in rows.tolist()]
    np.testing.assert_array_equal(contains(space, rows), expected)


@each_space
def test_contains_agrees_with_definition(space: Space) -> None:
    """A row's architecture is in the space if and only if the canonical row is contained."""
    rows = every_row(space)[:: max(1, len(every_row(space)) // 1500)]
    expected = [belongs(space, architecture) for architecture in decode(space, rows)]
    np.testing.assert_array_equal(contains(space, canonical(space, rows)), expected)


@each_space
def test_genes_out_of_range_are_not_contained(space: Space) -> None:
    genome = every_genome(space)[-1:]
    top = every_row(space)[-1]
    for gene in range(genome.shape[1]):
        for value in (-1, -(2**15), int(top[gene]) + 1, 2**15 - 1):
            spoilt = genome.copy()
            spoilt[0, gene] = value
            assert not contains(space, spoilt)[0]
        wide = genome.astype(np.int64)
        wide[0, gene] += 2**16  # the same gene once cut to 16 bits
        assert not contains(space, wide)[0]


@each_space
def test_canonical_genome_is_first_of_its_architecture(space: Space) -> None:
    rows = every_row(space)
    once = canonical(space, rows)
    assert decode(space, once) == decode(space, rows)
    np.testing.assert_array_equal(canonical(space, once), once)
    assert len(as_set(once)) == len(set(decode(space, rows)))
    assert (once <= rows).all()


# Genomes and architectures.


def test_genome_of_architecture() -> None:
    space = tiny_space(
        mixer=["attention", "none", "sliding"], window=[4, 8], heads=[2, 4], kv_heads=[1, 2], depth=[4]
    )
    architecture = Architecture(
        32,
        (
            Layer(mixer="sliding", heads=4, kv_heads=2, window=8, ffn=16),
            Layer(),
            Layer(ffn=16),
            Layer(mixer="attention", heads=2, kv_heads=2),
        ),
    )
    genome = [[1, 3, 3, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0]]
    assert encode(space, [architecture]).tolist() == genome
    assert decode(space, np.array(genome, np.int16)) == [architecture]


@each_space
def test_encode_and_decode_are_inverse(space: Space) -> None:
    genomes = every_genome(space)
    architectures = decode(space, genomes)
    assert set(architectures) == every_architecture(space)
    np.testing.assert_array_equal(encode(space, architectures), genomes)
    assert encode(space, architectures).dtype == np.int16
    assert encode(space, []).shape == (0, genomes.shape[1])


@pytest.mark.parametrize(
    ("width", "layer", "fragments"),
    [
        (48, Layer(), ["width", "48", "16, 32"]),
        (16, Layer(mixer="retnet", heads=1, kv_heads=1), ["layers[1]", "retnet", "linear"]),
        (16, Layer(mixer="linear", heads=3, kv_heads=3), ["layers[1]", "(3, 3)", "(1, 1), (2, 2)"]),
        (16, Layer(mixer="linear", heads=2, kv_heads=1), ["layers[1]", "(2, 1)", "(1, 1), (2, 2)"]),
        (16, Layer(mixer="linear", heads=0, kv_heads=0), ["layers[1]", "(0, 0)", "(1, 1), (2, 2)"]),
        (16, Layer(heads=1, kv_heads=1), ["layers[1]", "(1, 1)"]),
        (16, Layer(kv_heads=1), ["layers[1]", "(0, 1)"]),
        (16, Layer(ffn=48), ["layers[1].ffn", "48", "0, 16"]),
        (16, Layer(mixer="attention", heads=1, kv_heads=1, window=4), ["layers[1]", "('attention', 4)"]),
    ],
)
def test_encoding_unlisted_value_is_error(width: int, layer: Layer, fragments: list[str]) -> None:
    good = Layer(mixer="attention", heads=1, kv_heads=1)
    architecture = Architecture(width, (good, layer))
    with pytest.raises(InputError) as caught:
        encode(tiny_space(), [Architecture(16, (good, good)), architecture])
    for fragment in [architecture.key, "tiny", *fragments]:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("count", [1, 3])
def test_encoding_other_number_of_layers_is_error(count: int) -> None:
    layers = (Layer(mixer="attention", heads=1, kv_heads=1),) * count
    with pytest.raises(InputError, match=f"{count} layers, the space has 2"):
        encode(tiny_space(), [Architecture(16, layers)])


# Sampling.


@each_space
def test_samples_are_contained_and_reach_every_architecture(space: Space) -> None:
    rng, everyone = generator(), as_set(every_genome(space))
    reached: set[tuple[int, ...]] = set()
    for _ in range(12):  # the rarest member of these spaces comes once in 10,000 draws
        genomes = sample(space, rng, 20_000)
        assert contains(space, genomes).all()
        reached |= as_set(genomes)
        if len(reached) >= len(everyone):
            break
    assert reached == everyone


def test_samples_of_wide_space_are_contained() -> None:
    space = wide_space()
    genomes = sample(space, generator(), 3000)
    assert contains(space, genomes).all()
    assert all(belongs(space, architecture) for architecture in decode(space, genomes[:150]))
    assert sample(space, generator(), 0).shape == (0, genomes.shape[1])


def test_depths_and_ratios_are_uniform() -> None:
    """Depths are uniform although there are more architectures of 7 layers than of 4."""
    space = tiny_space(depth=[4, 5, 7], ratios=["full", 1, 3, "linear"])
    genomes = sample(space, generator(), 12_000)
    drawn = Counter((a.depth, a.pattern.count("attention")) for a in decode(space, genomes))
    expected = {4: (4, 2, 1, 0), 5: (5, 3, 2, 0), 7: (7, 4, 2, 0)}
    cells = [(depth, full) for depth, counts in expected.items() for full in counts]
    assert set(drawn) == set(cells)
    assert chisquare([drawn[cell] for cell in cells]).pvalue > 1e-3


def test_depths_are_uniform_with_ffn_only_layers() -> None:
    space = wide_space()
    drawn = Counter(architecture.depth for architecture in decode(space, sample(space, generator(), 8000)))
    assert set(drawn) == set(space.depth)
    assert chisquare(list(drawn.values())).pvalue > 1e-3


def test_slots_and_sizes_are_uniform() -> None:
    """A layer kept among empty ones has an FFN as often as not."""
    space = tiny_space(depth=[2, 4], ratios=[1], heads=[1, 2, 3])
    architectures = decode(space, sample(space, generator(), 12_000))
    shallow = [a for a in architectures if a.depth == 2]
    layers = [layer for a in architectures for layer in a.layers if layer.present]
    for number, drawn in (
        (12, Counter(tuple(layer.mixer for layer in a.layers) for a in shallow)),
        (2, Counter(a.width for a in architectures)),
        (3, Counter(layer.heads for layer in layers)),
        (2, Counter(layer.ffn for layer in layers)),
    ):
        assert len(drawn) == number
        assert chisquare(list(drawn.values())).pvalue > 1e-3


def test_equal_seeds_give_equal_genomes() -> None:
    space = wide_space()
    runs = []
    for seed in (1, 1, 2):
        rng = generator(seed)
        genomes = sample(space, rng, 50)
        mutated = mutate(space, genomes, rng)
        runs.append(np.concatenate([genomes, mutated, crossover(space, genomes, mutated, rng)]))
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()


# Repair, mutation, crossover.


@each_space
def test_repaired_rows_are_contained(space: Space) -> None:
    rows = every_row(space)
    repaired = repair(space, rows, generator())
    assert contains(space, repaired).all()
    np.testing.assert_array_equal(repaired[:, 0], rows[:, 0])


@pytest.mark.parametrize("space", [*SPACES.values(), wide_space()], ids=[*SPACES, "wide"])
@given(data=st.data())
@settings(max_examples=12, derandomize=True, deadline=None)
def test_repaired_integers_are_contained(space: Space, data: st.DataObject) -> None:
    genes = 1 + 3 * space.slots
    kind = data.draw(st.sampled_from([np.int16, np.int64, np.int8, np.uint8]))
    rows = data.draw(arrays(kind, st.tuples(st.integers(0, 6), st.just(genes))))
    repaired = repair(space, rows, generator(data.draw(st.integers(0, 5))))
    assert repaired.shape == rows.shape
    assert repaired.dtype == np.int16
    assert contains(space, repaired).all()


@each_space
def test_repair_keeps_contained_genomes(space: Space) -> None:
    genomes = every_genome(space)
    np.testing.assert_array_equal(repair(space, genomes, generator()), genomes)


def test_repair_keeps_contained_genomes_of_wide_space() -> None:
    genomes = sample(wide_space(), generator(), 2000)
    np.testing.assert_array_equal(repair(wide_space(), genomes, generator(1)), genomes)


@each_space
def test_repair_changes_fewest_slots(space: Space) -> None:
    rows = every_row(space)[:: max(1, len(every_row(space)) // 500)]
    classes = slot_classes(space, rows)
    members = np.unique(slot_classes(space, every_genome(space)), axis=0)
    fewest = (classes[:, None] != members).sum(axis=2).min(axis=1)
    for seed in range(3):
        changed = slot_classes(space, repair(space, rows, generator(seed))) != classes
        np.testing.assert_array_equal(changed.sum(axis=1), fewest)


def test_repair_draws_uniformly() -> None:
    space = tiny_space(
        mixer=["linear", "retnet", "sliding"], window=[8], ratios=["linear"], depth=[1], ffn=[16, 32]
    )
    repaired = decode(space, repair(space, np.zeros((3000, 4), np.int16), generator()))
    layers = [architecture.layers[0] for architecture in repaired]
    for field, number in (("mixer", 3), ("heads", 2), ("ffn", 2)):
        drawn = Counter(getattr(layer, field) for layer in layers)
        assert len(drawn) == number
        assert chisquare(list(drawn.values())).pvalue > 1e-3


@each_space
def test_mutants_are_contained_and_parents_unchanged(space: Space) -> None:
    parents = sample(space, generator(), 400)
    before = parents.copy()
    for rate in (None, 0.0, 1.0):
        assert contains(space, mutate(space, parents, generator(1), rate)).all()
        np.testing.assert_array_equal(parents, before)
    assert mutate(space, parents[:0], generator()).shape == (0, parents.shape[1])


@each_space
def test_mutation_reaches_every_architecture(space: Space) -> None:
    everyone = as_set(every_genome(space))
    rng = generator()
    found = every_genome(space)[:1]
    for _ in range(60):
        crowd = found[rng.integers(0, len(found), 2000)]
        found = np.unique(np.concatenate([found, mutate(space, crowd, rng)]), axis=0)
        if len(found) == len(everyone):
            break
    assert as_set(found) == everyone


def test_mutation_changes_some_genes() -> None:
    space = wide_space()
    parents = sample(space, generator(), 4000)
    changed = parents != mutate(space, parents, generator(1))
    assert 0.6 < changed.any(axis=1).mean() < 1
    assert changed.mean() < 0.35
    assert changed.any(axis=0).all()


def test_some_mutants_change_depth() -> None:
    space = wide_space()
    parents = sample(space, generator(), 4000)
    before, after = (
        np.array([a.depth for a in decode(space, rows)])
        for rows in (parents, mutate(space, parents, generator(1), 0.0))
    )
    assert 0.08 < (before != after).mean() < 0.16  # a sixth of the rows, and 3 of 4 depths are others


def test_some_mutants_move_a_full_layer() -> None:
    """With no gene redrawn and fixed depth and ratio, two mixers are exchanged and FFNs stay."""
    space = tiny_space(
        mixer=["attention", "linear"], ratios=[2], heads=[1], ffn=[0, 16, 32], width=[16], depth=[6]
    )
    parents = sample(space, generator(), 3000)
    children = mutate(space, parents, generator(1), 0.0)
    moved = (parents[:, 1::3] != children[:, 1::3]).sum(axis=1)
    alone = (parents[:, 3::3] == children[:, 3::3]).all(axis=1) & (moved > 0)
    assert set(moved[alone]) == {2}
    assert 0.1 < alone.mean() < 0.35


def test_some_mutants_exchange_two_slots() -> None:
    """With independent slots and no gene redrawn, only the exchange changes a genome."""
    space = tiny_space(mixer=["attention"], ratios=["full"], heads=[1, 2, 3, 4], ffn=[0, 16, 32], depth=[5])
    parents = sample(space, generator(), 3000)
    mutants = decode(space, mutate(space, parents, generator(1), 0.0))
    swapped = 0
    for parent, mutant in zip(decode(space, parents), mutants, strict=True):
        places = [i for i in range(5) if parent.layers[i] != mutant.layers[i]]
        assert len(places) in (0, 2)
        assert Counter(parent.layers) == Counter(mutant.layers)
        assert parent.width == mutant.width
        swapped += len(places) == 2
    assert 0.09 < swapped / 3000 < 0.16


@each_space
def test_children_of_equal_parents_equal_them(space: Space) -> None:
    parents = every_genome(space)
    np.testing.assert_array_equal(crossover(space, parents, parents, generator()), parents)


@each_space
def test_children_are_contained(space: Space) -> None:
    first, second = sample(space, generator(0), 1000), sample(space, generator(1), 1000)
    before = first.copy(), second.copy()
    assert contains(space, crossover(space, first, second, generator(2))).all()
    np.testing.assert_array_equal((first, second), before)
    assert crossover(space, first[:0], second[:0], generator()).shape == (0, first.shape[1])


def test_children_take_slots_from_either_parent() -> None:
    """In a space with independent slots, nothing needs repair."""
    space = tiny_space(
        mixer=["attention"],
        ratios=["full"],
        heads=[1, 2, 3, 4],
        ffn=[0, 16, 32, 48],
        depth=[5],
        width=[16, 32, 48],
    )
    first, second = sample(space, generator(0), 2000), sample(space, generator(1), 2000)
    children = crossover(space, first, second, generator(2))
    from_first = 0
    differ = 0
    for a, b, child in zip(*(decode(space, rows) for rows in (first, second, children)), strict=True):
        pairs: list[tuple[Any, Any, Any]] = [(a.width, b.width, child.width)]
        pairs += zip(a.layers, b.layers, child.layers, strict=True)
        assert all(mine in (one, other) for one, other, mine in pairs)
        differ += sum(one != other for one, other, _ in pairs)
        from_first += sum(one != other and mine == one for one, other, mine in pairs)
    assert chisquare([from_first, differ - from_first]).pvalue > 1e-3


# The ends of a space.


@each_space
def test_largest_and_smallest_are_extreme_on_every_axis(space: Space) -> None:
    members = every_architecture(space)
    big, small = largest(space), smallest(space)
    assert big in members
    assert small in members
    assert (big.width, big.depth) == (max(space.width), max(a.depth for a in members))
    assert (small.width, small.depth) == (min(space.width), min(a.depth for a in members))

    def attention(architecture: Architecture) -> int:
        return architecture.pattern.count("attention")

    def mixers(architecture: Architecture) -> int:
        return sum(mixer != "none" for mixer in architecture.pattern)

    deep = [a for a in members if a.depth == big.depth]
    shallow = [a for a in members if a.depth == small.depth]
    assert attention(big) == max(map(attention, deep))
    assert mixers(big) == max(map(mixers, deep))
    assert attention(small) == min(map(attention, shallow))
    assert mixers(small) == min(mixers(a) for a in shallow if attention(a) == attention(small))
    heads = sorted(space.head_options)
    for end, architecture in ((-1, big), (0, small)):
        for layer in architecture.layers:
            if layer.mixer != "none":
                assert (layer.heads, layer.kv_heads) == heads[end]
    ffn = space.layer.ffn
    assert {layer.ffn for layer in big.layers if layer.present} == {ffn[-1]}
    least = {True: ffn[0], False: next(f for f in ffn if f)} if any(ffn) else {True: 0}
    assert all(layer.ffn == least[layer.mixer != "none"] for layer in small.layers if layer.present)


def test_largest_and_smallest_of_wide_space() -> None:
    space = wide_space()
    big, small = largest(space), smallest(space)
    assert belongs(space, big)
    assert belongs(space, small)
    assert big.pattern == ("attention",) * 8
    assert small.depth == 2
    assert "attention" not in small.pattern


def test_any_mixture_is_drawn_with_every_number_of_full_layers() -> None:
    """Uniformly, so that hybrids with few or many full layers are as likely as the middle."""
    space = tiny_space(ratios=["any"], depth=[4], ffn=[16])
    drawn = sample(space, generator(), 5000)
    full = pattern_counts(slot_classes(space, drawn))[:, 1]
    shares = np.bincount(full, minlength=5) / len(drawn)
    assert np.abs(shares - 0.2).max() < 0.03  # five standard deviations
