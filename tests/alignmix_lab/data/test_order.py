import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.data.distributed_sampler import RepeatAugSampler

from alignmix_lab.data.order import (
    REPEAT,
    balanced,
    eval_shard,
    numbered,
    quasi_shuffled,
    repeated,
    shuffled,
    train_batches,
    train_shard,
)

counts = st.integers(1, 200)
ranks = st.integers(1, 5)


@given(counts, ranks)
def test_evaluation_counts_every_sample_once(count, world_size):
    shards = [eval_shard(count, rank, world_size).tolist() for rank in range(world_size)]
    assert sum(shards, []) == list(range(count))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(counts, st.integers(1, 7), ranks, st.booleans())
def test_training_uses_a_sample_at_most_once_and_ranks_get_as_many(count, batch_size, world_size, contiguous):
    if count < batch_size * world_size:
        return
    order = shuffled(count, seed=3, epoch=1)
    shards = [train_shard(order, batch_size, rank, world_size, contiguous) for rank in range(world_size)]
    used = np.concatenate(shards)
    assert {len(shard) for shard in shards} == {train_batches(count, batch_size, world_size) * batch_size}
    assert len(set(used.tolist())) == len(used)
    assert count - len(used) < batch_size * world_size


def test_global_batches_do_not_depend_on_the_number_of_ranks():
    order = shuffled(60, seed=0, epoch=0)
    for world_size, batch_size in ((1, 12), (2, 6), (3, 4)):
        shards = [train_shard(order, batch_size, rank, world_size) for rank in range(world_size)]
        for step in range(5):
            together = [shard[step * batch_size:(step + 1) * batch_size] for shard in shards]
            assert sorted(np.concatenate(together).tolist()) == sorted(order[step * 12:(step + 1) * 12].tolist())


def test_orders_differ_between_seeds_and_epochs_and_repeat():
    orders = {(seed, epoch): tuple(shuffled(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9  # FFCV adds the two: seed 0 epoch 1 would be seed 1 epoch 0
    assert orders[1, 2] == tuple(shuffled(50, 1, 2))


def test_quasi_random_order_keeps_few_pages_in_use():
    pages = np.repeat(np.arange(40), 25)
    order = quasi_shuffled(pages, seed=0, epoch=0, window=5)
    assert sorted(order) == list(range(1000))
    visited = pages[order]
    in_use = [
        len(set(visited[:place]) & set(visited[place:])) for place in range(0, 1000, 50)
    ]
    assert 3 <= max(in_use) <= 7
    assert len(set(visited[400:425])) >= 4  # mixed, not one page after another
    assert not np.array_equal(order, quasi_shuffled(pages, seed=0, epoch=1, window=5))


def test_too_few_samples_say_what_fits():
    with pytest.raises(ValueError, match='10 samples, not enough for one batch of 4 on each of 3 .*--batch-size 3'):
        train_batches(10, 4, 3)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=120), st.integers(0, 3), st.integers(0, 3))
def test_balanced_classes_and_their_samples_come_equally_often(labels, seed, epoch):
    labels = np.array(labels)
    order = balanced(labels, seed, epoch)
    assert len(order) == len(labels)
    np.testing.assert_array_equal(order, balanced(labels, seed, epoch))
    classes = np.unique(labels)
    for stop in range(len(order) + 1):  # wherever full batches end
        counts = [(labels[order[:stop]] == label).sum() for label in classes]
        assert max(counts) - min(counts) <= 1
    for label in classes:
        used = np.bincount(order[labels[order] == label], minlength=len(labels))[labels == label]
        assert used.max() - used.min() <= 1


def test_balanced_orders_are_random():
    labels = np.repeat([0, 1, 2], [80, 15, 5])
    orders = [tuple(balanced(labels, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    firsts = np.bincount([labels[balanced(labels, seed, 0)[0]] for seed in range(600)], minlength=3)
    assert (abs(firsts - 200) < 5 * np.sqrt(600 * 2 / 9)).all()  # five standard deviations


@pytest.mark.parametrize('repeats', [2, 3, 1.5, 2.5])
@pytest.mark.parametrize('count, world_size', [(300, 1), (301, 2), (97, 4)])
def test_repeats_are_those_of_timms_sampler(repeats, count, world_size):
    """On timm's own permutation, rank by rank."""
    permutation = torch.randperm(count, generator=torch.Generator().manual_seed(7)).numpy()
    for rank in range(world_size):
        sampler = RepeatAugSampler(range(count), world_size, rank, num_repeats=repeats, selected_round=0)
        sampler.set_epoch(7)
        ours = train_shard(repeated(permutation, repeats), 5, rank, world_size)
        assert len(sampler) - len(ours) <= 5
        assert ours.tolist() == list(sampler)[:len(ours)]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60))
def test_numbers_are_unique_and_count_the_copies(order):
    numbers = numbered(np.array(order)).tolist()
    assert [number % REPEAT for number in numbers] == order
    assert [number // REPEAT for number in numbers] == [
        order[:place].count(sample) for place, sample in enumerate(order)]


def test_512_ranks_share_an_epoch_of_imagenet_without_overlap_or_loss():
    ranks, batch_size, count = 512, 16, 1_281_167
    order = shuffled(count, seed=3, epoch=7)
    for contiguous in (False, True):
        shards = np.stack([train_shard(order, batch_size, rank, ranks, contiguous) for rank in range(ranks)])
        used = np.sort(shards, axis=None)
        assert (np.diff(used) > 0).all() and count - used.size < ranks * batch_size
    evaluated = np.concatenate([eval_shard(50_000, rank, ranks) for rank in range(ranks)])
    assert (np.sort(evaluated) == np.arange(50_000)).all()
