"""Open the report and the live page in a real browser, at a desk's and at a phone's width, and click through them.

    pip install gradio playwright; apt-get install chromium       # playwright needs no browser of its own
    python scripts/browser.py --out /tmp/shots                    # trains, opens, clicks, checks; look at the pictures then

Fails on any console error and on any request to another host."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{7*7}}"      # a run's name, a caption and a prompt
WIDTHS = {"desk": 1280, "phone": 390}
PATIENCE = 600_000      # milliseconds: the machine may be busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where the pictures go")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        runs = trained(Path(place))
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        both = Path(place) / "both.html"
        finetune(Path(place), "report", *runs, "--out", both.name)
        for name, width in WIDTHS.items():
            with watched(browser, width) as page:
                look_at_report(page, both, out / f"report-{name}.png")
        with served(Path(place)) as address:
            refuses(address)
            for name, width in WIDTHS.items():
                with watched(browser, width) as page:
                    look_at_runs(page, address, out / f"ui-runs-{name}.png")
                    try_adapters(page, out / f"ui-try-{name}.png")
                    start_and_stop(page, name, out / f"ui-train-{name}.png")
        browser.close()
    print(f"no console error, no other host, nothing wider than the screen; now look at {out}")


def finetune(place: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "finetune", *map(str, words)], cwd=place, check=True, stdout=subprocess.DEVNULL)


def trained(place: Path) -> list[Path]:
    """Two short runs on pictures with a hostile name and caption, one of the runs with a hostile name itself."""
    pictures = place / "pictures"
    pictures.mkdir()
    rows = []
    for i, file in enumerate(sorted((ROOT / "datasets" / "style").glob("*.png"))[:6]):
        name = f"{i}<b onclick=alert(3)>.png"
        shutil.copy(file, pictures / name)
        rows.append(json.dumps({"file_name": name, "text": HOSTILE}) + "\n")
    (pictures / "metadata.jsonl").write_text("".join(rows))
    (place / "small.yaml").write_text(f"""
