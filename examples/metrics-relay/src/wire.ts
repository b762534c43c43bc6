// What the relay tells browsers: plain JSON, and how it is made from the records of the contract.

import type { Timestamp } from "@bufbuild/protobuf/wkt";

import { EventLevel, RunState, type MetricRecord } from "./gen/ferryman/v1/metrics_pb.js";
import type { TrainingRun } from "./gen/ferryman/v1/training_pb.js";

/** The states of a run, as words: "running", "succeeded". */
export type State = Lowercase<keyof typeof RunState>;

export interface StepRecord {
  kind: "step";
  step: number;
  epoch: number;
  loss: number;
  perplexity: number;
  learningRate: number;
  gradientNorm: number;
  targetTokensPerSecond: number;
}

export interface ValidationRecord {
  kind: "validation";
  step: number;
  loss: number;
  bleu: number;
  chrf: number;
  best: boolean;
}

export interface StateRecord {
  kind: "state";
  state: State;
  attempt: number;
  message: string;
}

export interface EventRecord {
  kind: "event";
  level: Lowercase<keyof typeof EventLevel>;
  code: string;
  message: string;
}

/** A record of a run; `sequence` rises by exactly one, `timeMs` is Unix time. */
export type WireRecord = { sequence: number; timeMs: number } & (
  | StepRecord
  | ValidationRecord
  | StateRecord
  | EventRecord
);

/** What is known of a run beside its records; null where the service does not know either. */
export interface WireRun {
  runId: string;
  modelName: string;
  modelVersion: number | null;
  state: State;
  step: number;
  progress: number;
  remainingSeconds: number | null;
  createTimeMs: number | null;
  error: string | null;
}

/** Whether the service can be reached at the moment. */
export interface WireLink {
  connected: boolean;
  message: string;
}

/** Why nothing more comes: "ended" is the good end, the others are refusals. */
export interface WireEnd {
  reason: "ended" | "not-found" | "refused";
  message: string;
}

/** Returns the record for browsers; null for a kind that is news to this program. */
export function toWireRecord(record: MetricRecord): WireRecord | null {
  const place = { sequence: Number(record.sequence), timeMs: timeMs(record.time) ?? 0 };
  const { case: kind, value } = record.payload;
  switch (kind) {
    case "step":
      return {
        ...place,
        kind,
        step: Number(value.step),
        epoch: value.epoch,
        loss: value.loss,
        perplexity: value.perplexity,
        learningRate: value.learningRate,
        gradientNorm: value.gradientNorm,
        targetTokensPerSecond: value.targetTokensPerSecond,
      };
    case "validation":
      return {
        ...place,
        kind,
        step: Number(value.step),
        loss: value.loss,
        bleu: value.bleu,
        chrf: value.chrf,
        best: value.best,
      };
    case "stateChange":
      return { ...place, kind: "state", state: toState(value.state), attempt: value.attempt, message: value.message };
    case "event":
      return { ...place, kind, level: toLevel(value.level), code: value.code, message: value.message };
    default:
      return null;
  }
}

/** Returns the run for browsers. */
export function toWireRun(run: TrainingRun): WireRun {
  const remaining = run.progress?.remaining;
  return {
    runId: run.runId,
    modelName: run.modelName,
    modelVersion: run.modelVersion ? Number(run.modelVersion) : null,
    state: toState(run.state),
    step: Number(run.progress?.step ?? 0n),
    progress: run.progress?.fraction ?? 0,
    remainingSeconds: remaining ? Number(remaining.seconds) + remaining.nanos / 1e9 : null,
    createTimeMs: timeMs(run.createTime),
    error: run.error ? `${run.error.reason}: ${run.error.message}` : null,
  };
}

// A newer service may know members that this program does not.

function toState(state: RunState): State {
  return (RunState[state] ?? "UNSPECIFIED").toLowerCase() as State;
}

function toLevel(level: EventLevel): EventRecord["level"] {
  return (EventLevel[level] ?? "UNSPECIFIED").toLowerCase() as EventRecord["level"];
}

function timeMs(time: Timestamp | undefined): number | null {
  return time ? Number(time.seconds) * 1000 + Math.floor(time.nanos / 1e6) : null;
}
