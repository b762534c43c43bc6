import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer, get, type IncomingMessage } from "node:http";
import type { AddressInfo } from "node:net";
import { test } from "node:test";

import { frame, lastEventId, SseStream } from "../src/sse.js";

test("an event is its fields, a line each, and an empty line", () => {
  assert.equal(frame({ id: 7, event: "run", data: { a: 1 } }), 'id: 7\nevent: run\ndata: {"a":1}\n\n');
  assert.equal(frame({ data: null }), "data: null\n\n");
  assert.equal(frame({ id: 0, data: [] }), "id: 0\ndata: []\n\n");
});

test("no text can break out of its event", () => {
  const text = "one\ntwo\r\nevent: end\n\nid: 9\u2028";
  const framed = frame({ data: { text } });
  assert.equal(framed.split("\n").length, 3);
  assert.deepEqual(JSON.parse(framed.slice("data: ".length)), { text });
});

test("a Last-Event-ID is a sequence number, or the beginning", () => {
  assert.equal(lastEventId("42"), 42);
  for (const header of [undefined, "", "-1", "1e3", "x", "9".repeat(40), ["1", "2"]]) {
    assert.equal(lastEventId(header), 0);
  }
});

test("a slow reader is waited for, and nobody goes on listening", async () => {
  const names = ["drain", "close", "error"];
  let before: number[] = [];
  let waits = 0;
  let after: number[] = [];
  const server = createServer(async (_, response) => {
    response.on("drain", () => waits++);
    const listening = () => names.map((name) => response.listenerCount(name));
    before = listening();
    const stream = new SseStream(response, 1_000);
    for (let id = 1; id <= 50; id++) await stream.send({ id, data: "x".repeat(1_000_000) });
    after = listening();
    stream.end();
  }).listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address() as AddressInfo;
  const [response] = (await once(get({ host: "127.0.0.1", port }), "response")) as [IncomingMessage];
  let length = 0;
  for await (const bytes of response) length += (bytes as Buffer).length;
  server.close();
  assert.ok(length > 50_000_000);
  assert.ok(waits > 10, `${waits} waits`);
  assert.deepEqual(after, before);
});
