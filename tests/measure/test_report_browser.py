"""The page in a real browser: its script runs, nothing fails, and it fits a desk and a pocket."""

import re
import shutil
import subprocess

import pytest

from stretto.measure import report

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")


@pytest.fixture
def page(store, full_race, tmp_path):
    return report.write(store, full_race, tmp_path / "page.html")


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
    assert len(re.findall("<figure", dom)) == 3 and dom.count("use the arrow keys") >= 2
    assert "alert('x')" not in re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL).replace(
        "&lt;script&gt;alert('x')&lt;/script&gt;", ""
    )


def test_it_fits_a_phone(page):
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


def test_it_is_drawn_in_light_and_dark(page):
    from matplotlib.image import imread

    shades = []
    for options in ((), ("--blink-settings=preferredColorScheme=0",)):
        picture = page.with_name("page.png")
        browse(page, 1280, f"--screenshot={picture}", *options)
        shades.append(imread(picture)[:, :, :3].mean())
    assert shades[0] > 0.8 and shades[1] < 0.3
