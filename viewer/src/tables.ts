// Tables of whole runs: figures, acceptance, and what ended the accepted paths.
import type { Figure, Sequence, Share } from "./data";
import { h } from "./dom";

export const format = (figure: Figure): string =>
  figure.value === null
    ? "–"
    : figure.value.toLocaleString("en", {
        minimumFractionDigits: figure.digits,
        maximumFractionDigits: figure.digits,
      }) + (figure.unit ? ` ${figure.unit}` : "");

/** A caption, a head and rows; the first cell of a row is its heading, the others are numbers. */
export function table(caption: string, head: string[], rows: (string | Node)[][]): HTMLTableElement {
  return h(
    "table",
    {},
    h("caption", {}, caption),
    h("thead", {}, h("tr", {}, ...head.map((cell) => h("th", { scope: "col" }, cell)))),
    h(
      "tbody",
      {},
      ...rows.map(([first, ...others]) =>
        h("tr", {}, h("th", { scope: "row" }, first), ...others.map((cell) => h("td", {}, cell))),
      ),
    ),
  );
}

/** The figures of one sequence, or of two beside each other with what the second is relative to the first. */
export function figures(sequences: Sequence[], names: string[]): HTMLTableElement {
  if (sequences.length === 1)
    return table("Figures of this run", ["figure", "value"], sequences[0].figures.map((one) => [one.label, format(one)]));
  const [first, second] = sequences;
  const rows = first.figures.map((one): (string | Node)[] => {
    const other = second.figures.find((figure) => figure.label === one.label);
    return [one.label, format(one), other ? format(other) : "–", change(one, other)];
  });
  return table("Figures of both runs", ["figure", ...names, "B against A"], rows);
}

function change(first: Figure, second: Figure | undefined): string | Node {
  if (!second || first.value === null || second.value === null || !first.value) return "–";
  const share = 100 * (second.value / first.value - 1);
  if (Math.abs(share) < 0.05) return "the same";
  const text = `${share > 0 ? "+" : "−"}${Math.abs(share).toFixed(1)} %`;
  if (!first.better) return text;
  const isBetter = share > 0 === (first.better === "more");
  return h("span", { class: isBetter ? "better" : "worse" }, `${text} ${isBetter ? "better" : "worse"}`);
}

/** A bar as long as its share; what it says stands beside it. */
function bar(share: number | null, which: number): HTMLElement | null {
  if (share === null) return null;
  const inner = h("span", { class: `bar bar-${which}` });
  inner.style.width = `${100 * share}%`;
  return h("span", { class: "track", "aria-hidden": true }, inner);
}

/** How many of the nodes that the target was asked about it accepted. */
export function acceptance(caption: string, column: string, shares: Share[][], names: string[]): HTMLTableElement {
  const labels = [...new Set(shares.flat().map(([label]) => label))];
  const head = shares.length === 1 ? [column, "reached", "accepted", "share"] : [column];
  if (shares.length > 1) names.forEach((name) => head.push(`${name} reached`, `${name} share`));
  const rows = labels.map((label): (string | Node)[] => {
    const found = shares.map((list) => list.find(([other]) => other === label) ?? null);
    const cells = found.flatMap((one, which): (string | Node)[] => {
      const share = one && one[1] ? one[2] / one[1] : null;
      const shown = h(
        "span",
        { class: "share" },
        bar(share, which),
        share === null ? "–" : `${(100 * share).toFixed(1)} %`,
      );
      const reached = one ? one[1].toLocaleString("en") : "0";
      return shares.length === 1 ? [reached, one ? one[2].toLocaleString("en") : "0", shown] : [reached, shown];
    });
    return [label, ...cells];
  });
  return table(caption, head, rows);
}
