"""Which compositions to train: rows of methods absent (0) and present (1), and what each design can tell.

Box, Hunter & Hunter 2005; minimum aberration: Fries & Hunter 1980; screens: Plackett & Burman 1946.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np

Composition = tuple[str, ...]  # the methods that are present, in the design's order
Term = tuple[int, ...]  # methods multiplied: () the constant, (i,) a method, (i, j) a pair

ANSWERS = ("alone", "in company", "on average")
ROMAN = ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII", "XIII", "XIV", "XV")
KINDS = 6  # word length patterns kept at each level of the search: enough for every known optimum of k ≤ 11


@dataclass(frozen=True, eq=False)
class Design:
    """Compositions to run, each with every seed."""

    name: str
    methods: tuple[str, ...]
    rows: np.ndarray  # (runs, k) of 0 and 1
    words: tuple[Term, ...] = ()  # of a regular fraction's defining relation: columns of constant ±1 product
    dropped: tuple[Composition, ...] = ()  # what cannot run

    @property
    def resolution(self) -> int | None:
        """Length of the shortest word; none for designs that are not regular fractions."""
        return min(map(len, self.words), default=None)

    @property
    def has_baseline(self) -> bool:
        """Whether the composition of no method is run."""
        return bool((self.rows == 0).all(1).any())

    @property
    def has_full(self) -> bool:
        """Whether the composition of all methods is run."""
        return bool((self.rows == 1).all(1).any())

    def compositions(self) -> list[Composition]:
        """What is run, row by row."""
        return [present(self.methods, row) for row in self.rows]

    def where(self, allowed: Callable[[Composition], bool]) -> Design:
        """The design without the compositions that cannot run; see `estimable` for what it then tells."""
        able = np.array([allowed(composition) for composition in self.compositions()], dtype=bool)
        dropped = tuple(present(self.methods, row) for row in self.rows[~able])
        return replace(self, rows=self.rows[able], dropped=self.dropped + dropped)

    def with_ends(self) -> Design:
        """The design with the baseline and the full composition added, where it lacks them and they can run."""
        ends = [[end] * len(self.methods) for end in (0, 1) if not (self.rows == end).all(1).any()]
        ends = [row for row in ends if present(self.methods, row) not in self.dropped]
        rows = np.concatenate([self.rows, np.array(ends, dtype=int).reshape(-1, len(self.methods))])
        return replace(self, rows=rows, words=() if ends else self.words)

    def estimable(self) -> dict[str, list[str]]:
        """The methods of which each answer, and the pairs of which the interaction, can be had.

        Where every pair may interact: rank of the model matrix, no effect assumed away. Keys: ANSWERS and
        "pairs", whose entries read "a × b".
        """
        model = terms(len(self.methods))
        matrix = expand(self.rows, model)
        asked = {**contrasts(len(self.methods)), "pairs": np.eye(len(model))[len(self.methods) + 1 :]}
        names = {answer: list(self.methods) for answer in ANSWERS}
        names["pairs"] = [self.label(term) for term in model if len(term) == 2]
        return {
            answer: [name for name, able in zip(names[answer], solvable(matrix, wanted)) if able]
            for answer, wanted in asked.items()
        }

    def aliases(self) -> dict[str, dict[str, float]]:
        """What each average effect, and each pair, that is not estimable is mixed with: {"a": {"b × c": 1.0}}.

        The numbers are the share of the other's ±1 effect that enters (Box & Wilson's alias matrix): ±1 in
        regular fractions, ±1/3 and smaller in Plackett-Burman designs.
        """
        k, model = len(self.methods), terms(len(self.methods))
        columns = expand(2 * self.rows - 1, model).astype(float)
        mains, pairs = columns[:, : k + 1], columns[:, k + 1 :]
        bias = np.linalg.lstsq(mains, pairs, rcond=None)[0][1:]  # of pairs on average effects, (k, pairs)
        centred = pairs - pairs.mean(0)
        moments = centred.T @ centred
        spread = np.diag(moments)[:, None]
        among = np.divide(moments, spread, out=np.zeros_like(moments), where=spread > 1e-9)
        np.fill_diagonal(among, 0.0)
        shares = np.block([[np.zeros((k, k)), bias], [bias.T, among]])
        known = self.estimable()
        names = [self.label(term) for term in model[1:]]
        return {
            name: {other: float(share) for other, share in zip(names, row) if abs(share) > 1e-9}
            for name, row in zip(names, shares)
            if name not in known["on average"] and name not in known["pairs"]
        }

    def label(self, term: Term) -> str:
        """A term by the names of its methods: "mixup × sam"."""
        return " × ".join(self.methods[i] for i in term)

    def notes(self) -> list[str]:
        """What the design holds and tells, in sentences."""
        known, k = self.estimable(), len(self.methods)
        ends = (self.has_baseline, "the baseline"), (self.has_full, "the full composition")
        held = [f"{'with' if held else 'without'} {end}" for held, end in ends]
        found = [f"{self.name}: {len(self.rows)} of {2**k} compositions, {' and '.join(held)}"]
        if self.words:
            words = (" · ".join(self.methods[i] for i in word) for word in self.words)
            found.append(f"I = {' = '.join(words)}")
        if self.dropped:
            named = "; ".join(" + ".join(one) or "none" for one in self.dropped)
            found.append(f"left out, as they cannot run: {named}")
        found += [f"effects {answer}: {_told(known[answer], k)}" for answer in ANSWERS]
        found.append(f"interactions: {_told(known['pairs'], k * (k - 1) // 2)}")
        for name, others in self.aliases().items():
            if others and self.words:
                found.append(f"{name} is mixed with {', '.join(others)}")
            elif others and name in self.methods:
                most = max(map(abs, others.values()))
                found.append(f"{name} is mixed with {len(others)} interactions, each by {most:.2g} at most")
        return found


# ---- the model: constant, methods and pairs, on 0/1 columns


def terms(k: int) -> list[Term]:
    """The constant, the k methods, and their pairs, in this order."""
    return [(), *((i,) for i in range(k)), *combinations(range(k), 2)]


def expand(rows: np.ndarray, model: Sequence[Term]) -> np.ndarray:
    """The model matrix: rows (n, k) to products of their columns (n, terms)."""
    return np.stack([rows[:, list(term)].prod(1) for term in model], axis=1)


def contrasts(k: int) -> dict[str, np.ndarray]:
    """Each of ANSWERS as weights on the coefficients of 0/1 columns, (k, terms).

    A method's effect is β_i + Σ_j γ_ij s_j, where s_j says how much of the others is there: 0 alone, 1 in
    company of all, ½ on average over all companies.
    """
    model = terms(k)
    share = {"alone": 0.0, "in company": 1.0, "on average": 0.5}
    weights = np.array([[(i in term) * (len(term) == 1) for term in model] for i in range(k)], dtype=float)
    pairs = np.array([[(i in term) * (len(term) == 2) for term in model] for i in range(k)], dtype=float)
    return {answer: weights + share[answer] * pairs for answer in ANSWERS}


def present(methods: Sequence[str], row: Iterable[int]) -> Composition:
    """The names that a row of 0 and 1 holds."""
    return tuple(name for name, there in zip(methods, row) if there)


def solvable(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which rows of `wanted` (c, m) lie in the row space of `matrix` (n, m), hence can be estimated: (c,)."""
    projection = np.linalg.pinv(matrix.astype(float), rcond=1e-10) @ matrix
    return np.abs(wanted - wanted @ projection).max(1, initial=0.0) < 1e-8


