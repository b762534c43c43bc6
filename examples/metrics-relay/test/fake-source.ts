// A service in memory: one run, whose stream breaks where a test wants it to.

import { create } from "@bufbuild/protobuf";
import { durationFromMs } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError } from "@connectrpc/connect";

import { MetricRecordSchema, RunState, type MetricRecord } from "../src/gen/ferryman/v1/metrics_pb.js";
import {
  StreamMetricsResponseSchema,
  TrainingRunSchema,
  type StreamMetricsResponse,
  type TrainingRun,
} from "../src/gen/ferryman/v1/training_pb.js";
import type { RunSource } from "../src/service.js";

export const RUN_ID = "run_1";

/** Returns the records of a run of `steps` steps: running, the steps, succeeded. */
export function records(steps: number): MetricRecord[] {
  const payloads: MetricRecord["payload"][] = [
    create(MetricRecordSchema, { payload: { case: "stateChange", value: { state: RunState.RUNNING, attempt: 1 } } }).payload,
    ...Array.from(
      { length: steps },
      (_, i) =>
        create(MetricRecordSchema, {
          payload: { case: "step", value: { step: BigInt(i + 1), epoch: 1, loss: 8 / (i + 1), learningRate: 0.001 } },
        }).payload,
    ),
    create(MetricRecordSchema, { payload: { case: "stateChange", value: { state: RunState.SUCCEEDED, attempt: 1 } } }).payload,
  ];
  return payloads.map((payload, i) => create(MetricRecordSchema, { sequence: BigInt(i + 1), payload }));
}

export class FakeSource implements RunSource {
  /** The `after_sequence` of each StreamMetrics call. */
  readonly calls: number[] = [];
  /** What happens to the next calls of StreamMetrics: after so many records the error is thrown. */
  readonly breaks: { after: number; error: ConnectError }[] = [];
  /** Of how many records the run has; the stream waits for more. */
  written: number;
  readonly #records: MetricRecord[];

  constructor(recorded: MetricRecord[], written = recorded.length) {
    this.#records = recorded;
    this.written = written;
  }

  breakAfter(after: number, code = Code.Unavailable, message = "the connection broke"): void {
    this.breaks.push({ after, error: new ConnectError(message, code) });
  }

  async run(runId: string): Promise<TrainingRun> {
    if (runId !== RUN_ID) throw new ConnectError(`no training run ${runId}`, Code.NotFound);
    return create(TrainingRunSchema, { runId, modelName: "en-de", state: RunState.RUNNING });
  }

  async newestRuns(): Promise<TrainingRun[]> {
    return [await this.run(RUN_ID)];
  }

  async *streamMetrics(runId: string, afterSequence: bigint, signal: AbortSignal): AsyncGenerator<StreamMetricsResponse> {
    this.calls.push(Number(afterSequence));
    const broken = this.breaks.shift();
    await this.run(runId);
    let sent = Number(afterSequence);
    for (let count = 0; ; count++) {
      if (broken && count === broken.after) throw broken.error;
      while (sent >= this.written && this.written < this.#records.length) {
        await new Promise((resolve) => setTimeout(resolve, 5));
        if (signal.aborted) throw ConnectError.from(signal.reason);
        yield create(StreamMetricsResponseSchema, {
          metricsUpdate: { case: "heartbeat", value: { lastSequence: BigInt(sent), interval: durationFromMs(5) } },
        });
      }
      if (signal.aborted) throw ConnectError.from(signal.reason);
      if (sent === this.#records.length) return;
      yield create(StreamMetricsResponseSchema, { metricsUpdate: { case: "record", value: this.#records[sent] as MetricRecord } });
      sent += 1;
    }
  }
}
