"""The catalogue: names, short forms, JSON, cards, and hashes that must not move."""

import ast
import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stretto import methods
from stretto.core import Recipe
from stretto.methods import (
    CATALOGUE,
    EMA,
    AdamW,
    Cosine,
    Either,
    MixUp,
    Muon,
    NGramEmbeddings,
    QKNorm,
    SequenceLengthWarmup,
    Shampoo,
    WarmupStableDecay,
    _cards,
    _pages,
    parse,
)
from stretto.methods._pages import Line

FOLDER = Path(methods.__file__).parent

# -- names


def test_every_file_is_in_the_catalogue():
    files = {path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_")}
    assert files == set(CATALOGUE)
    assert all(name == method.name for name, method in CATALOGUE.items())
    assert all(getattr(methods, method.__name__) is method for method in CATALOGUE.values())


@pytest.mark.parametrize("name", ["qk_norm", "QKNorm", "qk-norm", "qknorm", " QK_NORM ", "QK-Norm"])
def test_names_are_found_however_they_are_written(name):
    assert methods.find(name) is QKNorm


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_class_names_are_found(name):
    assert methods.find(CATALOGUE[name].__name__) is methods.find(name) is CATALOGUE[name]


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match=r"there is no method 'mixpu'; did you mean mixup"):
        methods.find("mixpu")
    with pytest.raises(ValueError, match="there is no method 'zzzzz'; known: adamw, "):
        methods.find("zzzzz")


# -- short forms


@pytest.mark.parametrize(
    "text, recipe",
    [
        ("", Recipe()),
        ("mixup", Recipe(MixUp())),
        (
            "mixup:alpha=0.4, muon:lr=0.02:weight_decay=0.1",
            Recipe(MixUp(0.4), Muon(lr=0.02, weight_decay=0.1)),
        ),
        (" MixUp : alpha = 0.4 ,AdamW: betas = (0.8, 0.9) ", Recipe(MixUp(0.4), AdamW(betas=(0.8, 0.9)))),
        ("cosine:warmup=500 steps", Recipe(Cosine(warmup="500 steps"))),
        ("cosine:warmup=500steps", Recipe(Cosine(warmup="500 steps"))),
        ("cosine:warmup=5e-1epochs", Recipe(Cosine(warmup="5e-1 epochs"))),
        ("ema:half_life='2e9 tokens':every=3", Recipe(EMA("2e9 tokens", 3))),
        ("ngram_embeddings:orders=(2,)", Recipe(NGramEmbeddings(orders=(2,)))),
        ("ngram_embeddings:orders=[2, 3]", Recipe(NGramEmbeddings(orders=(2, 3)))),
        ("shampoo:graft=None:power=0.5", Recipe(Shampoo(graft=None, power=0.5))),
        ("sequence_length_warmup:reshape=false", Recipe(SequenceLengthWarmup(reshape=False))),
        ("mixup, muon,", Recipe(MixUp(), Muon())),
        ("either:first=(mixup:alpha=0.4):second=mixup", Recipe(Either(MixUp(0.4), MixUp()))),
        (
            "either:first=(either:first=(mixup:alpha=1.0):second=mixup):second=(mixup:alpha=3):share=0.25",
            Recipe(Either(Either(MixUp(1.0), MixUp()), MixUp(3.0), 0.25)),
        ),
    ],
)
def test_short_forms(text, recipe):
    assert parse(text) == recipe
    assert parse(text).hash == recipe.hash
    assert parse(str(recipe)) == recipe and parse(str(recipe)).hash == recipe.hash


