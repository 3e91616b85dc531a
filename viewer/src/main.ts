// The page: one view for each trace, side by side where there are two. What is chosen stands in the address, such as
// #iteration=12, so that a place in a run can be linked to.
import { Chart, type Line, type Plan } from "./charts";
import { detail, placeOf, rolling, runs, type Run, type Sequence } from "./data";
import { get, h } from "./dom";
import { TreePanel } from "./panel";
import { Story } from "./story";
import { acceptance, figures } from "./tables";
import { legend, type Kind } from "./tree";
import { milliseconds, plural } from "./words";

const NAMES = ["A", "B"];
const FAST_STEP = 10; // iterations of Page Up and Page Down
const QUIET_MS = 200; // after the last step the address is written and the iteration is read out

const shown = new Set<Kind>(["accepted", "rejected", "pruned", "refused"]);

/** A trace: which sequence and iteration of it are looked at, and the parts of the page that show it. */
class View {
  sequence = 0;
  place = 0;
  story!: Story;
  private readonly text = h("div", { class: "text" });
  private readonly heading = h("h3", {});
  private readonly about = h("p", { class: "about" });
  readonly panel: TreePanel;

  constructor(
    readonly run: Run,
    readonly index: number,
    private readonly choose: (place: number) => void,
  ) {
    const name = this.name;
    this.panel = new TreePanel(name, "h4");
    get("texts").append(this.text);
    get("trees").append(
      h(
        "section",
        { class: "iteration-view", "aria-label": `Iteration${name}` },
        this.heading,
        this.about,
        h("div", { class: "tree-and-facts" }, this.panel.tree, this.panel.facts),
      ),
    );
  }

  get name(): string {
    return runs.length > 1 ? ` of ${NAMES[this.index]}` : "";
  }

  get data(): Sequence {
    return this.run.sequences[this.sequence];
  }

  get bonus(): number | null {
    const { committed, accepted } = this.data;
    return committed[this.place]?.[accepted[this.place]] ?? null;
  }

  /** Show another sequence of the file. */
  open(sequence: number): void {
    this.sequence = sequence;
    this.place = 0;
    this.story = new Story(this.run, this.data, `run-${this.index}`, this.name, this.choose);
    const title = runs.length > 1 ? [h("h3", {}, `${NAMES[this.index]}: ${this.run.name}`)] : [];
    this.text.replaceChildren(...title, this.story.element);
  }

  /** Show an iteration. */
  select(place: number): void {
    this.place = Math.max(0, Math.min(place, this.data.iteration.length - 1));
    this.story.select(this.place);
    this.show();
  }

  /** Draw the iteration at hand. */
  show(): void {
    const { data, place, run } = this;
    if (!data.iteration.length) {
      this.heading.textContent = "No iteration";
      this.about.textContent = "This generation committed no token by a tree.";
      this.panel.clear();
      return;
    }
    const nodes = detail(this.index, this.sequence, place);
    this.heading.textContent = `Iteration ${data.iteration[place]}${this.name}`;
    this.about.replaceChildren(...this.summary());
    this.panel.show(run, nodes, this.bonus, shown);
  }

  /** Bring what is chosen into sight. To be called when everything is drawn, since it costs a layout. */
  reveal(): void {
    this.story.reveal();
    this.panel.centre();
  }

  private summary(): (string | Node)[] {
    const { data, place } = this;
    const parts = [
      `${data.accepted[place]} of ${plural(data.nodes[place], "verified node")} accepted, ` +
        `${plural(data.committed[place].length, "token")} committed. `,
      h("strong", {}, `The path ended: ${data.endings[data.ended[place]]}. `),
      ...Object.entries(data.seconds)
        .filter(([, values]) => values[place] !== null)
        .map(([stage, values]) => `${stage} ${milliseconds(values[place]!)} `),
    ];
    for (const [at, fault] of data.faults)
      if (at === place) parts.push(h("span", { class: "fault" }, ` ⚠ ${fault}`));
    return parts;
  }
}

