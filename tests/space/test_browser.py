"""The page in a browser: upload, a click on a patch, the slider, a refusal, a phone's width. No upload stays there."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modeling_mammodino.tools.command import SHIPPED

pytest.importorskip("gradio", reason="gradio is not installed: pip install -c constraints.txt -e '.[demo]'")
selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium here: apt-get install chromium chromium-driver"),
]
ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 240  # for one step, on a machine at work


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page of the shipped encoder, as `mammodino demo` opens it; its temporary files are in `address.folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("temporary")
    log = tmp_path_factory.mktemp("log") / "server.txt"
    command = [sys.executable, "-m", "modeling_mammodino.tools.cli", "demo", "--model", SHIPPED, "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(folder), "NO_PROXY": "127.0.0.1,localhost"}
    for _ in range(3):  # gradio gives up where its own first answer takes three seconds, on a machine at work
        with log.open("w") as stream:
            server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        until(lambda server=server: "page: http" in log.read_text() or server.poll() is not None)
        if server.poll() is None or "localhost is not accessible" not in log.read_text():
            break
    try:
        assert server.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}", folder
    finally:
        server.terminate()
        server.wait(PATIENCE_SECONDS)
    assert not list(folder.glob("mammodino-*"))  # examples and pictures go with the server


@pytest.fixture(scope="module")
def browser(address):
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    browser = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    try:
        set_size(browser, 1280, 800)
        browser.get(address[0])
        until(lambda: picture(browser, "alike"))
        yield browser
    finally:
        browser.quit()


def set_size(browser, width: int, height: int) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 640}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def until(holds):
    """Return what is true at last."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            if found := holds():
                return found
        except Exception:  # an element that is being drawn anew
            if time.monotonic() > end:
                raise
        assert time.monotonic() < end
        time.sleep(0.1)


def one(browser, selector: str):
    return browser.find_element("css selector", selector)


def picture(browser, name: str) -> str:
    return one(browser, f"#{name} img").get_attribute("src")


def test_a_visitor_opens_a_volume_compares_a_patch_changes_the_slice_and_is_told_what_is_no_image(
    browser, address, phantom_archive, tmp_path
):
    assert "Research use only" in one(browser, ".notice").text
    volume = next(phantom_archive.rglob("*_dbt.dcm"))
    shutil.copy(volume, tmp_path / "own_volume.dcm")
    one(browser, "#upload input[type=file]").send_keys(str(tmp_path / "own_volume.dcm"))
    until(lambda: "own_volume.dcm" in one(browser, "#facts").text and "3 (0 to 5)" in one(browser, "#facts").text)

    before, seen = picture(browser, "alike"), picture(browser, "seen")
    image = one(browser, "#seen img")
    at_chest_wall = -image.size["width"] // 2 + 12, 0
    selenium.ActionChains(browser).move_to_element_with_offset(image, *at_chest_wall).click().perform()
    until(lambda: picture(browser, "alike") != before)
    assert picture(browser, "seen") == seen

    one(browser, "#slice input[type=range]").send_keys(selenium.Keys.ARROW_LEFT)
    until(lambda: "2 (0 to 5)" in one(browser, "#facts").text and picture(browser, "seen") != seen)

    (tmp_path / "text.dcm").write_text("no image")
    one(browser, "#upload input[type=file]").send_keys(str(tmp_path / "text.dcm"))
    until(lambda: one(browser, ".problem").text.startswith("text.dcm: not a readable image"))
    assert "own_volume.dcm" in one(browser, "#facts").text  # what was open stays

    until(lambda: one(browser, "#nearest button")).click()
    until(lambda: "Simulated breast" in one(browser, "#facts").text)
    there = [path for path in address[1].rglob("*") if path.is_file()]
    assert there and not [path for path in there if path.name in ("own_volume.dcm", "text.dcm")]
    assert volume.read_bytes() not in [path.read_bytes() for path in there]


def test_on_a_phone_nothing_is_cut_and_the_answer_stands_beside_the_patch(browser):
    set_size(browser, 390, 844)
    until(lambda: one(browser, "#seen img").size["width"] < 200)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    seen, alike = (one(browser, f"#{name} img").rect for name in ("seen", "alike"))
    assert abs(seen["y"] - alike["y"]) < 5 and seen["x"] + seen["width"] <= alike["x"] <= 390 - alike["width"]
