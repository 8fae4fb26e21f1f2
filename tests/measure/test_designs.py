"""Designs equal pyDOE3's, their words and aliases are what the rows say, and what is lost is said."""

from itertools import combinations, product

import numpy as np
import pyDOE3
import pytest

from stretto.measure.designs import (
    ANSWERS,
    alone,
    contrasts,
    cost,
    expand,
    factorial,
    fraction,
    leave_one_out,
    require,
    screen,
    terms,
)

NAMES = "abcdefghijklmnopqrs"

# words of length 3, 4, … of minimum aberration: Chen, Sun & Wu 1993, tables of 8 to 64 runs; 128 runs, k = 11
PATTERNS = {
    (3, 1): (1,), (4, 1): (0, 1), (5, 1): (0, 0, 1), (5, 2): (2, 1), (6, 1): (0, 0, 0, 1), (6, 2): (0, 3),
    (6, 3): (4, 3), (7, 2): (0, 1, 2), (7, 3): (0, 7), (7, 4): (7, 7, 0, 0, 1), (8, 2): (0, 0, 2, 1),
    (8, 3): (0, 3, 4), (8, 4): (0, 14, 0, 0, 0, 1), (9, 2): (0, 0, 0, 3), (9, 3): (0, 1, 4, 2),
    (9, 4): (0, 6, 8, 0, 0, 1), (9, 5): (4, 14, 8, 0, 4, 1), (10, 4): (0, 2, 8, 4, 0, 1),
    (10, 5): (0, 10, 16, 0, 0, 5), (10, 6): (8, 18, 16, 8, 8, 5), (11, 4): (0, 0, 6, 6, 2, 1),
    (11, 6): (0, 25, 0, 27, 0, 10, 0, 1), (11, 7): (12, 26, 28, 24, 20, 13, 4),
}  # fmt: skip


def ordered(rows):
    return sorted(map(tuple, np.asarray(rows, dtype=int).tolist()))


def generators(design):
    """The columns as pyDOE3 writes them, from the design's words: "a b c ab"."""
    k, base = len(design.methods), int(np.log2(len(design.rows)))
    made = {word[-1]: word[:-1] for word in design.words if sum(i >= base for i in word) == 1}
    return " ".join("".join(NAMES[j] for j in made.get(i, (i,))) for i in range(k))


@pytest.mark.parametrize(("k", "p"), PATTERNS)
def test_fractions_have_the_published_words_and_pydoe3s_rows(k, p):
    design = fraction(NAMES[:k], p)
    lengths = [len(word) for word in design.words]
    pattern = tuple(lengths.count(length) for length in range(3, max(lengths) + 1))
    assert pattern == PATTERNS[k, p]
    assert ordered(2 * design.rows - 1) == ordered(pyDOE3.fracfact(generators(design)))
    constant = [w for n in range(1, k + 1) for w in combinations(range(k), n) if _constant(design, w)]
    assert constant == list(design.words)


def _constant(design, word):
    return abs((2 * design.rows[:, word] - 1).prod(1).sum()) == len(design.rows)


@pytest.mark.parametrize("resolution", [3, 4])
def test_a_resolution_takes_no_more_runs_than_pydoe3s(resolution):
    for k in range(resolution + 1, 12):
        design = fraction(NAMES[:k], resolution=resolution)
        assert design.resolution is not None and design.resolution >= resolution
        assert len(design.rows) <= len(pyDOE3.fracfact_by_res(k, resolution))


@pytest.mark.parametrize(("k", "runs"), [(5, 16), (6, 32), (7, 64), (8, 64), (9, 128), (10, 128), (11, 128)])
def test_resolution_five_tells_everything(k, runs):
    design = fraction(NAMES[:k], resolution=5)
    assert len(design.rows) == runs
    told = design.estimable()
    assert (
        all(told[answer] == list(NAMES[:k]) for answer in ANSWERS) and len(told["pairs"]) == k * (k - 1) // 2
    )
    assert design.aliases() == {}


@pytest.mark.parametrize(("k", "p"), [(5, 2), (6, 2), (7, 3), (7, 4), (9, 5)])
def test_aliases_are_pydoe3s(k, p):
    design = fraction(NAMES[:k], p)
    chains = [set(chain.split(" = ")) for chain in pyDOE3.fracfact_aliasing(2 * design.rows - 1)[0]]
    expected = {}
    for chain in chains:
        short = {" × ".join(term) for term in chain if len(term) <= 2 and term.isalpha()}
        for term in short:
            if others := short - {term}:
                expected[term] = others
    found = {name: set(others) for name, others in design.aliases().items() if others}
    assert found == expected
    assert {round(share, 9) for others in design.aliases().values() for share in others.values()} == {1.0}


def test_the_factorial_is_pydoe3s():
    assert ordered(2 * factorial("abcd").rows - 1) == ordered(pyDOE3.ff2n(4))


@pytest.mark.parametrize("n", [12, 20])
def test_screens_are_pydoe3s_up_to_the_order_of_rows_columns_and_signs(n):
    ours = 2 * screen(NAMES[: n - 1]).rows - 1
    theirs = pyDOE3.pbdesign(n - 1)
    places = np.arange(n - 1)
    orders = [(a * places + b) % (n - 1) for a in range(1, n - 1) for b in range(n - 1)]
    assert any(ordered(sign * theirs[:, order]) == ordered(ours) for order in orders for sign in (1, -1))


