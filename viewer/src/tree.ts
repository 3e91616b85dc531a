// The tree of an iteration. Shape, filling and line say what became of a node, its area how likely its path is, its
// colour which drafter proposed it: nothing is said by colour alone.
import { hierarchy, tree as layOut, type HierarchyPointNode } from "d3-hierarchy";
import type { Detail, Reason, Run } from "./data";
import { h, s } from "./dom";
import { label, percent } from "./words";

const ROW = 23; // pixels between two leaves
const RADIUS = 11; // of a node whose path is certain
const SMALLEST = 3;
const LETTER = 7.3; // width of a letter of a label
const GAP = 34; // between a label's end and the next level
const NUM_LETTERS = 14;
const MARGIN = 16;
const SMALLEST_SCALE = 0.8; // to which a wide tree is made narrower; beyond that it is scrolled

export type Kind = "root" | Reason["kind"] | "bonus";

/** A node as it is drawn. */
export interface TreeNode {
  place: number; // in the iteration's lists; for a bonus token that nobody proposed their length
  kind: Kind;
  isWish: boolean; // the target's choice where the accepted path ends
  children: TreeNode[];
}

/** What is to be drawn: the nodes of the chosen kinds, and the target's wish in any case. */
export function nodesOf(run: Run, detail: Detail, bonus: number | null, shown: ReadonlySet<Kind>): TreeNode {
  const kinds = detail.reason.map((reason): Kind => (reason < 0 ? "root" : run.reasons[reason].kind));
  let last = 0; // the deepest accepted node
  kinds.forEach((kind, place) => kind === "accepted" && (last = place));
  const nodes = kinds.map((kind, place): TreeNode => ({
    place,
    kind,
    isWish: kind !== "accepted" && kind !== "root" && detail.parent[place] === last && detail.token[place] === bonus,
    children: [],
  }));
  for (const node of nodes) {
    if (node.kind !== "root" && (shown.has(node.kind) || node.kind === "accepted" || node.isWish))
      nodes[detail.parent[node.place]].children.push(node);
  }
  if (bonus !== null && !nodes.some((node) => node.isWish))
    nodes[last].children.push({ place: nodes.length, kind: "bonus", isWish: true, children: [] });
  for (const node of nodes) node.children.sort((a, b) => (rankOf(detail, a) ?? 1e9) - (rankOf(detail, b) ?? 1e9));
  return nodes[0];
}

const rankOf = (detail: Detail, node: TreeNode): number | null => detail.rank[node.place] ?? null;

/** Radius of a node, whose area is in proportion to its path's probability. */
function radius(detail: Detail, node: TreeNode): number {
  if (node.kind === "root") return RADIUS;
  const path = detail.path[node.place];
  if (node.kind === "bonus" || path == null) return 6;
  return Math.max(SMALLEST, RADIUS * Math.sqrt(Math.exp(path)));
}

function star(size: number): string {
  const points = Array.from({ length: 10 }, (_, corner) => {
    const angle = (corner * Math.PI) / 5 - Math.PI / 2;
    const far = corner % 2 ? size * 0.45 : size;
    return `${(far * Math.cos(angle)).toFixed(1)},${(far * Math.sin(angle)).toFixed(1)}`;
  });
  return `M${points.join("L")}Z`;
}

const diamond = (size: number): string => `M0,${-size}L${size},0L0,${size}L${-size},0Z`;

const disc = (size: number): string => `M${-size},0a${size},${size} 0 1 0 ${2 * size},0a${size},${size} 0 1 0 ${-2 * size},0Z`;

const square = (size: number): string => `M${-size},${-size}H${size}V${size}H${-size}Z`;

/** The outline of a node's mark: disc, ring, square, diamond or star. */
function outline(kind: Kind, size: number): string {
  if (kind === "pruned") return square(size * 0.89);
  if (kind === "refused") return diamond(size * 1.25);
  return kind === "bonus" ? star(size * 1.35) : disc(size);
}

/** The mark of a node. */
export const mark = (kind: Kind, size: number): SVGElement => s("path", { d: outline(kind, size), class: "mark" });

const WORDS: Record<Kind, string> = {
  root: "the last committed token, from which the tree grows",
  accepted: "accepted: the target's own choice",
  rejected: "verified, and not the target's choice",
  pruned: "drafted, but not verified",
  refused: "proposed, but not grown",
  bonus: "the target's choice, which nobody had drafted",
};

