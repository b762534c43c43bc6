// Curves as numbers: smoothing, thinning, and the ticks of an axis. No DOM in here.

import type { Point } from "./run.js";

/** Returns the moving average whose memory is a fiftieth of the curve, at most 100 points: it follows, and is calm. */
export function smooth(points: readonly Point[]): Point[] {
  const keep = 1 - 1 / Math.min(100, Math.max(1, points.length / 50));
  let mean = 0;
  let weight = 0;
  return points.map(({ x, y }) => {
    if (Number.isFinite(y)) {
      mean = keep * mean + (1 - keep) * y;
      weight = keep * weight + (1 - keep);
    }
    return { x, y: weight > 0 ? mean / weight : y };
  });
}

/** Returns at most about `limit` points that look like all of them: of each piece the lowest and the highest. */
export function thin(points: readonly Point[], limit: number): Point[] {
  const finite = points.filter(({ y }) => Number.isFinite(y));
  if (finite.length <= limit) return finite;
  const size = Math.ceil(finite.length / (limit / 2));
  const kept: Point[] = [];
  for (let start = 0; start < finite.length; start += size) {
    const piece = finite.slice(start, start + size);
    const low = piece.reduce((a, b) => (b.y < a.y ? b : a));
    const high = piece.reduce((a, b) => (b.y > a.y ? b : a));
    kept.push(...(low.x < high.x ? [low, high] : low === high ? [low] : [high, low]));
  }
  const last = finite[finite.length - 1] as Point;
  if (kept[kept.length - 1] !== last) kept.push(last);
  return kept;
}

/** Returns round numbers that divide an interval into about `count` parts, the first at or below `low`. */
export function ticks(low: number, high: number, count: number): number[] {
  const span = high - low || Math.abs(high) || 1;
  const power = 10 ** Math.floor(Math.log10(span / count));
  const step = ([1, 2, 5, 10].find((factor) => factor * power * count >= span) ?? 10) * power;
  const first = Math.floor(low / step);
  const last = Math.max(first + 1, Math.ceil(high / step));
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/** Returns the point nearest to `x`; the points' x rise. */
export function nearest(points: readonly Point[], x: number): Point | null {
  let low = 0;
  let high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((points[middle] as Point).x < x) low = middle + 1;
    else high = middle;
  }
  const after = points[low];
  const before = points[low - 1];
  return before && after && x - before.x < after.x - x ? before : (after ?? null);
}

/** Returns a number in as few characters as say it. */
export function brief(value: number): string {
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e7)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("+", "");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(size < 1 ? 3 : 4)));
}