base: {{family: sd1, path: tiny}}
data: {{images: pictures, resolution: 32, caption: {{long: truncate}}}}
method: {{kind: lora, rank: 2}}
train: {{max_steps: 6, batch_size: 2, learning_rate: 1e-2}}
every: {{log: 1, preview: 2, checkpoint: 2}}
preview: {{prompts: ["a red star", "{HOSTILE}"], steps: 2}}
""")
    runs = ["runs/plain", "runs/<img src=x onerror=alert(4)>"]
    for run, rate in zip(runs, ("1e-2", "3e-2")):
        finetune(place, "train", "small.yaml", "--run", run, "--set", f"train.learning_rate={rate}")
    return runs


@contextmanager
def watched(browser, width: int):
    """A page whose errors and requests to others end this script, as does anything wider than the screen."""
    context = browser.new_context(viewport={"width": width, "height": 844}, device_scale_factor=1)
    context.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page, wrong = context.new_page(), []
    page.on("console", lambda said: wrong.append(f"console: {said.text}") if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: None if re.match(r"(data|blob|file|about):|http://127\.0\.0\.1:", request.url)
            else wrong.append(f"request: {request.url}"))
    yield page
    context.close()
    if wrong:
        sys.exit("\n".join(dict.fromkeys(wrong)))


def shot(page: Page, file: Path) -> None:
    page.wait_for_timeout(1000)
    page.screenshot(path=file, full_page=True)
    wide, screen = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide <= screen, f"{file.name}: the page is {wide} pixels wide, the screen {screen}"


def look_at_report(page: Page, file: Path, picture: Path) -> None:
    page.goto(file.as_uri())
    expect(page.locator("#step")).to_have_text("6")
    page.locator("#slider").press("ArrowLeft")
    expect(page.locator("#step")).to_have_text("4")
    assert page.locator(".previews img.now").evaluate_all("all => all.map(image => image.dataset.step)") == ["4", "4"]
    expect(page.locator("table").first).to_contain_text("train.learning_rate")
    shot(page, picture)


def look_at_runs(page: Page, address: str, picture: Path) -> None:
    page.goto(address)
    expect(page.locator(".finetune table").first).to_contain_text("finished")
    expect(page.locator(".finetune svg").first).to_be_visible()
    slider = page.get_by_role("slider", name=re.compile("Previews"))
    before = page.get_by_alt_text("preview").first.get_attribute("src")
    slider.fill("2")
    slider.dispatch_event("input")
    expect(page.get_by_role("heading", name="step 2")).to_be_visible()
    assert page.get_by_alt_text("preview").first.get_attribute("src") != before
    choose(page, "Look at", "runs/<img src=x onerror=alert(4)>")
    expect(page.get_by_text("What differs")).to_be_visible()
    expect(page.get_by_alt_text("preview")).to_have_count(2)
    shot(page, picture)
    page.get_by_role("button", name="Report").click()
    inside = page.frame_locator("iframe.report")
    expect(inside.locator("#step")).to_have_text("6")
    inside.locator("#slider").press("ArrowLeft")
    expect(inside.locator("#step")).to_have_text("4")


def try_adapters(page: Page, picture: Path) -> None:
    page.get_by_role("tab", name="Try").click()
    page.get_by_role("button", name="Sample").click()
    expect(page.get_by_text("no base is chosen")).to_be_visible()
    page.get_by_label("close").or_(page.get_by_test_id("toast-close")).first.click()
    choose(page, "Adapter", "runs/plain/adapter/small.safetensors")
    expect(page.get_by_label("Base", exact=True)).to_have_value("runs/plain")
    choose(page, "Another", "runs/<img")
    page.get_by_label("Prompt", exact=True).fill(f"a red star {HOSTILE[:20]}")
    page.get_by_label("Negative prompt").fill("blue")
    for name, value in (("Seed", "3"), ("Steps", "3"), ("Strength of the other", "1.5")):
        page.get_by_label(f"number input for {name}").fill(value)
        page.get_by_label(f"number input for {name}").press("Enter")
    page.get_by_role("button", name="Sample").click()
    images = page.locator(".image-container img, .image-frame img")
    expect(images).to_have_count(3)
    assert len(set(images.evaluate_all("all => all.map(image => image.src)"))) == 3
    expect(page.get_by_text("Another × 1.5")).to_be_visible()
    shot(page, picture)


def start_and_stop(page: Page, name: str, picture: Path) -> None:
    page.get_by_role("tab", name="Train").click()
    choose(page, "Recipe", "small.yaml")
    settings = page.get_by_label("Settings")
    settings.fill("train.learning_rat=1")
    page.get_by_role("button", name="Start or continue").click()
    said = page.get_by_label("What was started here")
    expect(said).to_have_value(re.compile("did you mean 'learning_rate'.*exit code 2", re.S))
    settings.fill("train.max_steps=5000")
    page.get_by_label("Run folder").fill(f"runs/long-{name}")
    shot(page, picture)
    page.get_by_role("button", name="Start or continue").click()
    page.get_by_role("tab", name="Runs").click()
    expect(page.locator(".finetune table").first).to_contain_text("running")
    expect(page.locator(".finetune svg").first).to_be_visible()
    shot(page, picture.with_stem(picture.stem.replace("train", "live")))
    for button, code in (("Stop", 143), ("Continue", None), ("Stop", 143)):
        page.get_by_role("button", name=button).click()
        if code:
            expect(said).to_have_value(re.compile(f"stopped and saved.*exit code {code}", re.S))
        else:
            expect(said).to_have_value(re.compile("continues after step"))


def choose(page: Page, name: str, value: str) -> None:
    box = page.get_by_label(name, exact=name in ("Adapter", "Recipe")).and_(page.locator("input")).first
    box.click()
    box.fill(value)
    page.get_by_role("option", name=value).first.click()


@contextmanager
def served(place: Path):
    process = subprocess.Popen([sys.executable, "-m", "finetune", "ui"], cwd=place, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        yield process.stdout.readline().split()[0]
    finally:
        process.terminate()
        process.wait()


def refuses(address: str) -> None:
    """What another site in the same browser could send, and files that are nobody's business."""
    for path, headers in (("", {"Host": "evil.example:7860"}), ("", {"Origin": "http://evil.example"}),
                          ("", {"Origin": "null"}), ("", {"Sec-Fetch-Site": "cross-site"}), ("gradio_api/file=/etc/passwd", {}),
                          ("gradio_api/file=small.yaml", {}), ("gradio_api/file=runs/plain/recipe.yaml", {})):
        try:
            urllib.request.urlopen(urllib.request.Request(address + path, headers=headers))
        except urllib.error.HTTPError as error:
            assert error.code == 403, (path, headers, error.code)
        else:
            raise AssertionError(f"answered: {path} {headers}")


if __name__ == "__main__":
    main()
