// Which values of the header Host are answered. A page of another site can let its own name lead to this machine (DNS
// rebinding) and read what it is answered: its browser sends that name. It never sends an IP address for a name.

import { isIP } from "node:net";

/** Returns whether a value of the header Host, a host and perhaps a port, is one to answer; no browser leaves it out. */
export function hostCheck(listensOn: string, names: readonly string[] = []): (header: string | undefined) => boolean {
  const ours = new Set(["localhost", bare(listensOn), ...names.map(bare)]);
  const onlyLoopback = isLoopback(bare(listensOn));
  return (header) => {
    if (header === undefined || header === "") return true;
    const host = bare(header.replace(/:\d{0,5}$/, ""));
    if (isIP(host)) return !onlyLoopback || isLoopback(host);
    return ours.has(host);
  };
}

function bare(host: string): string {
  return host.trim().toLowerCase().replace(/^\[(.*)\]$/, "$1").replace(/\.$/, "");
}

function isLoopback(host: string): boolean {
  return host === "localhost" || host === "::1" || (isIP(host) === 4 && host.startsWith("127."));
}
