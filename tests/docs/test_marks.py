"""Every block of the documents has someone who runs it, and every mark is true."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.docs.markdown import DATA, DOCUMENTS, PROGRAMS, ROOT, blocks_of, commands_of, first_broken_promise, marked

MOST_NOT_RUN = 15
NOT_RUN = [
    ("docs/api.md", "Other languages"),  # grpcurl
    ("docs/operations.md", "Install"),  # into /opt
    ("docs/operations.md", "Images"),  # with Docker, into a registry
]
"""The blocks that no test runs: (document, heading)."""

RUN_HERE = ("README.md", "docs/api.md", "docs/clients.md")
"""The documents whose blocks without a mark tests/docs/test_documents.py runs, but those in TypeScript."""

RUNNERS = {
    ("docs/clients.md", "run by", "ops"): "tests/ops/test_relay.py",
    ("docs/operations.md", "run by", "ops"): "tests/ops/test_operations.py",
    ("docs/operations.md", "rendered by", "ops"): "tests/ops/test_operations.py",
}
"""Who runs the blocks with a mark: the file asks tests/docs/markdown.py for them."""


def all_blocks():
    return [block for document in DOCUMENTS for block in blocks_of(document)]


def test_every_block_says_its_language():
    assert [block.place for block in all_blocks() if block.language not in (*PROGRAMS, *DATA)] == []


def test_every_program_has_a_runner():
    without = []
    for block in all_blocks():
        if block.language not in PROGRAMS:
            continue
        if block.mark is None:
            runs = block.document in RUN_HERE and block.language != "ts"
        elif block.mark.kind in ("not run", "recorded in"):
            runs = True
        else:
            runs = (block.document, block.mark.kind, block.mark.value) in RUNNERS
        if not runs:
            without.append(block.place)
    assert without == []


@pytest.mark.parametrize(("key", "file"), RUNNERS.items())
def test_runner_asks_for_its_blocks(key, file):
    document, kind, value = key
    assert marked(document, kind, value)
    assert f'marked("{document}", "{kind}", "{value}")' in (ROOT / file).read_text(encoding="utf-8")


def test_blocks_that_are_not_run_are_listed_and_few():
    not_run = [block for block in all_blocks() if block.mark and block.mark.kind == "not run"]
    assert [(block.document, block.heading) for block in not_run] == NOT_RUN
    assert len(NOT_RUN) <= MOST_NOT_RUN


def test_every_mark_is_one_of_a_block():
    """A mark that is misspelt, or that prose separates from its block, would be no mark."""
    used = {(block.mark.document, block.mark.line) for block in all_blocks() if block.mark}
    for document in DOCUMENTS:
        lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
        comments = {(document, number) for number, line in enumerate(lines, start=1) if line.startswith("<!--")}
        assert comments <= used, sorted(comments - used)


def test_recorded_output_is_that_of_the_recorded_run():
    """The file begins with its command. To record it anew, in a fresh clone: `make demo | tee FILE`."""
    recorded = [block for block in all_blocks() if block.mark and block.mark.kind == "recorded in"]
    assert recorded
    for block in recorded:
        first, _, printed = (ROOT / block.mark.value).read_text(encoding="utf-8").partition("\n")
        command = commands_of(block)[-1]
        assert first.startswith(f"$ {command.text}")
        broken = first_broken_promise(command.promised, printed)
        assert broken is None, f"{block.document}:{broken}: not in {block.mark.value}"


def test_every_link_leads_somewhere():
    broken = []
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        links = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'(?:src|srcset)="([^"]+)"', text)]
        assert links
        broken += [f"{document}: {link}" for link in links if "://" not in link and not leads_somewhere(document, link)]
    assert broken == []


def leads_somewhere(document, link):
    path, _, anchor = link.partition("#")
    target = (ROOT / document).parent / path if path else ROOT / document
    if not anchor:
        return target.exists()
    return target.exists() and anchor in anchors(target)


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


# Figures


def result(name):
    return json.loads((ROOT / f"bench/results/{name}.json").read_text())


def serving_row(name):
    [row] = [row for row in result("serving-cpu-quick")["rows"] if row["name"] == name]
    return row


def figures():
    """The rows of the README's benchmarks: (the file of the figures, the text that they must be in)."""
    export, kill = result("export-equality"), result("kill")
    ratios = {preset: serving_row(f"{preset} int8 latency beam 5")["ratio"] for preset in ("base", "tiny")}
    all_of = f"of {export['sentences']:,}"
    return {
        "export-equality": f"{export['greedy']:,} {all_of} greedy, {export['beam_5']:,} {all_of} with beam 5",
        "kill": f"{kill['value']} of {kill['target']}",
        "serving-cpu-quick": f"`base` {ratios['base']:.2f}, `tiny` {ratios['tiny']:.2f}",
    }


def test_benchmarks_of_the_readme_are_those_of_the_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if "bench/results/" in line and line.startswith("|")]
    wanted = figures()
    assert len(rows) == len(wanted)
    for row in rows:
        [name] = re.findall(r"bench/results/([\w-]+)\.json", row)
        assert f"| {wanted[name]} |" in row
        targets = re.findall(r"`make ([a-z-]+)", row)
        assert targets and all(
            re.search(rf"^{each}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for each in targets
        )
