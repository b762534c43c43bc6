// The HTTP side: the page, the list of runs, and a run's events.
//
// The relay remembers nothing. The id of an event is the sequence number of its record, so a browser that reconnects,
// also to a relay that has been restarted, says by itself where it goes on.

import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";

import { Code, ConnectError } from "@connectrpc/connect";

import { hostCheck } from "./hosts.js";
import type { RunSource } from "./service.js";
import { lastEventId, SseStream, STREAM_HEADERS } from "./sse.js";
import { DEFAULT_TIMES, followRun, type TailTimes } from "./tail.js";
import { toWireRecord, toWireRun, type WireEnd, type WireLink } from "./wire.js";

const ORIGIN = "http://relay";
const RETRY_MS = 1_000;
const PING_INTERVAL_MS = 15_000;
const RUN_INTERVAL_MS = 1_000;
const MAX_STREAMS = 64;

/** A file of the page. */
export interface Asset {
  type: string;
  body: Buffer;
}

export interface RelayOptions {
  source: RunSource;
  /** By path, such as "/app.js"; "/" is the page, which is also that of every run. */
  assets: ReadonlyMap<string, Asset>;
  times?: TailTimes;
  /** Tells which values of the header Host are answered. */
  isOurHost?: (header: string | undefined) => boolean;
  /** How many streams of events may be open. */
  maxStreams?: number;
}

/** Returns the server; the caller lets it listen, and closes it. */
export function createRelay(options: RelayOptions): Server {
  const streams: Streams = { open: 0, most: options.maxStreams ?? MAX_STREAMS };
  const isOurHost = options.isOurHost ?? hostCheck("127.0.0.1");
  return createServer((request, response) => {
    response.setHeader("x-content-type-options", "nosniff");
    if (!isOurHost(request.headers.host)) {
      sendJson(response, 403, { message: "this host name is not one of --host-names" });
      return;
    }
    answer(options, streams, request, response).catch((error: unknown) => {
      console.error(error);
      response.destroy();
    });
  });
}

interface Streams {
  open: number;
  readonly most: number;
}

async function answer(
  options: RelayOptions,
  streams: Streams,
  request: IncomingMessage,
  response: ServerResponse,
): Promise<void> {
  const path = request.url ?? "/";
  if (!URL.canParse(path, ORIGIN)) {
    sendJson(response, 400, { message: "this is no path" });
    return;
  }
  const { pathname } = new URL(path, ORIGIN);
  const events = /^\/api\/runs\/([\w-]{1,100})\/events$/.exec(pathname);
  if (request.method !== "GET" && request.method !== "HEAD") {
    sendJson(response, 405, { message: "only GET is answered here" });
  } else if (events && request.method === "HEAD") {
    response.writeHead(200, STREAM_HEADERS).end();
  } else if (events && streams.open >= streams.most) {
    response.setHeader("retry-after", "5");
    sendJson(response, 503, { message: `${streams.most} streams are open, as many as this relay has` });
  } else if (events) {
    streams.open += 1;
    try {
      await sendEvents(options, events[1] as string, request, response);
    } finally {
      streams.open -= 1;
    }
  } else if (pathname === "/api/runs") {
    await sendRuns(options.source, response);
  } else if (pathname === "/healthz") {
    sendJson(response, 200, { status: "ok" });
  } else {
    sendAsset(options.assets.get(/^\/runs\/[\w-]+$/.test(pathname) ? "/" : pathname), response);
  }
}

async function sendRuns(source: RunSource, response: ServerResponse): Promise<void> {
  try {
    const runs = await source.newestRuns(closing(response));
    sendJson(response, 200, { runs: runs.map(toWireRun) });
  } catch (reason) {
    sendJson(response, 502, { message: ConnectError.from(reason).rawMessage });
  }
}

/** Sends a run's events until the run ends, the browser goes, or the service refuses for good. */
async function sendEvents(
  options: RelayOptions,
  runId: string,
  request: IncomingMessage,
  response: ServerResponse,
): Promise<void> {
  const signal = closing(response);
  const stream = new SseStream(response, RETRY_MS);
  const pings = setInterval(() => stream.ping(), PING_INTERVAL_MS);
  try {
    await sendTail(options, runId, lastEventId(request.headers["last-event-id"]), stream, signal);
    await stream.send({ event: "end", data: await goodEnd(options.source, runId, stream, signal) });
  } catch (reason) {
    if (!signal.aborted) await stream.send({ event: "end", data: refusal(ConnectError.from(reason)) });
  } finally {
    clearInterval(pings);
    stream.end();
  }
}

async function sendTail(
  { source, times = DEFAULT_TIMES }: RelayOptions,
  runId: string,
  afterSequence: number,
  stream: SseStream,
  signal: AbortSignal,
): Promise<void> {
  let connected: boolean | null = null;
  let runSentMs = 0;
  for await (const item of followRun(source, runId, afterSequence, signal, times)) {
    if (item.kind === "broken") {
      connected = false;
      await stream.send({ event: "link", data: { connected, message: item.message } satisfies WireLink });
      continue;
    }
    if (!connected) {
      connected = true;
      await stream.send({ event: "link", data: { connected, message: "" } satisfies WireLink });
    }
    if (item.kind === "record") {
      const record = toWireRecord(item.record);
      if (record) await stream.send({ id: record.sequence, data: record });
    }
    if (Date.now() - runSentMs >= RUN_INTERVAL_MS) {
      runSentMs = Date.now();
      await sendRun(source, runId, stream, signal);
    }
  }
}

/** Sends progress and remaining time, which no record holds. A failure is no loss: the next one comes in a second. */
async function sendRun(source: RunSource, runId: string, stream: SseStream, signal: AbortSignal): Promise<void> {
  try {
    await stream.send({ event: "run", data: toWireRun(await source.run(runId, signal)) });
  } catch (reason) {
    if (ConnectError.from(reason).code === Code.NotFound) throw reason;
  }
}

async function goodEnd(source: RunSource, runId: string, stream: SseStream, signal: AbortSignal): Promise<WireEnd> {
  await sendRun(source, runId, stream, signal);
  return { reason: "ended", message: "" };
}

function refusal(error: ConnectError): WireEnd {
  return { reason: error.code === Code.NotFound ? "not-found" : "refused", message: error.rawMessage };
}

/** Returns a signal that is given when the browser has gone. */
function closing(response: ServerResponse): AbortSignal {
  const controller = new AbortController();
  response.once("close", () => controller.abort());
  return controller.signal;
}

function sendAsset(asset: Asset | undefined, response: ServerResponse): void {
  if (!asset) {
    sendJson(response, 404, { message: "there is nothing here" });
    return;
  }
  response.writeHead(200, {
    "content-type": asset.type,
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "referrer-policy": "no-referrer",
  });
  response.end(asset.body);
}

function sendJson(response: ServerResponse, status: number, body: unknown): void {
  response.writeHead(status, { "content-type": "application/json", "cache-control": "no-store" });
  response.end(JSON.stringify(body));
}