const views: View[] = [];
let lead = 0; // the view that the keys and the address speak of; the other follows by the text's position
let charts: Chart[] = [];
let isIn = (_place: number): boolean => true; // the filter, of the leading view
let waiting: ReturnType<typeof setTimeout> | undefined;

const isComparing = (): boolean => runs.length > 1;
const current = (): View => views[lead];

/** Go to an iteration of a view; the other one goes to where the same token was committed. */
function go(place: number, which = lead): void {
  if (which !== lead) {
    lead = which;
    fillFilter(); // what it counts and passes over are iterations of the leading view
  }
  const view = current();
  view.select(place);
  const position = view.data.start[view.place] ?? 0;
  for (const other of views) if (other !== view) other.select(placeOf(other.data, position));
  for (const chart of charts) chart.select(isComparing() ? position : view.place);
  const slider = get<HTMLInputElement>("slider");
  slider.max = String(Math.max(0, view.data.iteration.length - 1));
  slider.value = String(view.place);
  const number = view.data.iteration[view.place] ?? 0;
  slider.setAttribute("aria-valuetext", `iteration ${number}`);
  get<HTMLInputElement>("number").value = String(number);
  get("of").textContent = `of ${isComparing() ? `${NAMES[lead]}, ` : ""}${view.data.iteration[0] ?? 0} to ${
    view.data.iteration.at(-1) ?? 0
  }`;
  for (const one of views) one.reveal();
  clearTimeout(waiting);
  waiting = setTimeout(settle, QUIET_MS);
}

/** Once nobody steps any more: write the address, say where we are. */
function settle(): void {
  const view = current();
  const words = new URLSearchParams();
  if (view.run.sequences.length > 1) words.set("sequence", String(view.sequence));
  if (lead) words.set("run", NAMES[lead]);
  words.set("iteration", String(view.data.iteration[view.place] ?? 0));
  history.replaceState(null, "", `#${words}`);
  const { data, place } = view;
  if (data.iteration.length)
    get("live").textContent =
      `Iteration ${data.iteration[place]}: ${data.accepted[place]} accepted of ${data.nodes[place]} nodes. ` +
      `The path ended: ${data.endings[data.ended[place]]}.`;
}

/** The place of an iteration by its own number, or the nearest one. */
function placeOfNumber(view: View, number: number): number {
  const numbers = view.data.iteration;
  const found = numbers.findIndex((one) => one >= number);
  return found < 0 ? numbers.length - 1 : found;
}

/** Go where the address says. */
function followAddress(): void {
  const words = new URLSearchParams(location.hash.slice(1));
  const which = Math.max(0, NAMES.slice(0, runs.length).indexOf((words.get("run") ?? "A").toUpperCase()));
  const sequence = Number.parseInt(words.get("sequence") ?? "", 10);
  if (sequence >= 0 && sequence < runs[which].sequences.length && sequence !== views[which].sequence)
    openSequence(sequence);
  const number = Number.parseInt(words.get("iteration") ?? "", 10);
  go(Number.isNaN(number) ? 0 : placeOfNumber(views[which], number), which);
}

/** Step through what the filter lets pass. */
function step(by: number): void {
  const view = current();
  let place = view.place + by;
  while (place >= 0 && place < view.data.iteration.length && !isIn(place)) place += Math.sign(by);
  if (place < 0 || place >= view.data.iteration.length) {
    if (Math.abs(by) === 1 || !isIn(Math.max(0, Math.min(place, view.data.iteration.length - 1)))) return;
    place = Math.max(0, Math.min(place, view.data.iteration.length - 1));
  }
  go(place);
}

function edge(by: 1 | -1): void {
  const all = current().data.iteration.map((_, place) => place).filter(isIn);
  if (all.length) go(by > 0 ? all[0] : all[all.length - 1]);
}

// the filter

const FILTERS: [name: string, words: string, test: (data: Sequence, place: number) => boolean][] = [
  ["all", "all iterations", () => true],
  ["none", "nothing accepted", (data, place) => data.accepted[place] === 0],
  ["full", "the whole depth accepted", (data, place) => data.depth[place] > 0 && data.accepted[place] === data.depth[place]],
  ["oracle", "below the oracle tree", (data, place) => (data.oracle[place] ?? 0) > data.accepted[place] + 1],
  ["fault", "with a fault", (data, place) => data.faults.some(([at]) => at === place)],
];

