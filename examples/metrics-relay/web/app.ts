// The page: a list of runs, or one run, drawn as its events come.

import type { WireEnd, WireLink, WireRecord, WireRun } from "../src/wire.js";
import { Chart } from "./chart.js";
import { RunView, type Remark } from "./run.js";
import { brief, smooth } from "./series.js";

const SHOWN_REMARKS = 30;

function byId(id: string): HTMLElement {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no #${id}`);
  return found;
}

function made(name: string, className: string, ...content: (string | Node)[]): HTMLElement {
  const element = document.createElement(name);
  element.className = className;
  element.append(...content);
  return element;
}

// --- One run ---------------------------------------------------------------------------------------------------------

class RunPage {
  readonly #view = new RunView();
  readonly #loss = new Chart(byId("loss"));
  readonly #learningRate = new Chart(byId("learning-rate"));
  readonly #scores = new Chart(byId("scores"));
  readonly #runId: string;
  #relayGone = false;
  #drawing = false;

  constructor(runId: string) {
    this.#runId = runId;
    byId("run").hidden = false;
    byId("run-id").textContent = runId;
  }

  /** Listens for ever; EventSource reconnects by itself, with the id of the last event, until it is closed. */
  listen(): void {
    const source = new EventSource(`/api/runs/${encodeURIComponent(this.#runId)}/events`);
    const on = <T>(name: string, take: (data: T) => void): void => {
      source.addEventListener(name, (event) => {
        take(JSON.parse((event as MessageEvent<string>).data) as T);
        this.#redraw();
      });
    };
    on<WireRecord>("message", (record) => this.#view.addRecord(record));
    on<WireRun>("run", (run) => this.#view.setRun(run));
    on<WireLink>("link", (link) => (this.#view.link = link));
    on<WireEnd>("end", (end) => {
      this.#view.end = end;
      source.close();
    });
    source.addEventListener("open", () => {
      this.#relayGone = false;
      this.#redraw();
    });
    source.addEventListener("error", () => {
      this.#relayGone = !this.#view.end;
      this.#redraw();
      // A browser gives up on an answer that is no event stream, such as that of a proxy without its relay.
      if (source.readyState === EventSource.CLOSED && !this.#view.end) setTimeout(() => this.listen(), 2_000);
    });
  }

  #redraw(): void {
    if (this.#drawing) return;
    this.#drawing = true;
    const draw = (): void => {
      this.#drawing = false;
      this.#draw();
    };
    // A hidden page draws nothing until it is looked at, and then once.
    requestAnimationFrame(draw);
  }

  #draw(): void {
    const view = this.#view;
    document.body.dataset["state"] = view.state;
    document.body.dataset["sequence"] = String(view.lastSequence);
    document.title = `${view.run?.modelName ?? "run"}: ${view.state}`;
    byId("model").textContent = title(view.run) ?? this.#runId;
    byId("state").textContent = view.state === "unspecified" ? "…" : view.state;
    this.#drawNotice();
    this.#drawProgress();
    this.#drawTiles();
    this.#loss.show([
      { name: "training, each step", style: "curve-1", points: view.loss, faint: true },
      { name: "training", style: "curve-1", points: smooth(view.loss) },
      { name: "validation", style: "curve-2", points: view.validationLoss, dots: true },
    ]);
    this.#learningRate.show([{ name: "learning rate", style: "curve-3", points: view.learningRate }]);
    this.#scores.show([
      { name: "BLEU", style: "curve-2", points: view.bleu, dots: true },
      { name: "chrF", style: "curve-4", points: view.chrf, dots: true },
    ]);
    byId("remarks").replaceChildren(...view.remarks.slice(0, SHOWN_REMARKS).map(remarkLine));
  }

  #drawNotice(): void {
    const text = notice(this.#view, this.#runId, this.#relayGone);
    byId("notice").textContent = text;
    byId("notice").hidden = text === "";
    const link = this.#view.end ? "closed" : this.#relayGone || !this.#view.link.connected ? "waiting" : "live";
    document.body.dataset["link"] = link;
    byId("link").textContent = { closed: "", waiting: "reconnecting", live: "live" }[link];
    byId("charts").hidden = this.#view.end?.reason === "not-found";
  }