@pytest.mark.parametrize(
    "text, message",
    [
        ("mixpu", "did you mean mixup"),
        ("mixup:alhpa=1", "mixup has no field 'alhpa'; did you mean alpha?"),
        ("mixup:alpha=much", "mixup: alpha is 'much'; it takes float"),
        ("mixup:alpha=True", "mixup: alpha is True; it takes float"),
        ("muon:iterations=5.0", "muon: iterations is 5.0; it takes int"),
        ("muon:iterations=True", "muon: iterations is True; it takes int"),
        ("adamw:betas=(0.9,)", "adamw: betas is (0.9,); it takes tuple[float, float]"),
        ("adamw:betas=0.9", "adamw: betas is 0.9; it takes tuple[float, float]"),
        ("ngram_embeddings:orders=(2,3.0)", "it takes tuple[int, ...]"),
        ("sgd:nesterov=1", "sgd: nesterov is 1; it takes bool"),
        ("cosine:warmup=(1,)", "cosine: warmup is (1,); it takes a duration"),
        ("cosine:warmup=5 minutes", "'5 minutes' is no duration"),
        ("shampoo:graft=adm", "shampoo: graft is 'adm'; it takes Literal['auto', 'adam', "),
        ("soap:every=0", "SOAP: every is 0; it must be 1 or more"),
        ("hyperball, cautious_weight_decay", "CautiousWeightDecay both want wrap/decay"),
        ("either:first=3:second=mixup", "either: first is 3; it takes Method"),
        ("either:first=mixpu:second=mixup", "did you mean mixup"),
        ("either:first=mixup", "either needs second"),
        ("mixup:0.4", "mixup: '0.4' names no field; write alpha=0.4"),
        ("mixup:alpha=1:alpha=2", "mixup: alpha is given twice"),
        (
            "muon:lr=0.02,momentum=0.9",
            "'momentum=0.9' is no method; a field follows its method after a colon",
        ),
        ("adamw:betas=(0.9,0.95", "do not match"),
        ("adamw:betas=0.9)", "do not match"),
        ("mixup:alpha=-1", "MixUp: alpha is -1.0; it must be above 0"),
        ("mixup, mixup", "MixUp is listed twice"),
        ("adamw, muon", "AdamW and Muon both want optimizer/update"),
    ],
)
def test_what_cannot_be_read_says_why(text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse(text)
    assert "\n" not in str(error.value)


def test_no_code_is_evaluated():
    for text in ("mixup:alpha=__import__('os')", "mixup:alpha=1+1", "mixup:alpha=[x for x in ()]"):
        with pytest.raises(ValueError, match="it takes float"):
            parse(text)


# -- JSON


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(Muon(), WarmupStableDecay(warmup="10 steps"), NGramEmbeddings(orders=(2, 5)), EMA("3 epochs")),
        Recipe(Either(MixUp(0.4), MixUp()), AdamW(betas=(0.5, 0.6), eps=1e-12)),
    ],
    ids=lambda recipe: recipe.hash,
)
def test_json_comes_back(recipe):
    read = methods.from_json(json.loads(json.dumps(recipe.to_json())))
    assert read == recipe and read.hash == recipe.hash
    assert hash(read) == hash(recipe)


def test_json_may_leave_fields_out():
    assert methods.from_json({"methods": [{"method": "muon", "lr": 1}]}) == Recipe(Muon(lr=1.0))