function fillFilter(): void {
  const select = get<HTMLSelectElement>("filter");
  const { endings } = current().data;
  select.replaceChildren(
    ...FILTERS.map(([name, words]) => h("option", { value: name }, words)),
    ...endings.map((words, index) => h("option", { value: `ended-${index}` }, `ended: ${words}`)),
  );
  applyFilter();
}

function applyFilter(): void {
  const chosen = get<HTMLSelectElement>("filter").value;
  const found = FILTERS.find(([name]) => name === chosen);
  const test = found?.[2] ?? ((data: Sequence, place: number) => `ended-${data.ended[place]}` === chosen);
  const ofView = current();
  isIn = (place) => test(ofView.data, place);
  const all = ofView.data.iteration.map((_, place) => place);
  const left = all.filter(isIn);
  get("found").textContent = plural(left.length, "iteration");
  ofView.story.filter(chosen === "all" ? () => true : isIn);
  if (left.length && !isIn(ofView.place)) go(left.find((place) => place >= ofView.place) ?? left[0]);
}

// the whole run

/** Values at each new token of the run, so that two runs can be laid upon each other. */
function byPosition(data: Sequence, values: (number | null)[], length: number): (number | null)[] {
  const spread = Array.from<number | null>({ length }).fill(null);
  values.forEach((value, place) => {
    const end = data.start[place + 1] ?? data.start[place] + data.committed[place].length;
    for (let position = data.start[place]; position < end; position++) spread[position] = value;
  });
  return spread;
}

function plans(): Plan[] {
  const sequences = views.map((view) => view.data);
  const length = Math.max(...sequences.map((data) => (data.start.at(-1) ?? 0) + (data.committed.at(-1)?.length ?? 0)));
  const x = isComparing() ? Array.from({ length }, (_, position) => position) : sequences[0].iteration;
  type Source = [words: string, values: (data: Sequence) => (number | null)[] | undefined];
  const plan = (title: string, sources: Source[], format: (value: number) => string, width = 0): Plan => {
    const lines: Line[] = [];
    sequences.forEach((data, which) =>
      // of two runs the first curve alone is compared: four of them in one picture cannot be read
      (isComparing() ? sources.slice(0, 1) : sources).forEach(([words, find], source) => {
        const values = find(data);
        if (!values) return;
        const window = width || Math.max(1, Math.round(data.iteration.length / 40));
        const spread = (list: (number | null)[]) => (isComparing() ? byPosition(data, list, length) : list);
        const colour = isComparing() ? which : source;
        lines.push({
          label: isComparing() ? `${NAMES[which]} ${words}` : words,
          values: spread(values),
          drawn: spread(rolling(values, window)),
          points: !isComparing() && source === 0 && window > 1,
          colour: colour % 4,
          dash: colour % 4,
          format,
        });
      }),
    );
    return { title, x, lines };
  };
  const number = (value: number): string => String(Number(value.toPrecision(3)));
  const stages = [...new Set(sequences.flatMap((data) => Object.keys(data.seconds)))];
  const names = [...new Set(sequences.flatMap((data) => Object.keys(data.parameters)))];
  const all = [
    plan(
      "Tokens per iteration",
      [
        ["committed", (data) => data.committed.map((tokens) => tokens.length)],
        ["oracle tree of the same size", (data) => data.oracle],
      ],
      number,
    ),
    plan(
      "Depth",
      [
        ["accepted", (data) => data.accepted],
        ["of the tree", (data) => data.depth],
      ],
      number,
    ),
    plan(
      "Nodes",
      [
        ["verified", (data) => data.nodes],
        ["drafted", (data) => data.drafted],
      ],
      number,
    ),
    ...(isComparing()
      ? stages.map((stage) => plan(`Time: ${stage}`, [["", (data) => data.seconds[stage]]], milliseconds))
      : [plan("Time by stage", stages.map((stage): Source => [stage, (data) => data.seconds[stage]]), milliseconds)]),
    ...names.map((name) => plan(name, [["", (data) => data.parameters[name]]], number, 1)),
  ];
  return all.filter((one) => one.lines.some((line) => line.values.some((value) => value !== null)));
}

