import assert from "node:assert/strict";
import { test } from "node:test";

import { create } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";

import { StreamMetricsResponseSchema, type StreamMetricsResponse } from "../src/gen/ferryman/v1/training_pb.js";
import { followRun, type TailItem } from "../src/tail.js";
import { FakeSource, records, RUN_ID } from "./fake-source.js";

const TIMES = { firstPauseMs: 1, longestPauseMs: 4, silenceMs: 1_000 };

async function all(items: AsyncIterable<TailItem>): Promise<TailItem[]> {
  const found: TailItem[] = [];
  for await (const item of items) found.push(item);
  return found;
}

function sequences(items: TailItem[]): number[] {
  return items.flatMap((item) => (item.kind === "record" ? [Number(item.record.sequence)] : []));
}

function upTo(last: number): number[] {
  return Array.from({ length: last }, (_, i) => i + 1);
}

test("a run is told from its beginning to its end", async () => {
  const source = new FakeSource(records(5));
  const items = await all(followRun(source, RUN_ID, 0, new AbortController().signal, TIMES));
  assert.deepEqual(sequences(items), upTo(7));
  assert.deepEqual(source.calls, [0]);
});

test("after a broken stream it goes on behind the last record, without gap or duplicate", async () => {
  const source = new FakeSource(records(50));
  source.breakAfter(10);
  source.breakAfter(0);
  source.breakAfter(20, Code.Aborted, "ECONNRESET");
  const items = await all(followRun(source, RUN_ID, 0, new AbortController().signal, TIMES));
  assert.deepEqual(sequences(items), upTo(52));
  assert.deepEqual(source.calls, [0, 10, 10, 30]);
  assert.deepEqual(
    items.filter((item) => item.kind === "broken").map((item) => item.message),
    ["the connection broke", "the connection broke", "ECONNRESET"],
  );
});

test("it begins behind the record that the reader has seen last", async () => {
  const source = new FakeSource(records(5));
  const items = await all(followRun(source, RUN_ID, 4, new AbortController().signal, TIMES));
  assert.deepEqual(sequences(items), [5, 6, 7]);
});

test("a record that comes twice is told once", async () => {
  const source = new FakeSource(records(5));
  const stream = source.streamMetrics.bind(source);
  source.streamMetrics = (runId, _, signal) => stream(runId, 0n, signal); // a server that forgets where it was
  source.breakAfter(3);
  const items = await all(followRun(source, RUN_ID, 0, new AbortController().signal, TIMES));
  assert.deepEqual(sequences(items), upTo(7));
});

test("pauses grow to a bound, and a record starts them over", async () => {
  const source = new FakeSource(records(5));
  for (let i = 0; i < 5; i++) source.breakAfter(0);
  source.breakAfter(1);
  const items = await all(followRun(source, RUN_ID, 0, new AbortController().signal, TIMES));
  const pauses = items.flatMap((item) => (item.kind === "broken" ? [item.retryInMs] : []));
  assert.deepEqual(pauses, [1, 2, 4, 4, 4, 1]);
});

for (const code of [Code.NotFound, Code.OutOfRange, Code.PermissionDenied]) {
  test(`${Code[code]} is not asked again`, async () => {
    const source = new FakeSource(records(5));
    source.breakAfter(0, code, "no");
    await assert.rejects(all(followRun(source, RUN_ID, 0, new AbortController().signal, TIMES)), { code });
    assert.deepEqual(source.calls, [0]);
  });
}

test("a stream that has gone silent is called anew", async () => {
  const source = new FakeSource(records(5));
  const stream = source.streamMetrics.bind(source);
  let silent = true;
  source.streamMetrics = async function* (runId, after, signal): AsyncGenerator<StreamMetricsResponse> {
    if (!silent) return yield* stream(runId, after, signal);
    silent = false;
    yield create(StreamMetricsResponseSchema, { metricsUpdate: { case: "record", value: records(5)[0] as never } });
    await new Promise((_, reject) => signal.addEventListener("abort", () => reject(ConnectError.from(signal.reason))));
  };
  const times = { ...TIMES, silenceMs: 20 };
  const items = await all(followRun(source, RUN_ID, 0, new AbortController().signal, times));
  assert.deepEqual(sequences(items), upTo(7));
  assert.deepEqual(
    items.filter((item) => item.kind === "broken").map((item) => item.message),
    ["the service has gone silent"],
  );
});

test("a slow reader is no silence", async () => {
  const items: TailItem[] = [];
  const times = { ...TIMES, silenceMs: 20 };
  for await (const item of followRun(new FakeSource(records(3)), RUN_ID, 0, new AbortController().signal, times)) {
    items.push(item);
    await new Promise((resolve) => setTimeout(resolve, 40));
  }
  assert.deepEqual(items.map((item) => item.kind), Array(5).fill("record"));
});

test("who stops listening ends the call, also in a pause", async () => {
  const source = new FakeSource(records(5), 3);
  const controller = new AbortController();
  const items: TailItem[] = [];
  for await (const item of followRun(source, RUN_ID, 0, controller.signal, TIMES)) {
    items.push(item);
    if (item.kind === "alive") controller.abort();
  }
  assert.deepEqual(sequences(items), upTo(3));

  const broken = new FakeSource(records(5));
  broken.breakAfter(0);
  const pausing = new AbortController();
  const began = Date.now();
  for await (const item of followRun(broken, RUN_ID, 0, pausing.signal, { ...TIMES, firstPauseMs: 60_000 })) {
    assert.equal(item.kind, "broken");
    setTimeout(() => pausing.abort(), 10);
  }
  assert.ok(Date.now() - began < 5_000);
});
