// Server-Sent Events (WHATWG HTML, section 9.2): the framing, and a response that waits for slow readers.

import { once } from "node:events";
import type { ServerResponse } from "node:http";

export const STREAM_HEADERS = {
  "content-type": "text/event-stream; charset=utf-8",
  "cache-control": "no-store",
  "x-accel-buffering": "no", // a proxy must not hold events back
};

export interface SseEvent {
  /** Becomes the browser's Last-Event-ID, with which it reconnects. */
  id?: number;
  /** The name of the event; "message" if there is none. */
  event?: string;
  data: unknown;
}

/** Returns the bytes of an event, whose data travels as JSON: in one line, for JSON has no raw line breaks. */
export function frame({ id, event, data }: SseEvent): string {
  const lines = [`data: ${JSON.stringify(data)}`];
  if (event !== undefined) lines.unshift(`event: ${event}`);
  if (id !== undefined) lines.unshift(`id: ${id}`);
  return `${lines.join("\n")}\n\n`;
}

/** Returns the number in a Last-Event-ID header: 0 if there is none, or none of ours. */
export function lastEventId(header: string | string[] | undefined): number {
  const text = typeof header === "string" ? header : "";
  return /^\d{1,15}$/.test(text) ? Number(text) : 0;
}

/** One browser's stream of events. */
export class SseStream {
  readonly #response: ServerResponse;

  constructor(response: ServerResponse, retryMs: number) {
    this.#response = response;
    response.writeHead(200, STREAM_HEADERS);
    response.write(`retry: ${retryMs}\n\n`);
  }

  /** Sends an event; resolves when there is room for the next one, so that a slow reader slows down the source. */
  async send(event: SseEvent): Promise<void> {
    if (this.#response.destroyed || this.#response.write(frame(event))) return;
    // The one that does not come must not go on listening: a slow reader waits often.
    const waiting = new AbortController();
    const events = ["drain", "close"].map((name) => once(this.#response, name, { signal: waiting.signal }));
    try {
      await Promise.race(events);
    } finally {
      waiting.abort();
      await Promise.allSettled(events);
    }
  }

  /** Sends what no reader sees, so that no proxy takes the connection for dead. */
  ping(): void {
    if (!this.#response.destroyed && !this.#response.writableNeedDrain) this.#response.write(": ping\n\n");
  }

  end(): void {
    this.#response.end();
  }
}
