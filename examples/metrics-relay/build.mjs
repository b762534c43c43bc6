// Bundles the program, its page and its tests into dist/. Types have been checked by tsc before.

import { cpSync, mkdirSync, readdirSync, rmSync } from "node:fs";

import { build } from "esbuild";

const node = { bundle: true, platform: "node", target: "node20", format: "esm", packages: "external", sourcemap: true };

rmSync("dist", { recursive: true, force: true });
await build({ ...node, entryPoints: ["src/main.ts"], outdir: "dist" });
const tests = readdirSync("test").filter((name) => name.endsWith(".test.ts"));
await build({ ...node, entryPoints: tests.map((name) => `test/${name}`), outdir: "dist/test" });
await build({ bundle: true, target: "es2022", format: "esm", minify: true, entryPoints: ["web/app.ts"], outdir: "dist/web" });
mkdirSync("dist/web", { recursive: true });
for (const name of ["index.html", "style.css", "icon.svg"]) cpSync(`web/${name}`, `dist/web/${name}`);
