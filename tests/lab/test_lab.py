"""Notebook 08 in JupyterLab, in a real browser: every cell runs, and the slider changes the picture.

Run by `make test-lab`; needs Chromium or Chrome, which RGAP_BROWSER may name.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")

ROOT = Path(__file__).parents[2]
NOTEBOOK = "08_audit_your_model.ipynb"
FOLDER = ROOT / "build" / "lab"
TOKEN = "a-token-for-this-test"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# No sandbox, because continuous integration is often root in a container; nothing of the browser's own on the network.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync"]
MINUTES = 60_000  # milliseconds


@pytest.fixture(scope="module")
def server():
    """JupyterLab on a free loopback port, on a copy of the notebook, with the user's settings left alone."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    (FOLDER / "notebooks").mkdir(parents=True)
    # Without the committed outputs whatever the page shows is of this run.
    notebook = nbformat.read(ROOT / "notebooks" / NOTEBOOK, as_version=4)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, FOLDER / "notebooks" / NOTEBOOK)
    # The first start would ask about news, in front of the panel; and cells out of sight would not be in the page.
    for name, settings in {
        "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
        "notebook-extension/tracker": '{"windowingMode": "none"}',
    }.items():
        path = FOLDER / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(settings)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += [f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={FOLDER / 'notebooks'}"]
    command += ["--ServerApp.port_retries=0", "--LabApp.extension_manager=readonly"]
    # RGAP_PROFILE is what make sets where a program runs a notebook; here a person does.
    environment = {name: value for name, value in os.environ.items() if name not in ("RGAP_PROFILE", "PYTEST_ADDOPTS")}
    environment |= {"RGAP_FIGURES": str(FOLDER / "figures"), "PYTHONPATH": str(ROOT)}
    environment |= {f"JUPYTER_{name}_DIR": str(FOLDER / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    environment |= {f"JUPYTERLAB_{name}_DIR": str(FOLDER / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    with (FOLDER / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=FOLDER)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api?token={TOKEN}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def browser():
    found = os.environ.get("RGAP_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail(
            f"no browser: none of {', '.join(BROWSERS)} is on the PATH; install one (Debian and Ubuntu: apt install "
            "chromium), or name one in the environment variable RGAP_BROWSER",
            pytrace=False,
        )
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


def _wait_for(url, process):
    for _ in range(240):
        assert process.poll() is None, (FOLDER / "server.log").read_text()
        try:
            urllib.request.urlopen(url).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"JupyterLab did not start: {(FOLDER / 'server.log').read_text()}")


def _ask(url, body=None):
    """What JupyterLab's interface answers."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"token {TOKEN}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
        return json.load(answer)


def _start_kernel(server):
    """Starts the notebook's kernel before the page opens.

    Where the page starts it, and the list of kernels is slow to come, JupyterLab may ask which one it is to be, and a
    run of all cells waits for the answer.
    """
    session = {"path": NOTEBOOK, "name": NOTEBOOK, "type": "notebook", "kernel": {"name": "python3"}}
    _ask(f"{server}/api/sessions", session)


def _pixels(page, picture):
    """What a picture holds, as the browser has it."""
    script = """async image => {
        const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
        return Array.from(bytes).map(byte => byte.toString(16).padStart(2, '0')).join('');
    }"""
    return picture.evaluate(script)


def test_all_cells_run_and_the_slider_changes_the_picture(server, browser):
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(2 * MINUTES)
    _start_kernel(server)
    try:
        _walk(page, f"{server}/lab/tree/{NOTEBOOK}?token={TOKEN}")
    finally:
        page.screenshot(path=FOLDER / "last.png")


def _walk(page, url):
    page.goto(url)
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    # The status bar shows the kernel's state; the circle in the toolbar says idle before there is a kernel.
    idle = page.locator("#jp-main-statusbar").get_by_text("Python 3 (ipykernel) | Idle")
    idle.wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    cells = [c for c in nbformat.read(FOLDER / "notebooks" / NOTEBOOK, 4).cells if c.cell_type == "code"]
    page.locator(".jp-InputPrompt", has_text=f"[{len(cells)}]").wait_for(timeout=6 * MINUTES)
    idle.wait_for()
    slider = page.locator(".widget-slider .noUi-handle")  # the panel is the last but the claims
    slider.scroll_into_view_if_needed()
    assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").count() == 0
    assert page.locator(".jp-InputPrompt", has_text="[*]").count() == 0
    assert page.get_by_text(re.compile(r"08-prediction .*: True")).count() > 0

    origin, found = (page.locator("img.widget-image").nth(i) for i in (0, 1))
    status = page.locator(".widget-html").last
    before, truth = _pixels(page, found), _pixels(page, origin)
    assert "exact" in status.inner_text()
    found.scroll_into_view_if_needed()
    page.screenshot(path=FOLDER / "before.png")

    slider.focus()
    page.keyboard.press("End")
    page.wait_for_function("text => !document.body.innerText.includes(text)", arg=status.inner_text(), timeout=MINUTES)
    after = _pixels(page, page.locator("img.widget-image").nth(1))
    assert after != before
    assert _pixels(page, page.locator("img.widget-image").nth(0)) == truth
    page.screenshot(path=FOLDER / "after.png")
