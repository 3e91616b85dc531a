// Builds the page's template and the licences of what is in it: `make viewer`. The same sources give the same bytes.
import { createHash } from "node:crypto";
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
// the folders of the viewer's page, and of the start page of `dynatree serve`, which has the same trees
const out = resolve(process.argv[2] ?? join(here, "..", "dynatree_core", "trace"));
const startPage = resolve(process.argv[2] ?? join(here, "..", "dynatree_core", "serve", "page"));
const LIBRARIES = ["d3-hierarchy", "uplot"]; // whose code is in the page

// tests/test_viewer.py computes the same, so that a build that was forgotten is noticed without node
const files = ["package.json", "package-lock.json", "tsconfig.json", "build.mjs"];
files.push(...readdirSync(join(here, "src")).sort().map((name) => `src/${name}`));
const hash = createHash("sha256");
for (const name of files) hash.update(`${name}\n`).update(readFileSync(join(here, name))).update("\n");
const sources = hash.digest("hex");

const bundle = async (entry, loader) => {
  const result = await build({
    entryPoints: [join(here, entry)],
    absWorkingDir: here,
    bundle: true,
    minify: true,
    write: false,
    format: "iife",
    target: ["es2022"],
    charset: "ascii",
    legalComments: "none", // LIBRARIES have theirs in the licences
    logLevel: "warning",
    loader,
  });
  return result.outputFiles[0].text.trim();
};
const quoted = (text) => `'sha256-${createHash("sha256").update(text, "utf8").digest("base64")}'`;

const script = (await bundle("src/main.ts")).replaceAll("</script", "<\\/script").replaceAll("<!--", "<\\!--");
const uplot = readFileSync(join(here, "node_modules", "uplot", "dist", "uPlot.min.css"), "utf8").trim();
const style = `${uplot}\n${await bundle("src/style.css")}`;
const policy = [
  "default-src 'none'",
  `script-src ${quoted(script)}`,
  `style-src ${quoted(style)}`,
  "img-src data:", // the empty icon, so that no browser asks for one
  "base-uri 'none'",
  "form-action 'none'",
  "require-trusted-types-for 'script'",
  "trusted-types 'none'",
].join("; ");

const licences = LIBRARIES.map((name) => {
  const folder = join(here, "node_modules", name);
  const { version, license, homepage } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
  return `${name} ${version} (${license}), ${homepage}\n\n${readFileSync(join(folder, "LICENSE"), "utf8").trim()}\n`;
}).join("\n");
const head = "The page that `dynatree view` writes contains these libraries:\n\n";
const comment = `This page was written by \`dynatree view\` (Apache-2.0).\n${head}${licences}`.replaceAll("--", "- -").trim();

const parts = { policy, sources, licences: comment, style, script };
const template = readFileSync(join(here, "src", "page.html"), "utf8");
const page = template.replace(/@@(policy|sources|licences|style|script)@@/g, (_, name) => parts[name]);
writeFileSync(join(out, "page.html"), page);
const banner = `Built by make viewer, of the sources ${sources}.`;
const { version, license } = JSON.parse(readFileSync(join(here, "node_modules", "d3-hierarchy", "package.json"), "utf8"));
const notice = readFileSync(join(here, "node_modules", "d3-hierarchy", "LICENSE"), "utf8").trim();
const trees = (await bundle("src/live.ts")).replaceAll("</script", "<\\/script").replaceAll("<!--", "<\\!--");
writeFileSync(join(startPage, "trees.js"), `/* ${banner} It contains d3-hierarchy ${version} (${license}):\n\n${notice}\n*/\n${trees}\n`);
writeFileSync(join(startPage, "trees.css"), `/* ${banner} */\n${await bundle("src/tree.css")}\n`);
writeFileSync(join(out, "page_licences.txt"), head + licences);
console.log(`page.html: ${Buffer.byteLength(page)} bytes, of the sources ${sources.slice(0, 12)}`);
