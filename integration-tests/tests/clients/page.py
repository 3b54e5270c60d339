"""The server's built-in web page in a browser without a screen: one chat, and a picture of it."""

import sys

from playwright.sync_api import expect, sync_playwright

url, browser, picture = sys.argv[1:]

with sync_playwright() as p:
    chromium = p.chromium.launch(executable_path=browser, args=["--no-sandbox"])
    page = chromium.new_page(viewport={"width": 1200, "height": 800})
    # An answer of many tokens on a busy machine takes its time.
    page.set_default_timeout(180_000)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    # The page lists the model once its socket stands.
    expect(page.locator("#modelSelect option")).not_to_have_count(0, timeout=180_000)
    if not page.locator("#settingMaxTokens").is_visible():
        page.locator("#settingsBtn").click()
    page.locator("#settingMaxTokens").fill("24")
    page.locator("#settingMaxTokens").dispatch_event("change")
    for asked in ("What is the capital of France?", "And of Italy?"):
        answers = page.locator("#log .assistant")
        before = answers.count()
        page.locator("#input").fill(asked)
        page.get_by_role("button", name="Send").click()
        expect(answers).to_have_count(before + 1, timeout=180_000)
        # The page does not say when an answer is complete.
        answer = None
        while answer != (answer := answers.last.inner_text()) or not answer.strip():
            page.wait_for_timeout(3000)
        print(f"{asked} {answer!r}")
    page.screenshot(path=picture)
    assert not errors, errors
    chromium.close()
