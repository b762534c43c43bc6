// The Ferryman service behind the relay: the three calls that it needs, over gRPC, with the generated stubs.

import { createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";

import { TrainingService, type StreamMetricsResponse, type TrainingRun } from "./gen/ferryman/v1/training_pb.js";

const UNARY_TIMEOUT_MS = 10_000;
const LISTED_RUNS = 50;

/** What the relay asks of the service; tests give it another one. Every method throws ConnectError. */
export interface RunSource {
  run(runId: string, signal: AbortSignal): Promise<TrainingRun>;
  newestRuns(signal: AbortSignal): Promise<TrainingRun[]>;
  streamMetrics(runId: string, afterSequence: bigint, signal: AbortSignal): AsyncIterable<StreamMetricsResponse>;
}

/** Returns the source that speaks to the service at "host:port" or a URL; it connects when it is first asked. */
export function ferryman(address: string): RunSource {
  const transport = createGrpcTransport({
    baseUrl: address.includes("://") ? address : `http://${address}`,
    // A dead peer is noticed by its missing answer, also on a quiet stream. The service allows a ping every 10 s.
    pingIntervalMs: 30_000,
    pingTimeoutMs: 10_000,
  });
  const training = createClient(TrainingService, transport);
  return {
    async run(runId, signal) {
      const { run } = await training.getTrainingRun({ runId }, { signal, timeoutMs: UNARY_TIMEOUT_MS });
      if (!run) throw new Error("GetTrainingRun answered without a run");
      return run;
    },
    async newestRuns(signal) {
      const request = { pageSize: LISTED_RUNS };
      return (await training.listTrainingRuns(request, { signal, timeoutMs: UNARY_TIMEOUT_MS })).runs;
    },
    // No deadline: it lasts as long as the run. `followRun` notices when it says nothing.
    streamMetrics: (runId, afterSequence, signal) => training.streamMetrics({ runId, afterSequence }, { signal }),
  };
}
