import assert from "node:assert/strict";
import { test } from "node:test";

import type { WireRecord } from "../src/wire.js";
import { RunView } from "../web/run.js";
import { brief, nearest, smooth, thin, ticks } from "../web/series.js";

function step(sequence: number, number: number, loss: number): WireRecord {
  const rest = { epoch: 1, perplexity: 1, learningRate: 0.1, gradientNorm: 1, targetTokensPerSecond: 1 };
  return { sequence, timeMs: 0, kind: "step", step: number, loss, ...rest };
}

test("records build curves, and one that was seen before changes nothing", () => {
  const view = new RunView();
  for (const record of [step(1, 1, 5), step(2, 2, 4), step(2, 2, 4), step(1, 1, 5), step(3, 3, 3)]) view.addRecord(record);
  assert.deepEqual(view.loss, [{ x: 1, y: 5 }, { x: 2, y: 4 }, { x: 3, y: 3 }]);
  assert.equal(view.lastSequence, 3);
});

test("a run that goes back to a checkpoint draws its steps anew", () => {
  const view = new RunView();
  for (const record of [step(1, 1, 5), step(2, 2, 9), step(3, 3, 99), step(4, 2, 4)]) view.addRecord(record);
  assert.deepEqual(view.loss, [{ x: 1, y: 5 }, { x: 2, y: 4 }]);
});

test("states and the best validation", () => {
  const view = new RunView();
  view.addRecord({ sequence: 1, timeMs: 0, kind: "state", state: "running", attempt: 1, message: "" });
  view.addRecord({ sequence: 2, timeMs: 0, kind: "validation", step: 1, loss: 2, bleu: 30, chrf: 50, best: true });
  view.addRecord({ sequence: 3, timeMs: 0, kind: "validation", step: 2, loss: 3, bleu: 20, chrf: 40, best: false });
  view.addRecord({ sequence: 4, timeMs: 0, kind: "state", state: "succeeded", attempt: 1, message: "" });
  assert.deepEqual([view.best, view.state, view.isTerminal], [{ bleu: 30, chrf: 50, step: 1 }, "succeeded", true]);
  assert.deepEqual(view.remarks.map(({ title }) => title), ["succeeded", "running"]);
});

test("a thinned curve has its extremes and its end", () => {
  const points = Array.from({ length: 10_000 }, (_, x) => ({ x, y: x === 4_321 ? 100 : Math.sin(x) }));
  const kept = thin(points, 200);
  assert.ok(kept.length <= 202);
  assert.ok(kept.some(({ y }) => y === 100));
  assert.equal(kept.at(-1)?.x, 9_999);
  assert.ok(kept.every(({ x }, i) => i === 0 || x > (kept[i - 1]?.x ?? 0)));
  assert.deepEqual(thin([{ x: 1, y: NaN }, { x: 2, y: 3 }], 10), [{ x: 2, y: 3 }]);
});

test("a smoothed curve stays within its values and begins with the first", () => {
  const smoothed = smooth([{ x: 1, y: 4 }, ...Array.from({ length: 500 }, (_, i) => ({ x: i + 2, y: i % 2 }))]);
  assert.equal(smoothed[0]?.y, 4);
  assert.ok(Math.abs((smoothed.at(-1)?.y ?? 0) - 0.5) < 0.1);
});

test("ticks are round and enclose the interval", () => {
  assert.deepEqual(ticks(0.3, 9.7, 5), [0, 2, 4, 6, 8, 10]);
  assert.deepEqual(ticks(0, 0.0007, 4), [0, 0.0002, 0.0004, 0.0006, 0.0008]);
  for (const value of [0, 5, 1e-9]) assert.ok(ticks(value, value, 4).length >= 2);
});

test("the nearest point", () => {
  const points = [1, 2, 5].map((x) => ({ x, y: x }));
  assert.deepEqual([0, 1.4, 3.4, 3.6, 99].map((x) => nearest(points, x)?.x), [1, 1, 2, 5, 5]);
  assert.equal(nearest([], 1), null);
});

test("numbers in few characters", () => {
  assert.deepEqual([0, 0.12345, 7.12345, 12345.6, 0.00070612, 1234567].map(brief), ["0", "0.123", "7.123", "12,346", "7.06e-4", "1,234,567"]);
});
