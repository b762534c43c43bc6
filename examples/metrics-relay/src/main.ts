// The program: reads the command line, serves until it is told to stop.

import { readFileSync } from "node:fs";
import type { AddressInfo } from "node:net";
import { parseArgs } from "node:util";

import { hostCheck } from "./hosts.js";
import { createRelay, type Asset } from "./relay.js";
import { ferryman } from "./service.js";

const USAGE = `usage: npm start -- [--service HOST:PORT] [--host HOST] [--port PORT] [--host-names NAMES]

  --service     the Ferryman service  (FERRYMAN_SERVICE, default localhost:50051)
  --host        where to listen       (RELAY_HOST, default 127.0.0.1)
  --port        0 for a free one      (RELAY_PORT, default 8080)
  --host-names  names that browsers may use for this machine beyond localhost and HOST, with commas between them
                                      (RELAY_HOST_NAMES)
`;

interface Settings {
  service: string;
  host: string;
  port: number;
  hostNames: string[];
}

/** Returns the settings: a flag counts before its variable. Throws for what cannot be. */
function readSettings(): Settings {
  const text = { type: "string" } as const;
  const { values } = parseArgs({ options: { service: text, host: text, port: text, "host-names": text } });
  const port = values.port ?? process.env["RELAY_PORT"] ?? "8080";
  if (!/^\d{1,5}$/.test(port) || Number(port) > 65_535) throw new Error(`--port is ${port}, must be 0 to 65535`);
  return {
    service: values.service ?? process.env["FERRYMAN_SERVICE"] ?? "localhost:50051",
    host: values.host ?? process.env["RELAY_HOST"] ?? "127.0.0.1",
    port: Number(port),
    hostNames: (values["host-names"] ?? process.env["RELAY_HOST_NAMES"] ?? "").split(",").filter((name) => name.trim()),
  };
}

function readAssets(): ReadonlyMap<string, Asset> {
  const asset = (name: string, type: string): Asset => ({
    type: `${type}; charset=utf-8`,
    body: readFileSync(new URL(`./web/${name}`, import.meta.url)),
  });
  return new Map([
    ["/", asset("index.html", "text/html")],
    ["/app.js", asset("app.js", "text/javascript")],
    ["/style.css", asset("style.css", "text/css")],
    ["/icon.svg", asset("icon.svg", "image/svg+xml")],
  ]);
}

function main(): void {
  let settings: Settings;
  try {
    settings = readSettings();
  } catch (error) {
    console.error(`${(error as Error).message}\n\n${USAGE}`);
    process.exitCode = 2;
    return;
  }
  const isOurHost = hostCheck(settings.host, settings.hostNames);
  const relay = createRelay({ source: ferryman(settings.service), assets: readAssets(), isOurHost });
  relay.on("error", (error) => {
    console.error(`cannot listen on ${settings.host}:${settings.port}: ${error.message}`);
    process.exitCode = 1;
  });
  relay.listen(settings.port, settings.host, () => {
    const { port } = relay.address() as AddressInfo;
    const host = settings.host.includes(":") ? `[${settings.host}]` : settings.host;
    console.log(`relaying ${settings.service} on http://${host}:${port}`);
  });
  for (const name of ["SIGINT", "SIGTERM"] as const) {
    process.once(name, () => {
      relay.close(() => process.exit(0));
      relay.closeAllConnections(); // streams have no end of their own; browsers come back with their last id
    });
  }
}

main();