  #drawProgress(): void {
    const { run } = this.#view;
    const share = this.#view.state === "succeeded" ? 1 : (run?.progress ?? 0);
    const bar = byId("progress") as HTMLProgressElement;
    bar.value = share;
    const parts = [`${Math.floor(share * 100)} %`];
    if (run?.remainingSeconds != null && !this.#view.isTerminal) parts.push(`about ${duration(run.remainingSeconds)} left`);
    byId("progress-text").textContent = parts.join(", ");
  }

  #drawTiles(): void {
    const { step, best } = this.#view;
    const tiles: [string, string | null][] = [
      ["step", step && brief(step.step)],
      ["epoch", step && brief(step.epoch)],
      ["loss", step && brief(step.loss)],
      ["perplexity", step && brief(step.perplexity)],
      ["learning rate", step && brief(step.learningRate)],
      ["gradient norm", step && brief(step.gradientNorm)],
      ["target tokens/s", step && brief(step.targetTokensPerSecond)],
      ["best BLEU", best && best.bleu.toFixed(1)],
    ];
    byId("tiles").replaceChildren(
      ...tiles.map(([name, value]) => made("div", "tile", made("dt", "", name), made("dd", "", value ?? "–"))),
    );
  }
}

function title(run: WireRun | null): string | null {
  return run && (run.modelVersion ? `${run.modelName}/${run.modelVersion}` : run.modelName);
}

/** Returns the one thing that the reader should know now, in plain words; empty if all is well. */
function notice(view: RunView, runId: string, relayGone: boolean): string {
  if (view.end?.reason === "not-found") return `There is no run ${runId}. It may have been deleted, or be on another service.`;
  if (view.end?.reason === "refused") return `The service refuses to tell of this run: ${view.end.message}`;
  if (view.state === "failed") return view.run?.error ?? "The run has failed.";
  if (view.end) return "";
  if (relayGone) return "The relay cannot be reached. This page tries again by itself.";
  if (view.link.message) return `The Ferryman service cannot be reached (${view.link.message}). The relay tries again by itself.`;
  return "";
}

function remarkLine(remark: Remark): HTMLElement {
  const time = made("time", "", new Date(remark.timeMs).toLocaleTimeString());
  return made("li", `remark ${remark.level}`, time, made("b", "", remark.title), made("span", "", remark.message));
}

function duration(seconds: number): string {
  const minutes = Math.round(seconds / 60);
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return minutes < 90 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// --- The list of runs ------------------------------------------------------------------------------------------------

async function showRuns(): Promise<void> {
  byId("runs").hidden = false;
  let text = "";
  try {
    const response = await fetch("/api/runs");
    const answer = (await response.json()) as { runs?: WireRun[]; message?: string };
    if (answer.runs) {
      byId("run-list").replaceChildren(...answer.runs.map(runLine));
      if (answer.runs.length === 0) text = "The service has no runs yet. Start one, and it appears here.";
    } else {
      text = `The Ferryman service cannot be reached (${answer.message ?? response.statusText}). This page tries again by itself.`;
    }
  } catch {
    text = "The relay cannot be reached. This page tries again by itself.";
  }
  byId("notice").textContent = text;
  byId("notice").hidden = text === "";
  setTimeout(() => void showRuns(), 3_000);
}

function runLine(run: WireRun): HTMLElement {
  const link = made("a", "", title(run) ?? run.runId) as HTMLAnchorElement;
  link.href = `/runs/${run.runId}`;
  const started = run.createTimeMs === null ? "" : new Date(run.createTimeMs).toLocaleString();
  const details = made("span", "details", `step ${brief(run.step)}, ${Math.floor(run.progress * 100)} %, ${started}`);
  return made("li", "", link, made("span", `badge ${run.state}`, run.state), details);
}

const chosen = /^\/runs\/([^/]+)$/.exec(location.pathname);
if (chosen) new RunPage(decodeURIComponent(chosen[1] as string)).listen();
else void showRuns();