function drawRun(): void {
  const sequences = views.map((view) => view.data);
  const choose = (place: number): void => go(isComparing() ? placeOf(current().data, place) : place);
  charts = plans().map((plan) => new Chart(plan, choose));
  get("charts").replaceChildren(...charts.map((chart) => chart.element));
  const window = Math.round(Math.max(...sequences.map((data) => data.iteration.length)) / 40);
  const means = window > 1 ? ` Curves are means over the last ${window} iterations.` : "";
  get("axis").textContent = `From left to right: ${isComparing() ? "new tokens" : "iterations"}.${means} Click to go there.`;
  for (const chart of charts) chart.draw();
  const tables: [string, string, "by_depth" | "by_rank" | "by_confidence"][] = [
    ["Acceptance by depth", "depth", "by_depth"],
    ["Acceptance by rank among the drafter's proposals", "rank", "by_rank"],
    ["Acceptance by draft probability", "draft probability", "by_confidence"],
  ];
  get("acceptance").replaceChildren(
    ...tables.map(([caption, column, key]) => acceptance(caption, column, sequences.map((data) => data[key]), NAMES)),
  );
  get("figures").replaceChildren(figures(sequences, NAMES), ...views.map(endings));
  get("parted").replaceChildren(...(isComparing() ? [parted()] : []));
}

/** What ended the accepted paths, as buttons that filter by it. */
function endings(view: View): HTMLElement {
  const { data } = view;
  const counts = data.endings.map((_, index) => data.ended.filter((one) => one === index).length);
  const order = data.endings.map((_, index) => index).sort((a, b) => counts[b] - counts[a]);
  const rows = order.map((index) => {
    const words = h("button", { type: "button", class: "link" }, data.endings[index]);
    words.addEventListener("click", () => {
      lead = view.index;
      fillFilter();
      get<HTMLSelectElement>("filter").value = `ended-${index}`;
      applyFilter();
      go(current().place);
      get("iterations").scrollIntoView();
    });
    return [words, counts[index].toLocaleString("en"), `${((100 * counts[index]) / data.ended.length).toFixed(1)} %`];
  });
  return h(
    "table",
    {},
    h("caption", {}, `Why accepted paths ended${view.name}`),
    h("thead", {}, h("tr", {}, ...["reason", "iterations", "share"].map((cell) => h("th", { scope: "col" }, cell)))),
    h(
      "tbody",
      {},
      ...rows.map(([words, ...cells]) =>
        h("tr", {}, h("th", { scope: "row" }, words), ...cells.map((cell) => h("td", {}, cell))),
      ),
    ),
  );
}

/** Where two runs part: in the text, which ought not to be, and in how they came to it. */
function parted(): HTMLElement {
  const [a, b] = views.map((view) => view.data);
  const [first, second] = [a.committed.flat(), b.committed.flat()];
  const at = first.findIndex((token, position) => token !== second[position] && position < second.length);
  const isSamePrompt = JSON.stringify(a.prompt) === JSON.stringify(b.prompt);
  const place = a.iteration.findIndex(
    (_, index) =>
      index >= b.iteration.length ||
      a.committed[index].length !== b.committed[index].length ||
      a.nodes[index] !== b.nodes[index] ||
      JSON.stringify(detail(0, views[0].sequence, index).token) !== JSON.stringify(detail(1, views[1].sequence, index).token),
  );
  const words: (string | Node)[] = [];
  if (!isSamePrompt) words.push(h("strong", {}, "The prompts differ, so the runs are not of the same text. "));
  else if (at >= 0) {
    words.push(h("strong", {}, `The texts differ from new token ${at} on. `));
    words.push("Both ought to be the target's own: see whether they were made with the same seed, dtype and runner. ");
  } else if (first.length === second.length) words.push(`Both committed the same ${plural(first.length, "token")}. `);
  else words.push(`The same text, of ${first.length} and ${second.length} tokens. `);
  if (place >= 0) {
    const link = h("button", { type: "button", class: "link" }, `iteration ${a.iteration[place]}`);
    link.addEventListener("click", () => go(place, 0));
    words.push("Their trees part at ", link, ".");
  } else words.push("Their trees are the same in every iteration of A.");
  return h("p", {}, ...words);
}

