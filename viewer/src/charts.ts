// Curves over the run, drawn by uPlot. Each has a title, a legend that shows the values of the chosen iteration, and a
// line style of its own, so that colour is never needed.
import uPlot from "uplot";
import { h, s } from "./dom";

const HEIGHT = 150;
const DASHES: number[][] = [[], [7, 4], [2, 3], [10, 3, 2, 3]];

export interface Line {
  label: string;
  values: (number | null)[]; // what the legend shows, at the places of `x`
  drawn: (number | null)[]; // the curve, such as a rolling mean
  points: boolean; // whether the values themselves are drawn as points, too
  colour: number;
  dash: number;
  format: (value: number) => string;
}

export interface Plan {
  title: string;
  x: number[];
  lines: Line[];
}

const colours = (): CSSStyleDeclaration => getComputedStyle(document.documentElement);

/** One figure of the page. */
export class Chart {
  readonly element: HTMLElement;
  private readonly values: HTMLElement[];
  private plot: uPlot | null = null;
  private readonly holder = h("div", { class: "plot" });

  constructor(
    private readonly plan: Plan,
    private readonly choose: (place: number) => void,
  ) {
    this.values = plan.lines.map(() => h("output", {}));
    const legend = h(
      "ul",
      { class: "legend" },
      ...plan.lines.map((line, index) =>
        h(
          "li",
          {},
          s(
            "svg",
            { width: 26, height: 10, viewBox: "0 0 26 10", "aria-hidden": true },
            s("path", {
              class: `line-${line.colour}`,
              d: "M0,5H26",
              "stroke-dasharray": DASHES[line.dash].join(" "),
            }),
          ),
          h("span", {}, line.label),
          this.values[index],
        ),
      ),
    );
    this.element = h(
      "figure",
      { class: "chart" },
      h("figcaption", {}, h("h3", {}, plan.title), legend),
      this.holder,
    );
    this.holder.setAttribute("role", "img");
    this.holder.setAttribute("aria-label", this.summary());
  }

  /** Draw anew, as wide as the page has room. */
  draw(): void {
    this.plot?.destroy();
    const style = colours();
    const colour = (name: string): string => style.getPropertyValue(name).trim();
    const axis: uPlot.Axis = {
      stroke: colour("--quiet"),
      grid: { stroke: colour("--line"), width: 1 },
      ticks: { stroke: colour("--line"), width: 1 },
      font: "11px system-ui, sans-serif",
    };
    const series: uPlot.Series[] = [{}];
    const data: (number | null)[][] = [this.plan.x];
    for (const line of this.plan.lines) {
      const stroke = colour(`--series-${line.colour}`);
      if (line.points) {
        series.push({ stroke, width: 0, paths: () => null, points: { show: true, size: 3, fill: stroke } });
        data.push(line.values);
      }
      series.push({ stroke, width: 2, dash: DASHES[line.dash], points: { show: false } });
      data.push(line.drawn);
    }
    const options: uPlot.Options = {
      width: Math.max(220, Math.floor(this.holder.clientWidth || this.element.clientWidth || 320)),
      height: HEIGHT,
      legend: { show: false },
      cursor: { drag: { x: false, y: false }, points: { show: false }, y: false },
      scales: { x: { time: false }, y: { range: (_, low, high) => range(low, high) } },
      axes: [
        { ...axis, size: 26, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 50_000] },
        { ...axis, size: 62, values: (_, ticks) => ticks.map((tick) => this.plan.lines[0].format(tick)) },
      ],
      series,
    };
    this.plot = new uPlot(options, data as uPlot.AlignedData, this.holder);
    this.plot.over.addEventListener("click", () => {
      const place = this.plot?.cursor.idx;
      if (place != null) this.choose(place);
    });
  }

  /** Move the marker to an iteration and show its values. */
  select(place: number): void {
    this.plan.lines.forEach((line, index) => {
      const value = line.values[place] ?? null;
      const text = value === null ? "–" : line.format(value);
      if (this.values[index].textContent !== text) this.values[index].textContent = text;
    });
    if (!this.plot) return;
    this.plot.setCursor({ left: this.plot.valToPos(this.plan.x[place] ?? 0, "x"), top: 10 }, false);
  }

  private summary(): string {
    const parts = this.plan.lines.map((line) => {
      const known = line.values.filter((value): value is number => value !== null);
      if (!known.length) return `${line.label}: nothing known`;
      const mean = known.reduce((sum, value) => sum + value, 0) / known.length;
      const [low, high] = known.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [known[0], known[0]]);
      return `${line.label}: ${line.format(low)} to ${line.format(high)}, mean ${line.format(mean)}`;
    });
    return `${this.plan.title}. ${parts.join("; ")}.`;
  }
}

function range(low: number, high: number): [number, number] {
  if (!Number.isFinite(low) || !Number.isFinite(high)) return [0, 1];
  const bottom = low > 0 && low < 0.6 * high ? 0 : low;
  const room = (high - bottom || Math.abs(high) || 1) * 0.08;
  return [bottom === 0 ? 0 : bottom - room, high + room];
}