@pytest.mark.parametrize("k", [3, 7, 15])
def test_screens_of_powers_of_two_mix_as_pydoe3s_do(k):
    """Sums of products of three columns, which orders and signs leave alone, tell classes of these apart."""

    def sums(rows):
        return sorted(abs(rows[:, three].prod(1).sum()) for three in combinations(range(k), 3))

    assert sums(2 * screen(NAMES[:k]).rows - 1) == sums(pyDOE3.pbdesign(k))


@pytest.mark.parametrize("k", range(1, 24))
def test_screens_are_orthogonal_with_the_baseline(k):
    design = screen([f"m{i}" for i in range(k)])
    columns = np.column_stack([np.ones(len(design.rows)), 2 * design.rows - 1])
    assert (columns.T @ columns == len(design.rows) * np.eye(k + 1)).all()
    assert len(design.rows) == 4 * (k // 4 + 1) and design.has_baseline


def test_a_screen_mixes_by_thirds_and_folded_over_not_at_all():
    mixed = screen(NAMES[:11]).aliases()
    assert set(mixed["a"]) == {f"{x} × {y}" for x, y in combinations(NAMES[1:11], 2)}
    assert {round(abs(share), 9) for share in mixed["a"].values()} == {round(1 / 3, 9)}
    folded = screen(NAMES[:11], fold=True)
    assert len(folded.rows) == 24 and folded.has_baseline and folded.has_full
    assert folded.estimable()["on average"] == list(NAMES[:11])
    assert not any(name in NAMES for name in folded.aliases())


def test_one_at_a_time_designs_answer_one_question_each():
    told = alone("abc").estimable()
    assert told == {"alone": ["a", "b", "c"], "in company": [], "on average": [], "pairs": []}
    told = leave_one_out("abc").estimable()
    assert told == {"alone": [], "in company": ["a", "b", "c"], "on average": [], "pairs": []}
    assert alone("ab").compositions() == [(), ("a",), ("b",)]
    assert leave_one_out("ab").compositions() == [("a", "b"), ("b",), ("a",)]


def test_the_three_answers_by_hand():
    """β = −.20 each and γ = .08: −.20 alone, −.12 in company, −.16 on average."""
    coefficients = [5.0, -0.20, -0.20, 0.08]
    answers = {answer: weights @ coefficients for answer, weights in contrasts(2).items()}
    assert {
        answer: pytest.approx([value] * 2) for answer, value in zip(ANSWERS, (-0.2, -0.12, -0.16))
    } == answers
    surface = expand(np.array(list(product((0, 1), repeat=2))), terms(2)) @ coefficients
    assert surface == pytest.approx([5.0, 4.8, 4.8, 4.68])


def test_ends_are_told_and_added():
    even, odd = fraction("abcd", 1), fraction("abcde", 1)
    assert (even.has_baseline, even.has_full) == (True, True)
    assert (odd.has_baseline, odd.has_full) == (False, True)
    assert "16 of 32 compositions, without the baseline and with the full composition" in odd.notes()[0]
    assert odd.with_ends().has_baseline and len(odd.with_ends().rows) == 17
    assert len(even.with_ends().rows) == 8 and even.with_ends().words == even.words


def test_what_cannot_run_is_left_out_and_what_it_costs_is_said():
    def allowed(composition):
        return not {"a", "b"} <= set(composition)

    design = factorial("abc").where(allowed)
    assert design.dropped == (("a", "b"), ("a", "b", "c")) and len(design.rows) == 6
    assert design.estimable() == {
        "alone": ["a", "b", "c"], "in company": ["c"], "on average": ["c"], "pairs": ["a × c", "b × c"],
    }  # fmt: skip
    assert design.aliases()["a × b"] and "left out, as they cannot run: a + b; a + b + c" in design.notes()
    assert len(design.with_ends().rows) == 6  # the full composition cannot run
    told = fraction("abcde", 1).where(allowed).estimable()
    assert len(told["pairs"]) < 9  # a fraction has no runs to spare


def test_costs_and_budgets():
    design = factorial("abc")
    assert cost(design, lambda composition: 1 + len(composition), seeds=2) == 2 * (8 + 12)
    assert require(design, lambda composition: 0.5, budget=8, seeds=2) is design
    with pytest.raises(
        ValueError,
        match=r"factorial is 16 runs, 8 h, over the budget of 5 h; the nearest smaller is .* 8 runs, 4 h",
    ):
        require(design, lambda composition: 0.5, budget=5, seeds=2)
    with pytest.raises(ValueError, match="and so are all of 3 methods; take fewer"):
        require(design, lambda composition: 0.5, budget=1)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"p": 3}, r"no fraction of 5 methods has p=3 \(p is at most 2\); the factorial is 32 runs"),
        ({"resolution": 6}, "no fraction of 5 methods has resolution 6"),
        ({}, "one of p and resolution"),
    ],
)
def test_fractions_that_are_none_are_refused_with_a_way_out(asked, message):
    with pytest.raises(ValueError, match=message):
        fraction("abcde", **asked)


def test_methods_need_names_of_their_own():
    with pytest.raises(ValueError, match="names of their own"):
        alone(["sam", "sam"])