function openSequence(sequence: number): void {
  for (const view of views) view.open(Math.min(sequence, view.run.sequences.length - 1));
  get<HTMLSelectElement>("sequence").value = String(sequence);
  drawRun();
  fillFilter();
}

// the page

function buildHead(): void {
  const title = runs.map((run) => run.name).join(" and ");
  document.title = `${title} – DynaTree`;
  get("title").textContent = title;
  get("legend").append(legend(runs[0]));
  for (const run of runs) {
    for (const note of run.notes) get("notes").append(h("p", {}, runs.length > 1 ? `${run.name}: ${note}` : note));
    get("facts").append(
      h(
        "div",
        {},
        ...(runs.length > 1 ? [h("h2", {}, `${NAMES[runs.indexOf(run)]}: ${run.name}`)] : []),
        h("dl", {}, ...run.facts.flatMap(([what, value]) => [h("dt", {}, what), h("dd", {}, value)])),
      ),
    );
  }
  const longest = runs.reduce((one, run) => (run.sequences.length > one.sequences.length ? run : one));
  const select = get<HTMLSelectElement>("sequence");
  select.append(...longest.sequences.map((data, index) => h("option", { value: index }, data.label)));
  get("sequence-part").hidden = longest.sequences.length < 2;
  select.addEventListener("change", () => {
    openSequence(Number(select.value));
    go(0);
  });
}

function buildControls(): void {
  const slider = get<HTMLInputElement>("slider");
  slider.addEventListener("input", () => go(Number(slider.value)));
  const number = get<HTMLInputElement>("number");
  number.addEventListener("change", () => go(placeOfNumber(current(), Number(number.value))));
  get("previous").addEventListener("click", () => step(-1));
  get("next").addEventListener("click", () => step(1));
  get("filter").addEventListener("change", applyFilter);
  for (const box of document.querySelectorAll<HTMLInputElement>("#shown input")) {
    box.addEventListener("change", () => {
      if (box.checked) shown.add(box.value as Kind);
      else shown.delete(box.value as Kind);
      for (const view of views) {
        view.show();
        view.panel.centre();
      }
    });
  }
  document.addEventListener("keydown", (event) => {
    const field = event.target as HTMLElement;
    if (event.altKey || event.ctrlKey || event.metaKey || field.closest("input, select, [role=tree]")) return;
    const isInTree = field.classList.contains("tree"); // there arrow keys scroll
    const keys: Record<string, () => void> = {
      ArrowLeft: () => step(-1),
      ArrowRight: () => step(1),
      PageUp: () => step(-FAST_STEP),
      PageDown: () => step(FAST_STEP),
      Home: () => edge(1),
      End: () => edge(-1),
    };
    const act = isInTree ? undefined : keys[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
  window.addEventListener("hashchange", followAddress);
  let resizing: ReturnType<typeof setTimeout> | undefined;
  const redraw = (): void => {
    for (const view of views) view.panel.measure();
    for (const chart of charts) chart.draw();
    go(current().place);
  };
  window.addEventListener("resize", () => {
    clearTimeout(resizing);
    resizing = setTimeout(redraw, QUIET_MS);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => {
    document.documentElement.classList.add("printing"); // light colours, for the curves too
    for (const chart of charts) chart.draw();
  });
  window.addEventListener("afterprint", () => {
    document.documentElement.classList.remove("printing");
    redraw();
  });
}

buildHead();
runs.forEach((run, index) => views.push(new View(run, index, (place) => go(place, index))));
document.body.classList.toggle("comparing", isComparing());
for (const view of views) view.open(0);
drawRun();
fillFilter();
buildControls();
followAddress();
document.documentElement.dataset.ready = "yes";