/** What there is to say of a node, as label and value. */
export function describe(run: Run, detail: Detail, node: TreeNode, bonus: number | null): [string, string][] {
  const { place } = node;
  const isListed = place < detail.token.length;
  const id = isListed ? detail.token[place] : bonus!;
  const rows: [string, string][] = [["token", `${label(run, id, 200)}  (id ${id})`]];
  const reason = isListed && detail.reason[place] >= 0 ? run.reasons[detail.reason[place]].text : null;
  rows.push(["outcome", reason ?? WORDS[node.kind]]);
  if (node.isWish) rows.push(["the target", "chose this token: it was committed as the bonus token"]);
  if (isListed && node.kind !== "root") {
    const rank = detail.rank[place];
    if (rank !== null) rows.push(["rank", `${rank}${rank === 0 ? " (the drafter's first choice)" : ""}`]);
    rows.push(["draft probability", percent(detail.logprob[place])], ["path probability", percent(detail.path[place])]);
    if (detail.drafter[place] >= 0) rows.push(["drafter", run.drafters[detail.drafter[place]]]);
  }
  const wanted = detail.wanted.find(([at]) => at === place);
  if (wanted) {
    const [, token, logprob] = wanted;
    rows.push(["the target's likeliest next token", `${label(run, token, 60)}${logprob === null ? "" : `, ${percent(logprob)}`}`]);
  }
  const more = detail.more.find(([at]) => at === place);
  if (more) rows.push(["not listed", `${more[1]} less likely proposals below it`]);
  return rows;
}

function give(element: Element, name: string, value: string | number): void {
  if (element.getAttribute(name) !== String(value)) element.setAttribute(name, String(value));
}

/** What a node is drawn with. All kinds have the same elements, so that the next tree's nodes are drawn with them. */
class Marked {
  readonly group: SVGGElement;
  private readonly target = s("rect", { class: "target", x: -RADIUS, y: -ROW / 2, height: ROW });
  private readonly mark = s("path", { class: "mark" });
  private readonly text = s("text", { x: RADIUS + 4, y: 4, "aria-hidden": true });
  private wish: SVGElement | null = null;

  constructor() {
    this.group = s("g", { role: "treeitem" }, this.target, this.mark, this.text);
  }

  /** Draw a node with a mark of that size and a label of that width; `attributes` are those of the group. */
  draw(node: TreeNode, size: number, label: string, width: number, attributes: Record<string, string | number>): void {
    for (const [name, value] of Object.entries(attributes)) give(this.group, name, value);
    give(this.target, "width", 2 * RADIUS + 4 + width);
    give(this.mark, "d", outline(node.kind, size));
    if (this.text.textContent !== label) this.text.textContent = label;
    this.wish?.remove();
    this.wish = node.isWish && node.kind !== "bonus" ? s("path", { class: "wish", d: star(size + 8) }) : null;
    if (this.wish) this.mark.before(this.wish);
  }
}

/** A place for trees, one after the other. Elements stay from tree to tree: to make and style them is most of a step. */
export class Picture {
  readonly svg = s("svg", {
    role: "tree",
    "aria-label": "The tree of this iteration. Arrow keys move between its nodes.",
  });
  root: TreeNode | null = null;
  middle = 0; // of the accepted path, from the top
  private readonly edges = s("g", { class: "edges", "aria-hidden": true });
  private readonly marks = s("g", {});
  private readonly marked: Marked[] = []; // some more than the tree has nodes
  private nodes: HierarchyPointNode<TreeNode>[] = []; // each drawn with the elements at its place in `marked`

  /** `show` is told of the node under the pointer or the keyboard, `pin` of one that was chosen. */
  constructor(show: (node: TreeNode | null) => void, pin: (node: TreeNode) => void) {
    this.svg.append(this.edges, this.marks);
    const nodeOf = (event: Event): TreeNode | null =>
      this.nodes[this.placeOf((event.target as Element).closest("[role=treeitem]"))]?.data ?? null;
    this.svg.addEventListener("pointerover", (event) => show(nodeOf(event)));
    this.svg.addEventListener("pointerleave", () => show(null));
    this.svg.addEventListener("focusin", (event) => show(nodeOf(event)));
    this.svg.addEventListener("click", (event) => {
      const node = nodeOf(event);
      if (node) pin(node);
    });
    this.svg.addEventListener("keydown", (event) => {
      const here = this.placeOf(document.activeElement);
      if (here < 0) return;
      const next = neighbour(this.nodes[here], event.key);
      if (event.key === "Enter" || event.key === " ") pin(this.nodes[here].data);
      else if (!next) return;
      else {
        const { group } = this.marked[this.nodes.indexOf(next)];
        this.marked[here].group.setAttribute("tabindex", "-1");
        group.setAttribute("tabindex", "0");
        group.focus();
      }
      event.preventDefault();
      event.stopPropagation();
    });
  }

  private placeOf(element: Element | null): number {
    return this.marked.findIndex(({ group }) => group === element);
  }

