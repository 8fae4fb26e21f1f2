"""The page in a real browser: its script runs, nothing fails, and it fits a desk and a pocket."""

import re
import shutil
import subprocess

import pytest
from made import arm, make_race, make_study

from stretto.measure import report, sources

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")


@pytest.fixture
def page(store, full_race, tmp_path):
    return report.write(store, full_race, tmp_path / "page.html")


@pytest.fixture
def study_page(store, tmp_path):
    part = sources.study_part(store, make_study(store))
    return report.write_text(report.page([part]), tmp_path / "study.html")


def browse(page, width, *options):
    """What headless Chromium says; a window below 500 pixels is not to be had, so phones get a frame."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--disable-extensions",
    ]
    command += [
        f"--user-data-dir={page.parent / 'profile'}",
        f"--window-size={width},1000",
        "--timeout=20000",
    ]
    result = subprocess.run([*command, *options, page.as_uri()], capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode()


def root(dom):
    return dict(re.findall(r'data-(\w+)="([^"]*)"', re.search(r"<html[^>]*>", dom)[0]))


def test_the_script_runs_without_an_error_and_nothing_overflows_a_desk(page):
    dom = browse(page, 1280, "--dump-dom")
    assert root(dom) == {"ready": "true", "fits": "true"}
    assert len(re.findall("<figure", dom)) == 6 and dom.count("use the arrow keys") >= 2
    assert "alert('x')" not in re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL).replace(
        "&lt;script&gt;alert('x')&lt;/script&gt;", ""
    )


@pytest.mark.parametrize("which", ["page", "study_page"])
def test_it_fits_a_phone(request, which):
    page = request.getfixturevalue(which)
    frame = page.with_name("phone.html")
    frame.write_text(
        f"""<!doctype html><iframe width=375 height=800 src="{page.as_uri()}"></iframe><script>
        const frame = document.querySelector("iframe");
        addEventListener("message", event => Object.assign(document.documentElement.dataset, event.data));
        </script>"""
    )
    text = page.read_text()
    page.write_text(text.replace("</body>", "<script>parent.postMessage({...document.documentElement.dataset,"
                                            "width: innerWidth}, '*')</script></body>"))  # fmt: skip
    assert root(browse(frame, 800, "--virtual-time-budget=3000", "--dump-dom")) == {
        "ready": "true", "fits": "true", "width": "375",
    }  # fmt: skip


def test_a_study_is_whole_and_the_keyboard_reaches_every_part_that_moves(study_page):
    """What scrolls or is read out can be focused, has a name, and says nothing on the console."""
    probe = """<script>
        const parts = [...document.querySelectorAll(".scroll, svg")], names = new Set();
        let reached = 0;
        for (const part of parts) {
          part.focus();
          reached += document.activeElement === part;
          const by = part.getAttribute("aria-labelledby");
          names.add(part.getAttribute("aria-label") || document.getElementById(by).textContent);
        }
        const overlap = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1
          && b.top < a.bottom - 1;
        let overlaps = 0;
        for (const svg of document.querySelectorAll("svg")) {
          const boxes = [...svg.querySelectorAll("text")].map(text => text.getBoundingClientRect());
          boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => { overlaps += overlap(a, b); }));
        }
        Object.assign(document.documentElement.dataset,
          {parts: parts.length, reached, named: !names.has(""), overlaps});
    </script></body>"""
    study_page.write_text(study_page.read_text().replace("</body>", probe))
    found = root(browse(study_page, 1280, "--dump-dom"))
    assert found == {
        "ready": "true", "fits": "true", "parts": found["reached"], "reached": found["reached"], "named": "true",
        "overlaps": "0",
    }  # fmt: skip
    assert int(found["reached"]) >= 13


def test_a_study_prints(study_page):
    pdf = study_page.with_name("study.pdf")
    browse(study_page, 1280, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    assert pdf.read_bytes().startswith(b"%PDF") and pdf.stat().st_size > 50_000


def test_lines_can_be_walked_with_the_keyboard(page):
    probe = """<script>
        const svg = document.querySelector("[data-curves=time] svg"), said = [];
        for (const key of ["ArrowRight", "ArrowLeft", "ArrowDown", "Escape"]) {
          svg.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
          said.push(svg.parentElement.querySelector(".readout").textContent);
        }
        document.documentElement.dataset.said = said.join("/");
    </script></body>"""
    page.write_text(page.read_text().replace("</body>", probe))
    end, before, other, hint = root(browse(page, 1280, "--dump-dom"))["said"].split("/")
    assert end.startswith("baseline, seed 0: step ") and " s, loss " in end
    assert before.startswith("baseline, seed 0: step ") and before != end
    assert other.startswith("baseline, seed 1: step ") and "arrow keys" in hint


@pytest.mark.parametrize("which", ["page", "study_page"])
def test_it_is_drawn_in_light_and_dark(request, which):
    from matplotlib.image import imread

    page = request.getfixturevalue(which)
    shades = []
    for options in ((), ("--blink-settings=preferredColorScheme=0",)):
        picture = page.with_name("page.png")
        browse(page, 1280, f"--screenshot={picture}", *options)
        shades.append(imread(picture)[:, :, :3].mean())
    assert shades[0] > 0.8 and shades[1] < 0.3


@pytest.mark.slow
def test_a_page_of_five_hundred_runs_opens_in_two_seconds(store, tmp_path):
    arms = [
        arm(store, f"arm {i:02d}", range(10), rate=0.0035 + i / 1e4, cost=0.03, steps=2000) for i in range(50)
    ]
    race = store.save_race(make_race(arms, reference="arm 00"))
    page = report.write(store, race, tmp_path / "page.html")
    probe = "<script>document.documentElement.dataset.took = performance.now()</script></body>"
    page.write_text(page.read_text().replace("</body>", probe))
    assert min(float(root(browse(page, 1280, "--dump-dom"))["took"]) for _ in range(3)) < 2000
