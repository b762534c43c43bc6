// Following a run across broken connections: every record once, in order, whatever happens to the service.

import { Code, ConnectError } from "@connectrpc/connect";

import type { MetricRecord } from "./gen/ferryman/v1/metrics_pb.js";
import type { StreamMetricsResponse } from "./gen/ferryman/v1/training_pb.js";
import type { RunSource } from "./service.js";

/** A record; a word from the service that has none; or the news that it cannot be reached at the moment. */
export type TailItem =
  | { kind: "record"; record: MetricRecord }
  | { kind: "alive" }
  | { kind: "broken"; message: string; retryInMs: number };

export interface TailTimes {
  firstPauseMs: number;
  longestPauseMs: number;
  /** How long a stream may say nothing, until a heartbeat has told how often it speaks. */
  silenceMs: number;
}

export const DEFAULT_TIMES: TailTimes = { firstPauseMs: 200, longestPauseMs: 5_000, silenceMs: 60_000 };

/** Answers that would be the same again. All others are worth another call: to repeat StreamMetrics is harmless. */
const FINAL_CODES: ReadonlySet<Code> = new Set([
  Code.InvalidArgument,
  Code.NotFound,
  Code.OutOfRange,
  Code.FailedPrecondition,
  Code.PermissionDenied,
  Code.Unauthenticated,
  Code.Unimplemented,
]);

/**
 * Yields the run's records after `afterSequence`, then live; returns after the record of the terminal state.
 *
 * When the stream breaks, it says so ("broken"), waits, and calls again with the last sequence number that it has
 * yielded, for as long as `signal` lets it. Throws ConnectError for what another call would not change.
 */
export async function* followRun(
  source: RunSource,
  runId: string,
  afterSequence: number,
  signal: AbortSignal,
  times: TailTimes = DEFAULT_TIMES,
): AsyncGenerator<TailItem> {
  let lastSequence = BigInt(afterSequence);
  let pauseMs = times.firstPauseMs;
  while (!signal.aborted) {
    try {
      for await (const response of spokenStream(source, runId, lastSequence, signal, times.silenceMs)) {
        pauseMs = times.firstPauseMs;
        const { case: kind, value } = response.metricsUpdate;
        if (kind !== "record") {
          yield { kind: "alive" };
        } else if (value.sequence > lastSequence) {
          lastSequence = value.sequence;
          yield { kind: "record", record: value };
        }
      }
      return;
    } catch (reason) {
      const error = ConnectError.from(reason);
      if (signal.aborted) return;
      if (FINAL_CODES.has(error.code)) throw error;
      yield { kind: "broken", message: error.rawMessage, retryInMs: pauseMs };
    }
    await pause(pauseMs * (0.5 + Math.random() / 2), signal);
    pauseMs = Math.min(2 * pauseMs, times.longestPauseMs);
  }
}

/**
 * Yields what one call of StreamMetrics brings, and throws when it has been silent for too long.
 *
 * A live stream says something at least once per heartbeat interval, so three missed ones mean that nobody is there.
 */
async function* spokenStream(
  source: RunSource,
  runId: string,
  afterSequence: bigint,
  signal: AbortSignal,
  silenceMs: number,
): AsyncGenerator<StreamMetricsResponse> {
  const call = new AbortController();
  const giveUp = (): void => call.abort(new ConnectError("the service has gone silent", Code.Unavailable));
  const stop = (): void => call.abort(signal.reason);
  signal.addEventListener("abort", stop);
  let allowedMs = silenceMs;
  let timer = setTimeout(giveUp, allowedMs);
  try {
    for await (const response of source.streamMetrics(runId, afterSequence, call.signal)) {
      clearTimeout(timer); // while the reader is busy nobody listens
      const interval = response.metricsUpdate.case === "heartbeat" ? response.metricsUpdate.value.interval : undefined;
      if (interval) allowedMs = Math.max(3_000, 3 * (Number(interval.seconds) * 1000 + interval.nanos / 1e6));
      yield response;
      timer = setTimeout(giveUp, allowedMs);
    }
  } finally {
    clearTimeout(timer);
    signal.removeEventListener("abort", stop);
    call.abort(); // a reader that stops early leaves no call behind
  }
}

function pause(milliseconds: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const done = (): void => {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, milliseconds);
    signal.addEventListener("abort", done);
    if (signal.aborted) done();
  });
}
