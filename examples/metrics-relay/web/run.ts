// What the page knows of a run: built from the relay's events, one after the other. No DOM in here.

import type { State, StepRecord, WireEnd, WireLink, WireRecord, WireRun } from "../src/wire.js";

export interface Point {
  x: number;
  y: number;
}

export interface Remark {
  sequence: number;
  timeMs: number;
  level: string;
  title: string;
  message: string;
}

const KEPT_REMARKS = 100;
const TERMINAL: readonly State[] = ["succeeded", "failed", "cancelled"];

export class RunView {
  lastSequence = 0;
  state: State = "unspecified";
  run: WireRun | null = null;
  link: WireLink = { connected: false, message: "" };
  end: WireEnd | null = null;
  step: StepRecord | null = null;
  best: { bleu: number; chrf: number; step: number } | null = null;
  readonly loss: Point[] = [];
  readonly learningRate: Point[] = [];
  readonly validationLoss: Point[] = [];
  readonly bleu: Point[] = [];
  readonly chrf: Point[] = [];
  /** The newest first. */
  readonly remarks: Remark[] = [];

  get isTerminal(): boolean {
    return TERMINAL.includes(this.state);
  }

  /** Takes a record in; one that was seen before changes nothing, which makes every reconnection harmless. */
  addRecord(record: WireRecord): void {
    if (record.sequence <= this.lastSequence) return;
    this.lastSequence = record.sequence;
    switch (record.kind) {
      case "step":
        this.step = record;
        append(this.loss, record.step, record.loss);
        append(this.learningRate, record.step, record.learningRate);
        break;
      case "validation":
        append(this.validationLoss, record.step, record.loss);
        append(this.bleu, record.step, record.bleu);
        append(this.chrf, record.step, record.chrf);
        if (record.best) this.best = { bleu: record.bleu, chrf: record.chrf, step: record.step };
        break;
      case "state":
        this.state = record.state;
        this.#remark(record, "state", record.state, record.message);
        break;
      case "event":
        this.#remark(record, record.level, record.code, record.message);
    }
  }

  /** Takes in what the service says of the run as a whole. A state that a record has told already is the newer one. */
  setRun(run: WireRun): void {
    this.run = run;
    if (!this.isTerminal && this.lastSequence === 0) this.state = run.state;
  }

  #remark(record: WireRecord, level: string, title: string, message: string): void {
    this.remarks.unshift({ sequence: record.sequence, timeMs: record.timeMs, level, title, message });
    this.remarks.length = Math.min(this.remarks.length, KEPT_REMARKS);
  }
}

/** Appends a point. A run that went back to a checkpoint does steps again: what it did before is no longer its curve. */
function append(points: Point[], x: number, y: number): void {
  while (points.length > 0 && (points[points.length - 1] as Point).x >= x) points.pop();
  points.push({ x, y });
}