# ---- the designs


def alone(methods: Sequence[str]) -> Design:
    """The baseline, and each method alone: k + 1 compositions."""
    k = len(methods)
    return _design("alone", methods, np.concatenate([np.zeros((1, k)), np.eye(k)]))


def leave_one_out(methods: Sequence[str]) -> Design:
    """The full composition, and each method left out of it: k + 1 compositions."""
    k = len(methods)
    return _design("leave-one-out", methods, np.concatenate([np.ones((1, k)), 1 - np.eye(k)]))


def factorial(methods: Sequence[str]) -> Design:
    """All 2^k compositions."""
    return _design("factorial", methods, np.array(list(product((0, 1), repeat=len(methods)))))


def fraction(methods: Sequence[str], p: int | None = None, resolution: int | None = None) -> Design:
    """A regular 2^(k−p) of minimum aberration, or the smallest whose words have `resolution` methods or more.

    Its full composition is always among the runs, the baseline where all words are even. Resolution III mixes
    methods with pairs, IV pairs with pairs, V neither. Takes up to a second for 15 methods.
    """
    k = len(methods)
    if (p is None) == (resolution is None):
        raise ValueError(f"a fraction wants one of p and resolution, not p={p} and resolution={resolution}")
    possible = [q for q in range(k - 1, 0, -1) if 2 ** (k - q) > k]
    if p is None:
        p = next((q for q in possible if _resolution(k, q) >= (resolution or 0)), None)
    if p not in possible:
        asked = f"p={p}" if resolution is None else f"resolution {resolution}"
        limit = f"p is at most {possible[0]}" if possible else f"{k} methods are too few"
        raise ValueError(f"no fraction of {k} methods has {asked} ({limit}); the factorial is {2**k} runs")
    generators = _generators(k, p)
    base = np.array(list(product((0, 1), repeat=k - p)))
    columns = [base, *(((2 * base - 1)[:, _bits(g)].prod(1, keepdims=True) + 1) // 2 for g in generators)]
    words = sorted((tuple(_bits(word)) for word in _group(generators, k - p)), key=lambda w: (len(w), w))
    name = f"2^({k}−{p}) of resolution {ROMAN[len(words[0])]}"
    return replace(_design(name, methods, np.concatenate(columns, axis=1)), words=tuple(words))


def screen(methods: Sequence[str], fold: bool = False) -> Design:
    """Plackett-Burman: k methods in the least N = 4m > k compositions for which there is a plain construction.

    Methods are clear of each other, and mixed with pairs; folded over (each row's opposite added, 2N) they
    are clear of pairs too. The baseline is among the runs; folded, the full composition is as well.
    """
    k = len(methods)
    size = next(n for n in range(4 * (k // 4 + 1), 8 * k + 8, 4) if _hadamard(n) is not None)
    matrix = _hadamard(size)
    assert matrix is not None
    matrix = matrix * -matrix[-1]  # so that the last row is the baseline
    rows = (matrix[:, 1 : k + 1] + 1) // 2
    rows = np.concatenate([rows, 1 - rows]) if fold else rows
    return _design(f"Plackett-Burman of {size}{', folded over' * fold}", methods, rows)


# ---- what they cost


def cost(design: Design, hours: Callable[[Composition], float], seeds: int = 1) -> float:
    """Hours of all runs, where `hours` says what one run of a composition takes."""
    return seeds * sum(map(hours, design.compositions()))


def require(design: Design, hours: Callable[[Composition], float], budget: float, seeds: int = 1) -> Design:
    """The design, if it fits into `budget` hours; else ValueError names the nearest smaller one that does."""
    spent = cost(design, hours, seeds)
    if spent <= budget:
        return design
    smaller = [one for one in _ladder(design.methods) if cost(one, hours, seeds) <= budget]
    text = f"{design.name} is {seeds * len(design.rows)} runs, {spent:.3g} h, over the budget of {budget:g} h"
    if not smaller:
        raise ValueError(
            f"{text}, and so are all of {len(design.methods)} methods; take fewer, or fewer seeds"
        )
    nearest = max(smaller, key=lambda one: cost(one, hours, seeds))
    runs, least = seeds * len(nearest.rows), cost(nearest, hours, seeds)
    raise ValueError(f"{text}; the nearest smaller is {nearest.name}, {runs} runs, {least:.3g} h")


def _ladder(methods: Sequence[str]) -> list[Design]:
    k = len(methods)
    fractions = [fraction(methods, p) for p in range(1, k) if 2 ** (k - p) > k]
    return [factorial(methods), *fractions, screen(methods), alone(methods)]


# ---- constructions


def _design(name: str, methods: Sequence[str], rows: np.ndarray) -> Design:
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(f"a design wants methods with names of their own, not {list(methods)}")
    return Design(name, tuple(methods), rows.astype(int))


def _generators(k: int, p: int) -> list[int]:
    """The p products of k − p base columns, as bit masks, whose word lengths are of minimum aberration.

    A search that adds a column at a time and keeps the best partial designs, one of each word length pattern.
    """
    base = k - p
    best: list[tuple[int, ...]] = [()]
    for _ in range(p):
        longer = {
            frozenset((*chosen, mask)): (*chosen, mask)
            for chosen in best
            for mask in range(3, 2**base)
            if mask.bit_count() > 1 and mask not in chosen
        }
        patterns = {_pattern(_group(chosen, base), k): chosen for chosen in longer.values()}
        best = [patterns[pattern] for pattern in sorted(patterns)[:KINDS]]
    return list(best[0])


def _group(generators: Sequence[int], base: int) -> list[int]:
    """The defining relation as bit masks: all products of the words that the generators make."""
    words: list[int] = []
    for place, mask in enumerate(generators):
        word = mask | 1 << (base + place)
        words += [word, *(word ^ other for other in words)]
    return words


def _pattern(words: Sequence[int], k: int) -> tuple[int, ...]:
    """How many words have 0, 1, … k methods: the less, in this order, the better."""
    lengths = [word.bit_count() for word in words]
    return tuple(lengths.count(length) for length in range(k + 1))


def _resolution(k: int, p: int) -> int:
    return min(word.bit_count() for word in _group(_generators(k, p), k - p))


def _hadamard(n: int) -> np.ndarray | None:
    """A Hadamard matrix (n, n) with first column 1, n = 4m, by Paley's construction (n − 1 prime) or by
    doubling; none where neither gives one: below 40, that is 28 and 36.
    """
    if all((n - 1) % d for d in range(2, int(n**0.5) + 1)):
        return _paley(n)
    half = _hadamard(n // 2) if n % 8 == 0 else None
    return None if half is None else np.block([[half, half], [half, -half]])


def _paley(n: int) -> np.ndarray:
    """Shifts of the quadratic residues of the prime n − 1, above a row of −1."""
    residues = {i * i % (n - 1) for i in range(1, n - 1)} | {0}
    first = [1 if i in residues else -1 for i in range(n - 1)]
    shifts = np.array([np.roll(first, shift) for shift in range(n - 1)])
    return np.block([[np.ones((n - 1, 1)), shifts], [1, -np.ones(n - 1)]])


def _bits(mask: int) -> list[int]:
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


def _told(names: Sequence[str], of: int) -> str:
    return "all" if len(names) == of else f"{len(names)} of {of} ({', '.join(names)})" if names else "none"
