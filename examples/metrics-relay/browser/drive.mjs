// A browser for a test, which drives it over standard input and output.
//
// usage: node browser/drive.mjs CHROMIUM URL
// It prints what the page shows, a line of JSON four times a second, and takes commands, a line of JSON each:
// {"open": URL}, {"reload": true}, {"screenshot": PATH, "scheme": "light" | "dark"}. It ends with its input.

import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";

import { chromium } from "playwright-core";

const LOOK_INTERVAL_MS = 250;
const ARGS = [
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

/** Runs inside the page. */
function look() {
  const text = (id) => document.getElementById(id)?.textContent?.trim() ?? "";
  const notice = document.getElementById("notice");
  const tiles = [...document.querySelectorAll(".tile")].map((tile) => [...tile.children].map((part) => part.textContent));
  const drawn = (id) => document.querySelector(`#${id} path.curve:not(.faint)`)?.getAttribute("d")?.split("L").length ?? 0;
  return {
    path: location.pathname,
    state: document.body.dataset.state,
    link: document.body.dataset.link,
    notice: notice && !notice.hidden ? notice.textContent : "",
    model: text("model"),
    progress: text("progress-text"),
    points: Number(document.getElementById("loss")?.dataset.points ?? 0),
    scores: Number(document.getElementById("scores")?.dataset.points ?? 0),
    drawn: { loss: drawn("loss"), learningRate: drawn("learning-rate"), scores: drawn("scores") },
    tiles: Object.fromEntries(tiles),
    remarks: [...document.querySelectorAll(".remark b")].map((title) => title.textContent),
    runs: [...document.querySelectorAll("#run-list li")].map((run) => run.textContent),
  };
}

const [executablePath, url] = process.argv.slice(2);
const profile = await mkdtemp(join(tmpdir(), "metrics-relay-browser-"));
const viewport = { width: 1180, height: 1000 };
const context = await chromium.launchPersistentContext(profile, { executablePath, args: ARGS, viewport });
const page = context.pages()[0] ?? (await context.newPage());
const errors = [];
page.on("pageerror", (error) => errors.push(String(error)));

const commands = [{ open: url }];
let open = true;
createInterface({ input: process.stdin })
  .on("line", (line) => commands.push(JSON.parse(line)))
  .on("close", () => (open = false));

async function obey(command) {
  if (command.open) await page.goto(command.open);
  if (command.reload) await page.reload();
  if (command.screenshot) {
    await page.emulateMedia({ colorScheme: command.scheme });
    await page.screenshot({ path: command.screenshot, fullPage: true });
  }
}

try {
  while (open) {
    const command = commands.shift();
    if (command) await obey(command);
    console.log(JSON.stringify({ ...(await page.evaluate(look)), errors, commandsLeft: commands.length }));
    await new Promise((resolve) => setTimeout(resolve, LOOK_INTERVAL_MS));
  }
} finally {
  await context.close();
  await rm(profile, { recursive: true, force: true });
}