@pytest.mark.parametrize(
    "data, message",
    [
        ([], 'a recipe in JSON is {"methods": '),
        ({"method": "mixup"}, 'a recipe in JSON is {"methods": '),
        ({"methods": ["mixup"]}, 'a method in JSON is {"method": '),
        ({"methods": [{"method": "mixpu"}]}, "did you mean mixup"),
        ({"methods": [{"method": "mixup", "alfa": 1.0}]}, "mixup has no field 'alfa'; did you mean alpha?"),
        ({"methods": [{"method": "mixup", "alpha": "0.4"}]}, "mixup: alpha is '0.4'; it takes float"),
        ({"methods": [{"method": "mixup", "alpha": None}]}, "mixup: alpha is None; it takes float"),
        ({"methods": [{"method": "adamw", "betas": [0.9]}]}, "it takes tuple[float, float]"),
    ],
)
def test_json_that_cannot_be_read_says_why(data, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        methods.from_json(data)


# -- hashes


GOLDEN = {
    "adamw": "25365adf97f9",
    "muon:lr=0.02, warmup_stable_decay, rotary_positions, qk_norm, ngram_embeddings": "ef6fc62365e1",
    "shampoo:direction=kl:power=0.5": "6c102697c5c0",
    "soap:then=orthogonalize, hyperball": "4fbc3bea5d5a",
    "soap, update_floor, cautious_weight_decay": "d26e82405fd5",
    "either:first=(mixup:alpha=0.4):second=mixup, sgd, ema:half_life=100 steps": "436a28a580ad",
}


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_hashes(text):
    """Stored runs are found by these: a change here orphans them, and needs a word in the log."""
    assert parse(text).hash == GOLDEN[text]


def test_whole_numbers_and_lists_hash_as_what_they_equal():
    """AdamW(lr=1) == AdamW(lr=1.0), so one hash; else the same recipe would be paid for twice."""
    assert Recipe(AdamW(lr=1)) == Recipe(AdamW(lr=1.0)) == parse("adamw:lr=1")
    assert Recipe(AdamW(lr=1)).hash == Recipe(AdamW(lr=1.0)).hash == parse("adamw:lr=1").hash


# -- cards, listing and page


SELF_EVIDENT = {"lr", "momentum", "nesterov", "betas", "eps", "weight_decay", "iterations"}


def _raises(method):
    """Whether its file raises, or calls what checks fields."""
    nodes = list(ast.walk(ast.parse(Path(sys.modules[method.__module__].__file__).read_text())))
    calls = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    return any(isinstance(node, ast.Raise) for node in nodes) or any(
        name.startswith("check") for name in calls
    )


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_every_method_has_a_whole_card(name):
    method = CATALOGUE[name]
    assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen
    card = _cards.card(method)
    assert re.search(r"\b(19|20)\d\d\b", card.source), "a citation has a year"
    assert card.idea, "the module docstring says the idea, then the source"
    assert card.summary.endswith(".") and len(card.summary) < 140, "the first sentence says what it does"
    assert card.cost and card.evidence, "lines that begin with 'Cost:' and 'Evidence:'"
    if _raises(method):
        assert re.match(r"(Value|Type|Runtime)Error ", card.raises), (
            "a line that begins with 'Raises ...Error'"
        )
    for part in (card.more, card.cost, card.evidence):
        assert "Raises " not in part, "'Raises' begins a line of its own"
    for field in card.fields:
        assert field.comment or field.name in SELF_EVIDENT, f"{field.name} wants a comment: unit, meaning"


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_every_card_is_printed_whole(name):
    card, text = _cards.card(CATALOGUE[name]), methods.card(name)
    for part in (card.title, card.source, card.summary, card.cost, card.evidence, card.raises):
        assert part in text
    for field in card.fields:
        assert re.search(rf"^{field.name} +{re.escape(field.type)}", text, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_the_examples_of_cards_are_read(name):
    text = _pages.example(_cards.card(CATALOGUE[name]))
    if "..." not in text:
        assert parse(text) == Recipe(CATALOGUE[name]())


MADE = '''
"""Made: a method, e.g. for a test.

Doe et al. 2019, arXiv:1234.56789; Roe and Poe 2020.
"""

from dataclasses import dataclass

from stretto.core import AverageMethod, FactorsMethod, Phase


@dataclass(frozen=True)
class Base(AverageMethod):
    half: "float"  # share of the run
    phases = (Phase.AVERAGE, Phase.GROUP)


@dataclass(frozen=True)
class Made(Base, FactorsMethod):
    """Does one thing (Doe et al. Table 2 has it).

    And a second.
    It ends.
    Cost: a pass, more
    or less.
    Evidence: 2x (Doe et al.). Not seen since.
    Raises ValueError for what does not fit.
    """

    betas: "tuple[float, float]" = (0.9, 0.95)
    long: "float" = (
        1.0  # told on a line of its own
    )
    shade: "str" = "#fff"
'''


def test_a_card_is_read_from_docstrings_and_comments(tmp_path, monkeypatch):
    (tmp_path / "made_for_a_card.py").write_text(MADE)
    monkeypatch.syspath_prepend(tmp_path)
    card = _cards.card(importlib.import_module("made_for_a_card").Made)
    monkeypatch.delitem(sys.modules, "made_for_a_card")
    assert card.idea == "Made: a method, e.g. for a test." and card.slot == "average"
    assert card.source == "Doe et al. 2019, arXiv:1234.56789; Roe and Poe 2020"
    assert (
        card.summary == "Does one thing (Doe et al. Table 2 has it)."
        and card.more == "And a second. It ends."
    )
    assert card.cost == "a pass, more or less." and card.evidence == "2x (Doe et al.). Not seen since."
    assert card.raises == "ValueError for what does not fit."
    assert card.places == "factors/group average/average"
    assert card.fields == (
        ("half", "float", "", "share of the run"),
        ("betas", "tuple[float, float]", "(0.9, 0.95)", ""),
        ("long", "float", "1.0", "told on a line of its own"),
        ("shade", "str", "'#fff'", ""),
    )
    assert _pages.example(card) == "made:half=..."


def test_methods_stand_under_the_slot_where_they_run_first_and_factors_only_accompany():
    slot = {card.name: card.slot for card in methods.cards()}
    assert slot["mixup"] == "batch" and slot["muon"] == slot["adamw"] == "optimizer"
    assert slot["value_embeddings"] == "model" and slot["zero_init_residual"] == "start"


def test_the_listing_has_every_method_once_with_source_cost_and_evidence():
    rows = [head + text for head, text, _ in _pages.render(_pages.listing(methods.cards(), _cards.slots()))]
    for card in methods.cards():
        first = next(i for i, row in enumerate(rows) if row.split()[:1] == [card.name])
        assert [row.split() for row in rows[first : first + 4]] == [
            [card.name, *card.summary.split()],
            [card.places.split()[0], *card.source.split()],
            ["cost", *card.cost.split()],
            ["evidence", *card.evidence.split()],
        ]
    headings = [row.split()[0] for row in rows if row and not row.startswith(" ")]
    assert headings == [slot for slot in _cards.slots() if any(c.slot == slot for c in methods.cards())]


@pytest.mark.parametrize("width", [72, 80, 100, 140])
def test_pages_fit_their_width_and_lose_no_word(width):
    lines = [*_pages.listing(methods.cards(), _cards.slots())]
    for card in methods.cards():
        lines += _pages.page(card)
    rows = [head + text for head, text, _ in _pages.render(lines, width)]
    assert max(map(len, rows)) <= width
    words = " ".join(f"{line.head} {line.text}" for line in lines).split()
    assert " ".join(rows).split() == words


def test_a_head_wider_than_its_column_has_its_text_below():
    rows = list(_pages.render([Line("a" * 30, "text", "name"), Line("b", "more text", "name")], 40))
    assert rows == [("a" * 30, "", "name"), (" " * 20, "text", "name"), ("b".ljust(20), "more text", "name")]


def test_the_page_of_the_docs_is_up_to_date():
    page = (FOLDER.parents[1] / "docs" / "methods.md").read_text()
    now = _pages.markdown(methods.cards(), _cards.slots())
    assert page == now, "print it anew: stretto methods --markdown > docs/methods.md"


def test_the_page_links_sources_and_files():
    page = _pages.markdown(methods.cards(), _cards.slots())
    assert "[arXiv:1710.09412](https://arxiv.org/abs/1710.09412)" in page
    assert "[docs/LOG.md](LOG.md)" in page and "](../records/2026-11-21-stdlib-gpt)" in page
    docs = FOLDER.parents[1] / "docs"
    for link in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (docs / link).exists(), link
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) == set(re.findall(r"^###? (.*)$", page, re.MULTILINE))


def test_importing_the_catalogue_is_cheap():
    """scipy takes a third of a second, and only MixUp's table wants it."""
    code = (
        "import sys, torch; before = set(sys.modules); import stretto.methods; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(*sorted(new & {'scipy', 'matplotlib', 'rich', 'tyro'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
