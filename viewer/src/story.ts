// The committed text: a tint for each iteration, and another look for the token that nobody had drafted.
import type { Run, Sequence } from "./data";
import { h } from "./dom";
import { tokenText, visible } from "./words";

const NUM_TINTS = 4;
const NUM_PROMPT_TOKENS = 400; // shown of a long prompt, from its end

/** A text whose line ends and tabs can be seen. */
const lines = (text: string): string => text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t");

/** The text of a sequence, one option of a list box for each iteration. */
export class Story {
  readonly element: HTMLElement;
  private readonly options: HTMLElement[];
  private current: HTMLElement | null = null;

  constructor(
    private readonly run: Run,
    sequence: Sequence,
    prefix: string,
    name: string,
    choose: (place: number) => void,
  ) {
    this.options = sequence.committed.map((tokens, place) =>
      h(
        "span",
        {
          class: `iteration tint-${place % NUM_TINTS}`,
          id: `${prefix}-iteration-${place}`,
          role: "option",
          "aria-selected": "false",
          "data-place": place,
        },
        ...(place in sequence.joined
          ? [h("span", { class: "drafted" }, lines(visible(sequence.joined[place])))]
          : tokens.map((token, index) =>
              h("span", { class: index < sequence.accepted[place] ? "drafted" : "bonus" }, this.words(token)),
            )),
      ),
    );
    const list = h(
      "div",
      { class: "committed", role: "listbox", tabindex: 0, "aria-label": `Committed text${name}, by iteration` },
      ...this.options,
    );
    list.addEventListener("click", (event) => {
      const option = (event.target as Element).closest<HTMLElement>("[data-place]");
      if (option) choose(Number(option.dataset.place));
    });
    this.element = h("div", { class: "story" }, this.prompt(sequence), list);
  }

  /** Mark an iteration. */
  select(place: number): void {
    const list = this.element.querySelector(".committed")!;
    if (this.current) {
      this.current.classList.remove("current");
      this.current.setAttribute("aria-selected", "false");
    }
    this.current = this.options[place] ?? null;
    if (!this.current) return;
    this.current.classList.add("current");
    this.current.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", this.current.id);
  }

  /** Bring the marked iteration into sight. */
  reveal(): void {
    if (!this.current) return;
    const [inner, outer] = [this.current.getBoundingClientRect(), this.element.getBoundingClientRect()];
    if (inner.top < outer.top || inner.bottom > outer.bottom)
      this.element.scrollTop += inner.top - outer.top - outer.height / 3;
  }

  /** Dim the iterations that a filter leaves out. */
  filter(isIn: (place: number) => boolean): void {
    this.options.forEach((option, place) => option.classList.toggle("dim", !isIn(place)));
  }

  private words(token: number): string {
    return lines(tokenText(this.run, token));
  }

  private prompt(sequence: Sequence): HTMLElement {
    const { prompt, num_prompt_tokens: count } = sequence;
    if (!prompt) return h("p", { class: "prompt" }, `The prompt of ${count} tokens was left out of the trace.`);
    const shown = prompt.slice(-NUM_PROMPT_TOKENS);
    const cut = prompt.length - shown.length;
    return h(
      "p",
      { class: "prompt", role: "group", "aria-label": "Prompt" },
      cut ? h("em", {}, `… ${cut} tokens before … `) : null,
      ...shown.map((token) => h("span", {}, this.words(token))),
    );
  }
}
