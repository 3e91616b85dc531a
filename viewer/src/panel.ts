// A drawn tree with the details of a node, which the viewer's page and the start page of `dynatree serve` show.
import type { Detail, Run } from "./data";
import { h } from "./dom";
import { describe, Picture, type Kind, type TreeNode } from "./tree";
import { label } from "./words";

/** The tree of the iteration at hand, and what there is to say of the node that is pointed at. */
export class TreePanel {
  readonly tree = h("div", { class: "tree", tabindex: 0, role: "region" });
  readonly facts = h("div", { class: "node-facts" });
  private readonly size = { width: 0, height: 0 }; // of `tree`; asking for it while a step is drawn costs a layout
  private run: Run | null = null;
  private nodes: Detail | null = null;
  private bonus: number | null = null;
  private readonly picture = new Picture(
    (node) => this.explain(node),
    (node) => {
      this.pinned = this.pinned === node.place ? null : node.place;
      this.explain(node);
    },
  );
  private pinned: number | null = null; // a node's place

  /** `heading` is the level of its headings, one below what stands above it. */
  constructor(
    name: string,
    private readonly heading: "h3" | "h4",
  ) {
    this.tree.setAttribute("aria-label", `Tree${name}, can be scrolled`);
  }

  /** Look how much room there is, before trees are drawn and when the page has changed its form. */
  measure(): void {
    this.size.width = this.tree.clientWidth;
    this.size.height = this.tree.clientHeight;
  }

  /** Draw an iteration, with the nodes of these kinds. */
  show(run: Run, nodes: Detail, bonus: number | null, shown: ReadonlySet<Kind>): void {
    [this.run, this.nodes, this.bonus, this.pinned] = [run, nodes, bonus, null];
    if (!this.size.width) this.measure();
    this.picture.draw(run, nodes, bonus, shown, this.size.width);
    if (!this.picture.svg.parentNode) this.tree.append(this.picture.svg);
    this.explain(null);
  }

  /** Have the accepted path in sight. To be called when all else is drawn, since it costs a layout. */
  centre(): void {
    if (this.nodes) this.tree.scrollTo(0, this.picture.middle - this.size.height / 2);
  }

  clear(): void {
    this.nodes = null;
    this.tree.replaceChildren();
    this.facts.replaceChildren();
  }

  /** Say what there is to say of a node; of the pinned one, or of none, where none is pointed at. */
  private explain(node: TreeNode | null): void {
    if (!this.run || !this.nodes || !this.picture.root) return;
    const asked = node ?? find(this.picture.root, this.pinned);
    if (asked) {
      const rows = describe(this.run, this.nodes, asked, this.bonus);
      this.facts.replaceChildren(
        h(this.heading, {}, label(this.run, this.nodes.token[asked.place] ?? this.bonus!, 40)),
        h("dl", {}, ...rows.flatMap(([what, value]) => [h("dt", {}, what), h("dd", {}, value)])),
      );
      return;
    }
    const votes = this.nodes.votes.map((vote) => h("li", {}, vote));
    this.facts.replaceChildren(
      h("p", { class: "hint" }, "Point at a node, tap it, or go there with Tab and the arrow keys."),
      ...(votes.length ? [h(this.heading, {}, "Said in this iteration"), h("ul", {}, ...votes)] : []),
    );
  }
}

function find(node: TreeNode, place: number | null): TreeNode | null {
  if (place === null) return null;
  if (node.place === place) return node;
  for (const child of node.children) {
    const found = find(child, place);
    if (found) return found;
  }
  return null;
}
