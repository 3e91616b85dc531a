// What the page shows. dynatree_core/trace/view.py makes it of trace files and puts it into the page as data blocks.

/** What became of a node: the words of it, and how it is drawn. */
export interface Reason {
  kind: "accepted" | "rejected" | "pruned" | "refused";
  text: string;
}

/** Accepted of those that were reached, for one depth, rank or range of confidence. */
export type Share = [label: string, reached: number, accepted: number];

/** A figure of a whole sequence; `digits` after the point. `better` says which direction is good, if one is. */
export interface Figure {
  label: string;
  value: number | null;
  unit: string;
  digits: number;
  better: "more" | "less" | "";
}

/** One generation. The lists have an entry for each iteration. */
export interface Sequence {
  label: string;
  prompt: number[] | null; // token ids; null: left out of the trace
  num_prompt_tokens: number;
  stop: string | null;
  figures: Figure[];
  iteration: number[]; // the iteration's own number
  start: number[]; // new tokens committed before it
  committed: number[][]; // token ids
  joined: Record<string, string>; // place -> its text, where a character is spread over several tokens
  accepted: number[]; // how many of them had been drafted
  nodes: number[]; // verified drafted nodes
  drafted: number[]; // drafted nodes, before pruning
  depth: number[]; // of the verified tree
  oracle: (number | null)[]; // tokens that the oracle tree of as many nodes commits
  ended: number[]; // index into `endings`: why the accepted path is no longer
  endings: string[];
  seconds: Record<string, (number | null)[]>; // by stage
  parameters: Record<string, (number | null)[]>; // of the policies, before the iteration
  constants: [name: string, value: string][]; // parameters that never changed
  faults: [place: number, text: string][];
  by_depth: Share[];
  by_rank: Share[];
  by_confidence: Share[];
}

/** One trace file. */
export interface Run {
  name: string;
  notes: string[];
  facts: [label: string, value: string][];
  drafters: string[];
  reasons: Reason[];
  texts: Record<string, [text: string, length: number]>; // token id -> its text, and its length where that is cut
  sequences: Sequence[];
}

/** The nodes of an iteration, as parallel lists. Node 0 is the root; parents stand before children. */
export interface Detail {
  token: number[];
  parent: number[]; // −1 for the root
  rank: (number | null)[];
  logprob: (number | null)[]; // of the drafter, natural logarithm
  path: (number | null)[]; // sum of them from the root
  drafter: number[]; // index into `drafters`, −1: unknown
  reason: number[]; // index into `reasons`, −1: the root
  wanted: [node: number, token: number, logprob: number | null][]; // the target's choice
  votes: string[]; // of policies and limits, in words
  more: [node: number, count: number][]; // children not grown that are not listed
}

const block = (id: string): string => document.getElementById(id)?.textContent ?? "";

export const runs: Run[] = JSON.parse(block("runs"));

const lines = new Map<string, string[]>();

/** The nodes of an iteration, read when they are first looked at: a long trace opens at once. */
export function detail(run: number, sequence: number, place: number): Detail {
  const id = `detail-${run}-${sequence}`;
  if (!lines.has(id)) lines.set(id, block(id).trim().split("\n"));
  return JSON.parse(lines.get(id)![place]);
}

/** Places (not numbers) of the iteration that committed the new token at a position, or the nearest one. */
export function placeOf(sequence: Sequence, position: number): number {
  let low = 0;
  let high = sequence.start.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (sequence.start[middle] <= position) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** Mean of the last `width` numbers at each place; what is not known is left out. */
export function rolling(values: (number | null)[], width: number): (number | null)[] {
  let sum = 0;
  let count = 0;
  return values.map((value, place) => {
    if (value !== null) (sum += value), (count += 1);
    const gone = place >= width ? values[place - width] : null;
    if (gone !== null) (sum -= gone), (count -= 1);
    return count ? sum / count : null;
  });
}