  /** Draw a tree, `room` pixels wide where that is possible. */
  draw(run: Run, detail: Detail, bonus: number | null, shown: ReadonlySet<Kind>, room: number): void {
    this.root = nodesOf(run, detail, bonus, shown);
    const placed = layOut<TreeNode>().nodeSize([ROW, 1]).separation(() => 1)(hierarchy(this.root));
    const all = (this.nodes = placed.descendants());
    const name = (node: TreeNode): string =>
      label(run, node.place < detail.token.length ? detail.token[node.place] : bonus!, NUM_LETTERS);
    const names = all.map((at) => name(at.data));
    const widths = names.map((one) => [...one].length * LETTER);
    const labelEnd = new Map(all.map((at, index) => [at, RADIUS + 4 + widths[index] + 5]));
    const deepest = Math.max(...all.map((at) => at.depth));
    const column = Array.from({ length: deepest + 1 }, () => 0);
    all.forEach((at, index) => (column[at.depth] = Math.max(column[at.depth], widths[index])));
    const x = [MARGIN];
    for (let depth = 0; depth <= deepest; depth++) x.push(x[depth] + 2 * RADIUS + column[depth] + GAP);
    const top = Math.min(...all.map((at) => at.x)) - MARGIN;
    const height = Math.max(...all.map((at) => at.x)) - top + MARGIN;
    const width = x[deepest + 1] - GAP + MARGIN;

    const lines = new Map<Kind, string[]>(); // one element for all edges of a kind
    all.forEach((at, index) => {
      const node = at.data;
      const size = radius(detail, node);
      const [cx, cy] = [x[at.depth], at.x - top];
      if (at.parent) {
        const from = x[at.parent.depth] + labelEnd.get(at.parent)!;
        const [py, bend] = [at.parent.x - top, (from + cx - RADIUS) / 2];
        const line = `M${from},${py}C${bend},${py} ${bend},${cy} ${cx - size},${cy}`;
        if (!lines.has(node.kind)) lines.set(node.kind, []);
        lines.get(node.kind)!.push(line);
      }
      const drafter = node.place < detail.drafter.length ? detail.drafter[node.place] : -1;
      this.marked[index] ??= new Marked();
      this.marked[index].draw(node, size, names[index], widths[index], {
        class: `node ${node.kind} drafter-${drafter < 0 ? "none" : drafter % 6}`,
        transform: `translate(${cx},${cy})`,
        tabindex: index === 0 ? 0 : -1,
        "aria-level": at.depth + 1,
        "aria-label": describe(run, detail, node, bonus)
          .map(([what, value]) => `${what} ${value}`)
          .join(", "),
      });
      const { group } = this.marked[index];
      if (!group.parentNode) this.marks.append(group);
    });
    for (let index = all.length; this.marked[index]?.group.parentNode; index++) this.marked[index].group.remove();
    this.edges.replaceChildren(...[...lines].map(([kind, parts]) => s("path", { d: parts.join(""), class: `edge ${kind}` })));
    const scale = Math.max(SMALLEST_SCALE, Math.min(1, room / width));
    give(this.svg, "width", scale * width);
    give(this.svg, "height", scale * height);
    give(this.svg, "viewBox", `0 0 ${width} ${height}`);
    const path = all.filter((at) => at.data.kind === "root" || at.data.kind === "accepted" || at.data.isWish);
    this.middle = scale * ((Math.min(...path.map((at) => at.x)) + Math.max(...path.map((at) => at.x))) / 2 - top);
  }
}

/** Where an arrow key leads: right to the first child, left to the parent, up and down within the level. */
function neighbour(at: HierarchyPointNode<TreeNode>, key: string): HierarchyPointNode<TreeNode> | null {
  if (key === "ArrowRight") return at.children?.[0] ?? at;
  if (key === "ArrowLeft") return at.parent ?? at;
  if (key !== "ArrowDown" && key !== "ArrowUp") return null;
  let top = at;
  while (top.parent) top = top.parent;
  const level = top
    .descendants()
    .filter((other) => other.depth === at.depth)
    .sort((a, b) => a.x - b.x);
  return level[level.indexOf(at) + (key === "ArrowDown" ? 1 : -1)] ?? at;
}

/** The legend of marks and drafters. */
export function legend(run: Run): HTMLElement {
  const entry = (sign: SVGElement, words: string): HTMLElement =>
    h("li", {}, s("svg", { width: 20, height: 18, viewBox: "-10 -9 20 18", "aria-hidden": true }, sign), words);
  const kind = (name: Kind): SVGElement => s("g", { class: `node ${name} drafter-0` }, mark(name, 5));
  const list = h(
    "ul",
    { class: "legend" },
    entry(kind("accepted"), "accepted"),
    entry(kind("rejected"), "rejected"),
    entry(kind("pruned"), "pruned before verification"),
    entry(kind("refused"), "proposed, not grown"),
    entry(kind("bonus"), "the target's wish that was missed"),
  );
  if (run.drafters.length > 1)
    run.drafters.forEach((drafter, index) => {
      const colour = s("rect", { class: `swatch drafter-${index % 6}`, x: -6, y: -5, width: 12, height: 10 });
      list.append(entry(colour, `from ${drafter}`));
    });
  return list;
}
