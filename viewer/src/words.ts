// Tokens and numbers in words. A token's text comes from a model, so whatever could hide or reorder text is spelt out.
import type { Run } from "./data";

// controls but newline and tab; directions and their isolates; blanks without width; lone surrogates; private marks
const HIDDEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/gu;
const code = (found: string): string => `‹U+${found.codePointAt(0)!.toString(16).toUpperCase().padStart(4, "0")}›`;

/** A text in which nothing is hidden; newlines and tabs stay. */
export const visible = (text: string): string => text.replace(HIDDEN, code);

/** The text of a token as it stands in the committed text. */
export function tokenText(run: Run, id: number): string {
  const found = run.texts[id];
  if (!found) return `‹token ${id}›`;
  const [text, length] = found;
  return visible(text) + (length > text.length ? `… ‹${length.toLocaleString("en")} characters›` : "");
}

/** The text of a token on one line, in at most `width` characters: blanks as ·, newlines as ↵, tabs as ⇥. */
export function label(run: Run, id: number, width = Infinity): string {
  const text = tokenText(run, id).replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·") || "‹empty›";
  const letters = [...text];
  return letters.length > width ? letters.slice(0, width - 1).join("") + "…" : text;
}

/** A probability of its logarithm, such as 12 % or 3e-5. */
export function percent(logprob: number | null): string {
  if (logprob === null) return "unknown";
  const value = Math.exp(logprob);
  if (value >= 0.9995) return "100 %";
  return value >= 0.001 ? `${(100 * value).toPrecision(value < 0.01 ? 1 : 3)} %` : value.toExponential(0);
}

/** Seconds as milliseconds. */
export const milliseconds = (seconds: number): string => `${Number((1000 * seconds).toPrecision(3))} ms`;

export const plural = (count: number, one: string, many = `${one}s`): string =>
  `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
