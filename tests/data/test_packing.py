"""Packing plans: every token placed once, no row overfull, cuts only where allowed, pure functions of their input."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_rows import pieces_of

from minimind_jax.data.packing import Order, plan_best_fit, plan_concat, plan_pad, split_at_turns

lengths_lists = st.lists(st.integers(1, 70), min_size=1, max_size=60)


def placed_tokens(plan, lengths):
    """How often each token of each document is in a row; also checks the rows' bounds."""
    counts = [np.zeros(n, int) for n in lengths]
    for row in range(plan.rows):
        pieces = pieces_of(plan, row)
        assert pieces, "an empty row"
        assert sum(stop - start for _, start, stop in pieces) <= plan.seq_len
        for document, start, stop in pieces:
            assert 0 <= start < stop <= lengths[document]
            counts[document][start:stop] += 1
    return counts


def turn_table(lengths, every):
    return [np.arange(0, n, every) for n in lengths]


@given(lengths_lists, st.integers(4, 32), st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_concat_places_every_token_once_and_fills_all_rows_but_the_last(lengths, seq_len, seed, epoch, shuffle):
    plan = plan_concat(np.array(lengths), seq_len, Order(seed, epoch, shuffle))
    assert all((count == 1).all() for count in placed_tokens(plan, lengths))
    assert plan.rows == -(-sum(lengths) // seq_len)
    filled = [sum(stop - start for _, start, stop in pieces_of(plan, row)) for row in range(plan.rows)]
    assert filled[:-1] == [seq_len] * (plan.rows - 1)


@given(lengths_lists, st.integers(4, 32))
def test_concat_keeps_the_pieces_of_a_document_in_order(lengths, seq_len):
    plan = plan_concat(np.array(lengths), seq_len, Order(1, 0))
    reached = [0] * len(lengths)
    for row in range(plan.rows):
        for document, start, stop in pieces_of(plan, row):
            assert start == reached[document]
            reached[document] = stop
    assert reached == lengths


def test_concat_without_shuffling_is_the_documents_in_order():
    plan = plan_concat(np.array([3, 6, 2]), 4, Order(0, 0, shuffle=False))
    assert [pieces_of(plan, row) for row in range(3)] == [[(0, 0, 3), (1, 0, 1)], [(1, 1, 5)], [(1, 5, 6), (2, 0, 2)]]
    assert plan.cut_documents == 1


@given(lengths_lists, st.integers(4, 32), st.integers(1, 40), st.integers(0, 3))
def test_best_fit_places_every_token_once_and_cuts_only_at_turns(lengths, seq_len, every, epoch):
    turns = turn_table(lengths, every)
    plan = plan_best_fit(np.array(lengths), turns.__getitem__, seq_len, Order(7, epoch))
    assert all((count == 1).all() for count in placed_tokens(plan, lengths))
    inside = 0
    for document, start in zip(plan.documents.tolist(), plan.starts.tolist(), strict=True):
        if lengths[document] <= seq_len:
            assert start == 0, "a document that fits was cut"
        inside += start not in turns[document]
    assert inside == plan.cut_turns
    if every <= seq_len:
        assert plan.cut_turns == 0
    assert plan.cut_documents == sum(n > seq_len for n in lengths)


def naive_best_fit_decreasing(lengths, seq_len):
    """Textbook best fit: the row with the least room that is enough."""
    room = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in range(len(room)) if room[r] >= length]
        if fitting:
            room[min(fitting, key=room.__getitem__)] -= length
        else:
            room.append(seq_len - length)
    return sorted(room)


@settings(max_examples=200)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=120))
def test_best_fit_is_the_textbook_algorithm(lengths):
    seq_len = 24
    plan = plan_best_fit(np.array(lengths), lambda d: np.zeros(1, int), seq_len, Order(0, 0))
    room = sorted(seq_len - sum(stop - start for _, start, stop in pieces_of(plan, r)) for r in range(plan.rows))
    assert room == naive_best_fit_decreasing(lengths, seq_len)


@given(st.integers(1, 500), st.sets(st.integers(1, 499)), st.integers(4, 64))
def test_split_at_turns_takes_the_latest_turn_that_fits(length, turns, seq_len):
    turns = np.array([0, *sorted(t for t in turns if t < length)])
    bounds, cut_turns = split_at_turns(length, turns, seq_len)
    assert bounds[0] == 0 and bounds[-1] == length
    inside = 0
    for start, stop in itertools.pairwise(bounds):
        candidates = [t for t in [*turns.tolist(), length] if start < t <= start + seq_len]
        assert stop == (max(candidates) if candidates else start + seq_len)
        inside += not candidates
    assert inside == cut_turns


@given(lengths_lists, st.integers(4, 32))
def test_pad_is_the_beginning_of_each_document(lengths, seq_len):
    plan = plan_pad(np.array(lengths), seq_len)
    assert [pieces_of(plan, row) for row in range(plan.rows)] == [
        [(d, 0, min(n, seq_len))] for d, n in enumerate(lengths)
    ]
    assert plan.dropped_tokens == sum(max(0, n - seq_len) for n in lengths)
    assert plan.tokens + plan.dropped_tokens == sum(lengths)


@pytest.mark.parametrize("make", ["concat", "best_fit"])
def test_plans_depend_on_seed_and_epoch_and_nothing_else(make):
    lengths = np.random.default_rng(0).integers(2, 40, 300)

    def pieces(seed, epoch):
        if make == "concat":
            plan = plan_concat(lengths, 64, Order(seed, epoch))
        else:
            plan = plan_best_fit(lengths, lambda d: np.zeros(1, int), 64, Order(seed, epoch))
        return [pieces_of(plan, row) for row in range(plan.rows)]

    assert pieces(3, 5) == pieces(3, 5)
    assert pieces(3, 5) != pieces(3, 6)
    assert pieces(3, 5) != pieces(4, 5)
    assert len(pieces(3, 5)) == len(pieces(4, 6))  # the number of steps is known before training


def test_best_fit_wastes_little_and_is_fast_on_many_documents():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.3, 0.8, 200_000).astype(int), 2, 1024)
    plan = plan_best_fit(lengths, lambda d: np.zeros(1, int), 1024, Order(0, 0))
    assert plan.efficiency > 0.99
    assert plan.tokens == lengths.sum()


def test_no_documents_give_no_rows():
    none = np.zeros(0, int)
    assert plan_concat(none, 8, Order(0, 0)).rows == 0
    assert plan_best_fit(none, lambda d: none, 8, Order(0, 0)).rows == 0
    assert plan_pad(none, 8).rows == 0
