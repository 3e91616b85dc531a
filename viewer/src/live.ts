// The trees of an answer while it comes, for the start page of `dynatree serve`: one object, which the page's own script
// is given the iterations by.
import type { Detail, Reason, Run } from "./data";
import { get, h } from "./dom";
import { TreePanel } from "./panel";
import { legend, type Kind } from "./tree";
import { plural } from "./words";

/** One iteration, and what of texts, reasons and drafters was not told before. `dynatree_core/trace/summary.py` makes it. */
interface Step {
  iteration: number;
  accepted: number;
  nodes: number; // that were verified
  bonus: number | null;
  ended: string; // why the accepted path is no longer
  detail: Detail;
  reasons: Reason[];
  drafters: string[];
  texts: Run["texts"];
}

const ALL = new Set<Kind>(["accepted", "rejected", "pruned", "refused"]);
const QUIET_MS = 400; // after the last step it is read out

/** The part of the page with the id "trees": a stepper and the tree of an iteration. */
class LiveTrees {
  private readonly steps: Step[] = [];
  private readonly panel = new TreePanel("", "h3");
  private run!: Run;
  private readonly hint = get("tree-about").textContent; // until there is a tree to say something about
  private place = -1;
  private isFollowing = true; // whether the newest iteration is shown as it comes
  private isWaiting = false; // for the next frame
  private told: ReturnType<typeof setTimeout> | undefined;

  constructor() {
    get("tree-of").append(h("div", { class: "tree-and-facts" }, this.panel.tree, this.panel.facts));
    get("tree-first").addEventListener("click", () => this.go(0));
    get("tree-previous").addEventListener("click", () => this.go(this.place - 1));
    get("tree-next").addEventListener("click", () => this.go(this.place + 1));
    get("tree-last").addEventListener("click", () => this.go(this.steps.length - 1));
    const part = get<HTMLDetailsElement>("trees");
    part.addEventListener("toggle", () => this.measured());
    part.addEventListener("keydown", (event) => this.key(event));
    window.addEventListener("resize", () => this.measured());
    this.forget();
  }

  /** Forget the answer before. */
  begin(): void {
    this.forget();
  }

  private forget(): void {
    this.steps.length = 0;
    this.run = { name: "", notes: [], facts: [], drafters: [], reasons: [], texts: {}, sequences: [] };
    this.place = -1;
    this.isFollowing = true;
    clearTimeout(this.told); // else the iteration before would be read out
    this.panel.clear();
    get("tree-about").textContent = this.hint;
    get("tree-number").textContent = "none yet";
    get("tree-key").replaceChildren();
    this.buttons();
  }

  /** One more iteration has come. */
  add(step: Step): void {
    this.run.reasons.push(...step.reasons);
    Object.assign(this.run.texts, step.texts);
    this.steps.push(step);
    if (step.drafters.length || this.steps.length === 1) {
      this.run.drafters.push(...step.drafters);
      get("tree-key").replaceChildren(legend(this.run));
    }
    if (this.isFollowing) this.place = this.steps.length - 1;
    this.drawSoon();
  }

  private go(place: number): void {
    this.place = Math.max(0, Math.min(place, this.steps.length - 1));
    this.isFollowing = this.place === this.steps.length - 1;
    this.drawSoon();
  }

  private key(event: KeyboardEvent): void {
    const field = event.target as HTMLElement;
    if (event.altKey || event.ctrlKey || event.metaKey || field.closest("[role=tree]") || field.classList.contains("tree"))
      return; // there arrow keys are the tree's own, or scroll
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (by === undefined || !this.steps.length) return;
    event.preventDefault();
    this.go(this.place + by);
  }

  private measured(): void {
    this.panel.measure();
    this.drawSoon();
  }

  /** Iterations may come faster than frames: only what a frame shows is drawn. */
  private drawSoon(): void {
    if (this.isWaiting) return;
    this.isWaiting = true;
    requestAnimationFrame(() => {
      this.isWaiting = false;
      this.draw();
    });
  }

  private draw(): void {
    const step = this.steps[this.place];
    this.buttons();
    if (!step) return;
    get("tree-number").textContent = `${step.iteration} of 0 to ${this.steps.at(-1)!.iteration}`;
    const about = `${step.accepted} of ${plural(step.nodes, "verified node")} accepted. The path ended: ${step.ended}.`;
    get("tree-about").textContent = about;
    if (get<HTMLDetailsElement>("trees").open) {
      this.panel.show(this.run, step.detail, step.bonus, ALL);
      this.panel.centre();
    }
    clearTimeout(this.told);
    if (!this.isFollowing)
      this.told = setTimeout(() => (get("tree-said").textContent = `Iteration ${step.iteration}: ${about}`), QUIET_MS);
  }

  private buttons(): void {
    const isFirst = this.place <= 0;
    const isLast = this.place >= this.steps.length - 1;
    for (const [id, isOff] of [["tree-first", isFirst], ["tree-previous", isFirst], ["tree-next", isLast], ["tree-last", isLast]] as const)
      get(id).setAttribute("aria-disabled", String(isOff)); // and not disabled, which would take the focus away
  }
}

Object.assign(globalThis, { liveTrees: new LiveTrees() });
