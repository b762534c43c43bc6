// A line chart in SVG: curves over the training step, with a reading of all of them where the pointer is.

import type { Point } from "./run.js";
import { brief, nearest, thin, ticks } from "./series.js";

export interface Curve {
  name: string;
  /** Its colour, as in style.css: "curve-1" and so on. */
  style: string;
  points: readonly Point[];
  /** A faint curve is the raw one behind a smoothed one; dots mark single measurements. */
  faint?: boolean;
  dots?: boolean;
}

const HEIGHT = 240;
const MARGIN = { top: 10, right: 14, bottom: 24, left: 52 };
const MOST_POINTS = 800;
const SVG = "http://www.w3.org/2000/svg";

interface Scale {
  low: number;
  high: number;
  ticks: number[];
  place: (value: number) => number;
}

export class Chart {
  readonly #figure: HTMLElement;
  readonly #svg: SVGSVGElement;
  readonly #reading: HTMLElement;
  #curves: readonly Curve[] = [];
  #pointerX: number | null = null;

  /** Draws into a <figure>; its caption stays. */
  constructor(figure: HTMLElement) {
    this.#figure = figure;
    this.#svg = document.createElementNS(SVG, "svg");
    this.#svg.setAttribute("role", "img");
    this.#reading = document.createElement("p");
    this.#reading.className = "reading";
    figure.append(this.#svg, this.#reading);
    new ResizeObserver(() => this.#draw()).observe(figure);
    this.#svg.addEventListener("pointermove", (event) => this.#point(event.offsetX));
    this.#svg.addEventListener("pointerleave", () => this.#point(null));
  }

  show(curves: readonly Curve[]): void {
    this.#curves = curves;
    const clear = curves.find((curve) => !curve.faint);
    this.#figure.dataset["points"] = String(Math.max(0, ...curves.map((curve) => curve.points.length)));
    this.#svg.setAttribute("aria-label", clear ? `${clear.name}, ${clear.points.length} points` : "");
    this.#draw();
  }

  #point(x: number | null): void {
    this.#pointerX = x;
    this.#draw();
  }

  #draw(): void {
    const width = Math.max(240, this.#figure.clientWidth);
    this.#svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.#svg.setAttribute("height", String(HEIGHT));
    const thinned = this.#curves.map((curve) => ({ ...curve, points: thin(curve.points, MOST_POINTS) }));
    const all = thinned.flatMap((curve) => curve.points);
    this.#figure.classList.toggle("empty", all.length === 0);
    if (all.length === 0) {
      this.#svg.replaceChildren();
      this.#reading.textContent = "";
      return;
    }
    const x = scale(all, "x", Math.max(2, Math.floor(width / 110)), MARGIN.left, width - MARGIN.right, false);
    const y = scale(all, "y", 4, HEIGHT - MARGIN.bottom, MARGIN.top, true);
    this.#svg.replaceChildren(...grid(x, y, width), ...thinned.flatMap((curve) => lines(curve, x, y)));
    this.#read(x, y);
  }

  /** Writes the values at the pointer, else the last ones, under the chart; marks the pointer's step. */
  #read(x: Scale, y: Scale): void {
    const clear = this.#curves.filter((curve) => !curve.faint && curve.points.length > 0);
    const step =
      this.#pointerX === null
        ? Infinity
        : x.low + ((this.#pointerX - x.place(x.low)) / (x.place(x.high) - x.place(x.low))) * (x.high - x.low);
    const found = clear.map((curve) => ({ curve, point: nearest(curve.points, step) as Point }));
    if (this.#pointerX !== null) {
      this.#svg.append(
        ...found.slice(0, 1).map(({ point }) =>
          element("line", {
            class: "pointer",
            x1: x.place(point.x),
            x2: x.place(point.x),
            y1: MARGIN.top,
            y2: HEIGHT - MARGIN.bottom,
          }),
        ),
        ...found.map(({ curve, point }) =>
          element("circle", { class: `dot ${curve.style}`, cx: x.place(point.x), cy: y.place(point.y), r: 4 }),
        ),
      );
    }
    this.#reading.replaceChildren(...found.map(({ curve, point }) => label(curve, point)));
  }
}

function scale(
  points: readonly Point[],
  axis: "x" | "y",
  count: number,
  start: number,
  end: number,
  round: boolean,
): Scale {
  let low = Infinity;
  let high = -Infinity;
  for (const point of points) {
    low = Math.min(low, point[axis]);
    high = Math.max(high, point[axis]);
  }
  const marks = ticks(low, high, count);
  if (round || low === high) {
    low = marks[0] as number;
    high = marks[marks.length - 1] as number;
  }
  const place = (value: number): number => start + ((value - low) / (high - low)) * (end - start);
  return { low, high, ticks: marks.filter((mark) => mark >= low && mark <= high), place };
}

function grid(x: Scale, y: Scale, width: number): SVGElement[] {
  return [
    ...y.ticks.flatMap((tick) => [
      element("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y.place(tick), y2: y.place(tick) }),
      text(brief(tick), { x: MARGIN.left - 8, y: y.place(tick) + 4, "text-anchor": "end" }),
    ]),
    ...x.ticks.map((tick) => text(brief(tick), { x: x.place(tick), y: HEIGHT - 6, "text-anchor": "middle" })),
  ];
}

function lines(curve: Curve, x: Scale, y: Scale): SVGElement[] {
  const places = curve.points.map((point) => `${x.place(point.x).toFixed(1)},${y.place(point.y).toFixed(1)}`);
  const path = element("path", {
    class: `curve ${curve.style}${curve.faint ? " faint" : ""}`,
    d: places.length > 0 ? `M${places.join("L")}` : "",
  });
  if (!curve.dots || curve.points.length > 60) return [path];
  return [
    path,
    ...curve.points.map((point) =>
      element("circle", { class: `dot ${curve.style}`, cx: x.place(point.x), cy: y.place(point.y), r: 3 }),
    ),
  ];
}

function label(curve: Curve, point: Point): HTMLElement {
  const span = document.createElement("span");
  const key = document.createElement("i");
  key.className = curve.style;
  const value = document.createElement("b");
  value.textContent = brief(point.y);
  span.append(key, `${curve.name} `, value, ` at step ${brief(point.x)}`);
  return span;
}

function element(name: string, attributes: Record<string, string | number>): SVGElement {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  return made;
}

function text(content: string, attributes: Record<string, string | number>): SVGElement {
  const made = element("text", attributes);
  made.textContent = content;
  return made;
}
