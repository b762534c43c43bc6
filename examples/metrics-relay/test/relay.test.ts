import assert from "node:assert/strict";
import { once } from "node:events";
import { get, type IncomingMessage, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { after, test } from "node:test";

import { Code, ConnectError } from "@connectrpc/connect";

import { hostCheck } from "../src/hosts.js";
import { createRelay } from "../src/relay.js";
import type { WireRecord } from "../src/wire.js";
import { FakeSource, records, RUN_ID } from "./fake-source.js";

const servers: Server[] = [];
after(() => servers.forEach((server) => (server.close(), server.closeAllConnections())));

interface Received {
  id: string;
  event: string;
  data: any;
}

async function serve(source: FakeSource, limits: { maxStreams?: number } = {}): Promise<string> {
  const assets = new Map([["/", { type: "text/html", body: Buffer.from("the page") }]]);
  const times = { firstPauseMs: 1, longestPauseMs: 4, silenceMs: 1_000 };
  const server = createRelay({ source, assets, times, ...limits }).listen(0, "127.0.0.1");
  servers.push(server);
  await once(server, "listening");
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}

/** Reads events as a browser does, to the end of the response. */
async function* events(url: string, lastId?: string): AsyncGenerator<Received> {
  const response = await fetch(url, lastId === undefined ? {} : { headers: { "Last-Event-ID": lastId } });
  assert.match(response.headers.get("content-type") ?? "", /^text\/event-stream/);
  let text = "";
  for await (const bytes of response.body as unknown as AsyncIterable<Uint8Array>) {
    text += Buffer.from(bytes).toString();
    const frames = text.split("\n\n");
    text = frames.pop() as string;
    for (const framed of frames) {
      const field = (name: string): string => new RegExp(`^${name}: (.*)$`, "m").exec(framed)?.[1] ?? "";
      if (field("data")) yield { id: field("id"), event: field("event"), data: JSON.parse(field("data")) };
    }
  }
}

async function all(url: string, lastId?: string): Promise<Received[]> {
  const found: Received[] = [];
  for await (const event of events(url, lastId)) found.push(event);
  return found;
}

function recordsOf(received: Received[]): WireRecord[] {
  return received.filter(({ event }) => event === "").map(({ data }) => data as WireRecord);
}

test("a run is told with the sequence numbers as ids, and has an end", async () => {
  const received = await all(`${await serve(new FakeSource(records(20)))}/api/runs/${RUN_ID}/events`);
  const told = received.filter(({ event }) => event === "");
  assert.deepEqual(told.map(({ id }) => Number(id)), Array.from({ length: 22 }, (_, i) => i + 1));
  assert.deepEqual(told[1]?.data, {
    sequence: 2, timeMs: 0, kind: "step", step: 1, epoch: 1, loss: 8, perplexity: 0, learningRate: 0.001,
    gradientNorm: 0, targetTokensPerSecond: 0,
  });
  assert.deepEqual(told.at(-1)?.data.state, "succeeded");
  assert.deepEqual(received.at(-1), { id: "", event: "end", data: { reason: "ended", message: "" } });
  assert.equal(received.find(({ event }) => event === "run")?.data.modelName, "en-de");
});

test("a browser that comes back gets what it has not had", async () => {
  const received = await all(`${await serve(new FakeSource(records(20)))}/api/runs/${RUN_ID}/events`, "15");
  assert.deepEqual(recordsOf(received).map(({ sequence }) => sequence), [16, 17, 18, 19, 20, 21, 22]);
});

test("a service that goes away and comes back is said, and nothing is lost", async () => {
  const source = new FakeSource(records(20));
  source.breakAfter(5);
  const received = await all(`${await serve(source)}/api/runs/${RUN_ID}/events`);
  assert.equal(recordsOf(received).length, 22);
  const links = received.filter(({ event }) => event === "link").map(({ data }) => data.connected);
  assert.deepEqual(links, [true, false, true]);
});

test("a run that does not exist is said plainly, and once", async () => {
  const source = new FakeSource(records(1));
  const received = await all(`${await serve(source)}/api/runs/run_x/events`);
  assert.deepEqual(received, [
    { id: "", event: "end", data: { reason: "not-found", message: "no training run run_x" } },
  ]);
  assert.deepEqual(source.calls, [0]);
});

test("a browser that goes away ends the stream from the service", async () => {
  const source = new FakeSource(records(20), 5);
  let ended = false;
  const stream = source.streamMetrics.bind(source);
  source.streamMetrics = async function* (...call) {
    try {
      yield* stream(...call);
    } finally {
      ended = true;
    }
  };
  for await (const event of events(`${await serve(source)}/api/runs/${RUN_ID}/events`)) {
    if (event.id === "5") break;
  }
  for (let i = 0; i < 200 && !ended; i++) await new Promise((resolve) => setTimeout(resolve, 10));
  assert.ok(ended);
});

test("who asks only for the headers of a run's events gets them, and no stream", { timeout: 10_000 }, async () => {
  const source = new FakeSource(records(1), 1);
  const response = await fetch(`${await serve(source)}/api/runs/${RUN_ID}/events`, { method: "HEAD" });
  assert.equal(response.status, 200);
  assert.match(response.headers.get("content-type") ?? "", /^text\/event-stream/);
  assert.equal(await response.text(), "");
  assert.deepEqual(source.calls, []);
});

test("a foreign host gets 403, and everything says nosniff", async () => {
  const { port } = new URL(await serve(new FakeSource(records(1))));
  const answers: unknown[] = [];
  for (const [host, path] of [["evil.example", "/"], [`localhost:${port}`, "/"], ["localhost", "/api/runs"]] as const) {
    const request = get({ host: "127.0.0.1", port, path, headers: { host } });
    const [response] = (await once(request, "response")) as [IncomingMessage];
    response.resume();
    answers.push([response.statusCode, response.headers["x-content-type-options"]]);
  }
  assert.deepEqual(answers, [[403, "nosniff"], [200, "nosniff"], [200, "nosniff"]]);
});

test("the host names that are answered", () => {
  const local = hostCheck("127.0.0.1", ["Relay.example"]);
  const everywhere = hostCheck("0.0.0.0");
  for (const host of ["localhost:8080", "127.0.0.1", "[::1]:8080", "relay.example:80", undefined]) assert.ok(local(host), host);
  for (const host of ["evil.example", "10.0.0.1", "localhost.evil.example"]) assert.ok(!local(host), host);
  for (const host of ["10.0.0.1:8080", "[fd00::1]", "localhost"]) assert.ok(everywhere(host), host);
  for (const host of ["evil.example", "relay.example"]) assert.ok(!everywhere(host), host);
});

test("streams are bounded, and one that ends makes room", async () => {
  const url = `${await serve(new FakeSource(records(20), 5), { maxStreams: 1 })}/api/runs/${RUN_ID}/events`;
  for await (const event of events(url)) {
    if (event.id !== "5") continue;
    const refused = await fetch(url);
    assert.deepEqual([refused.status, refused.headers.get("retry-after")], [503, "5"]);
    break;
  }
  let status = 503;
  for (let i = 0; i < 200 && status === 503; i++) {
    const gone = new AbortController();
    status = (await fetch(url, { signal: gone.signal })).status;
    gone.abort();
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  assert.equal(status, 200);
});

test("a path that is none is refused", async () => {
  const { port } = new URL(await serve(new FakeSource(records(1))));
  const [response] = (await once(get({ host: "127.0.0.1", port, path: "//" }), "response")) as [IncomingMessage];
  response.resume();
  assert.equal(response.statusCode, 400);
});

test("the page, the runs, and what is not there", async () => {
  const source = new FakeSource(records(1));
  const url = await serve(source);
  for (const path of ["/", "/runs/run_x"]) {
    const response = await fetch(url + path);
    assert.equal(await response.text(), "the page");
    assert.match(response.headers.get("content-security-policy") ?? "", /default-src 'self'/);
  }
  assert.equal(((await (await fetch(`${url}/api/runs`)).json()) as any).runs[0].runId, RUN_ID);
  assert.equal((await fetch(`${url}/healthz`)).status, 200);
  for (const path of ["/nothing", "/runs/a/b", "/api/runs/%2e%2e/events", "/../package.json"]) {
    assert.equal((await fetch(url + path)).status, 404, path);
  }
  assert.equal((await fetch(url, { method: "POST" })).status, 405);
  source.newestRuns = () => Promise.reject(new ConnectError("refused", Code.Unavailable));
  const down = await fetch(`${url}/api/runs`);
  assert.deepEqual([down.status, await down.json()], [502, { message: "refused" }]);
});
