import assert from "node:assert/strict";
import { test } from "node:test";

import { frame, lastEventId } from "../src/sse.js";

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
