"""Sequence length warm-up: which lengths, when, and what becomes of rows."""

import pytest
import torch

from stretto.core import At, Batch
from stretto.methods import SequenceLengthWarmup
from stretto.methods.sequence_length_warmup import lengths, split_rows


def _at(fraction):
    return At(0, 100, 0, done=round(100 * fraction), planned=100, batch=1)


def _batch(t=16, n=3):
    tokens = torch.arange(n * t).view(n, t)
    return Batch(tokens, tokens + 1, torch.arange(n), 10 + torch.arange(n))


@pytest.mark.parametrize(
    "full, start, reshape, expected",
    [
        (128, 0.25, True, [32, 64, 128]),
        (1024, 1 / 64, True, [16, 64, 256, 1024]),  # 4 of the 7 divisors
        (12, 0.25, True, [3, 4, 6, 12]),
        (7, 0.25, True, [7]),
        (128, 0.25, False, [32, 64, 96, 128]),
        (3, 0.25, False, [1, 2, 3]),
    ],
)
def test_lengths(full, start, reshape, expected):
    assert lengths(full, start, reshape) == expected


@pytest.mark.parametrize("reshape", [True, False])
def test_at_most_four_lengths_that_rise_to_the_full_one(reshape):
    for full in (8, 60, 96, 128, 360, 1000):
        method = SequenceLengthWarmup(start=0.1, over=0.5, reshape=reshape)
        seen = [method.batch(_batch(full, 1), _at(i / 100)).inputs.shape[1] for i in range(100)]
        assert seen == sorted(seen) and len(set(seen)) <= 4 and seen[50:] == [full] * 50
        assert seen[0] <= max(1, round(0.1 * full)) * 2


def test_each_short_length_lasts_equally():
    method = SequenceLengthWarmup(start=0.25, over=0.4)
    seen = [method.batch(_batch(128, 1), _at(i / 100)).inputs.shape[1] for i in range(100)]
    assert [seen.count(length) for length in (32, 64, 128)] == [20, 20, 60]


def test_pieces_keep_order_targets_and_rows():
    batch = SequenceLengthWarmup(start=0.5).batch(_batch(), _at(0))
    assert batch.inputs.shape == (6, 8) and torch.equal(batch.inputs.flatten(), torch.arange(48))
    assert torch.equal(batch.targets, batch.inputs + 1)
    assert batch.rows.tolist() == [0, 0, 1, 1, 2, 2] and batch.index.tolist() == [10, 10, 11, 11, 12, 12]


def test_truncation_keeps_beginnings_and_labels():
    given = Batch(_batch().inputs, torch.tensor([1, 2, 3]), torch.arange(3), None)
    batch = SequenceLengthWarmup(start=0.25, reshape=False).batch(given, _at(0))
    assert torch.equal(batch.inputs, given.inputs[:, :4])
    assert batch.targets.tolist() == [1, 2, 3] and batch.rows.tolist() == [0, 1, 2]


def test_mappings_and_features():
    inputs = {"input_ids": torch.arange(32).view(2, 16), "features": torch.randn(2, 16, 3)}
    batch = SequenceLengthWarmup(start=0.5).batch(Batch(inputs, inputs["input_ids"], torch.arange(2)), _at(0))
    assert batch.inputs["input_ids"].shape == (4, 8) and batch.inputs["features"].shape == (4, 8, 3)
    assert torch.equal(batch.inputs["features"], split_rows(inputs["features"], 8)) and batch.index is None


@pytest.mark.parametrize(
    "inputs, targets, reason",
    [
        (torch.randn(2, 3, 8, 8), torch.zeros(2), "looks for tokens"),
        (torch.zeros(2, 16), torch.zeros(2, 16), "looks for tokens"),
        (torch.zeros(4, dtype=torch.long), torch.zeros(4), "looks for tokens"),
        (torch.zeros(2, 13, dtype=torch.long), torch.zeros(2, 13), "finds no length"),
        (torch.zeros(2, 16, dtype=torch.long), torch.zeros(2), "try reshape=False"),
        (torch.zeros(2, 16, dtype=torch.long), torch.zeros(2, 9), "cannot change a tensor of shape"),
    ],
)
def test_what_has_no_sequences_is_refused(inputs, targets, reason):
    with pytest.raises(ValueError, match=reason):
        SequenceLengthWarmup().batch(Batch(inputs, targets, torch.arange(len(inputs))), _at(0))


@pytest.mark.parametrize("start", [0.0, 1.0, -1.0])
def test_start_is_a_share_of_the_length(start):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        SequenceLengthWarmup(start=start)
