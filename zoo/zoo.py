#!/usr/bin/env python3
"""The bug zoo: slips that real engines made, put into this code one at a time, to see the tests fail.

    zoo/zoo.py check                 every entry of mutations.toml still applies (no build)
    zoo/zoo.py run [M12 M14 ...]     all entries, or these: built once, each run until two tests failed
    zoo/zoo.py run --sample          those marked so, against the suites that killed them last time
    zoo/zoo.py page                  docs/zoo.md from mutations.toml and matrix.json

`run` copies the sources to target/zoo, turns the place of every entry into a switch,

    if crate::zoo::on(12) { the slip } else { the code }

and builds the tests once; the environment variable ZOO throws a switch. A switch that nothing kills
is a survivor. `run` records what it found in matrix.json.

Options: --jobs N (2), --all (do not stop at two failed tests), --suites NAMES (build and run these
alone, as in moe-runner/router,moe-runner/unit). Needs Python 3.11 and cargo.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENTRIES = ROOT / "zoo/mutations.toml"
MATRIX = ROOT / "zoo/matrix.json"
PAGE = ROOT / "docs/zoo.md"
COPY = ROOT / "target/zoo"
# The suites that are built and run. The others test what no slip is put into: the command, MPI,
# memory.
SUITES = {
    "moe-kernels": ["unit", "packing", "stored", "quantise", "minifloats", "ggml_blocks"],
    "moe-runner": [
        "unit", "router", "runner", "golden", "reference", "architectures", "quantised", "exchange",
        "exchange_resident", "exchange_one_sided",
        "ranks", "sixteen_bits", "int8_activations", "balance_moves", "comm_threads", "emulation",
        "large", "doctor", "cost", "balance", "oracle", "quantize", "hostile",
    ],
    "moe-acid": ["write"],
}

SWITCH = """
#[allow(missing_docs, unreachable_pub, dead_code)]
pub mod zoo {
    use std::sync::LazyLock;
    static ON: LazyLock<usize> =
        LazyLock::new(|| std::env::var("ZOO").ok().and_then(|n| n.parse().ok()).unwrap_or(0));
    #[inline]
    pub fn on(number: usize) -> bool {
        *ON == number
    }
}
"""


def fail(message):
    sys.exit(f"zoo: {message}")


# ---- entries -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Place:
    """A text of one file, and what stands there instead where the switch is on."""

    file: str
    start: int
    end: int
    replace: str
    number: int


@dataclasses.dataclass
class Entry:
    id: str
    number: int  # of its switch
    fields: dict

    def __getattr__(self, name):
        return self.fields.get(name)

    @property
    def is_switch(self):
        return not (self.impossible or self.gpu)

    def places(self, read):
        """Its places, each a text that occurs once (after the text `after`, where there is one)."""
        for at in self.fields.get("places", [self.fields]):
            text = read(at["file"])
            start = 0
            if after := at.get("after"):
                start = once(text, after, self.id, at["file"]) + len(after)
                start = text.find(at["find"], start)
                if start < 0:
                    fail(f"{self.id}: {at['file']} has no longer, after {after!r}:\n{at['find']}")
            else:
                start = once(text, at["find"], self.id, at["file"])
            replace = at.get("replace", "")
            yield Place(at["file"], start, start + len(at["find"]), replace, self.number)


def once(text, find, id, file):
    count = text.count(find)
    if count != 1:
        fail(f"{id}: {file} has {count} times, not once:\n{find}")
    return text.index(find)


def entries():
    with ENTRIES.open("rb") as file:
        fields = tomllib.load(file)["mutation"]
    all = [Entry(entry["id"], number, entry) for number, entry in enumerate(fields, 1)]
    for entry in all:
        for key in ["slip", "file"] if "places" not in entry.fields else ["slip"]:
            if key not in entry.fields:
                fail(f"{entry.id}: has no {key}")
    ids = [entry.id for entry in all]
    for id in ids:
        if ids.count(id) > 1:
            fail(f"{id}: there are two")
    return all


def reader():
    texts = {}

    def read(file):
        if file not in texts:
            path = ROOT / file
            texts[file] = path.read_text() if path.is_file() else ""
        return texts[file]

    return read


# ---- the instrumented copy -----------------------------------------------------------------------


def render(text, places, start, end):
    """The text from start to end with a switch at every place; places may hold others."""
    out, at = [], start
    places = sorted(places, key=lambda place: (place.start, -place.end))
    while places:
        span = (places[0].start, places[0].end)
        if span[0] < at or span[1] > end:
            fail(f"places overlap:\n{text[span[0]:span[1]]}")
        same = [place for place in places if (place.start, place.end) == span]
        inner = [p for p in places if p not in same and p.start < span[1]]
        places = [p for p in places if p not in same and p not in inner]
        code = render(text, inner, *span)
        chain = "".join(f"if crate::zoo::on({p.number}) {{ {p.replace} }} else " for p in same)
        switch = f"{chain}{{ {code} }}"
        statement = code.rstrip().endswith((";", "}"))
        out += [text[at : span[0]], switch if statement else f"({switch})"]
        at = span[1]
    return "".join(out) + text[at:end]


def instrument(all, chosen):
    """Copies what git knows of the workspace, with switches for the chosen entries; leaves alone what
    has not changed. Crates with switches stand in another folder than they do in the workspace: so
    cargo tells their artifacts from the usual ones, and shares those of all else."""
    read, by_file = reader(), {}
    for entry in all:
        for place in entry.places(read):
            if entry in chosen:
                by_file.setdefault(place.file, []).append(place)
    switched = {file.split("/")[1] for file in by_file}
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "crates", "docs", "models", "Cargo.toml", "Cargo.lock",
         "README.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\n")
    written = set()
    for file in listed:
        path, crate = ROOT / file, file.split("/")[1] if "/" in file else None
        if not path.is_file():
            continue
        data = path.read_bytes()
        if places := by_file.get(file):
            text = data.decode()
            data = render(text, places, 0, len(text)).encode()
        if crate in switched and re.fullmatch(r"crates/[^/]+/src/(lib|main)\.rs", file):
            data += SWITCH.encode()
        if file == "Cargo.toml":
            for name in switched:
                data = data.replace(f'"crates/{name}"'.encode(), f'"switched/{name}"'.encode())
        to = COPY / (file.replace("crates/", "switched/", 1) if crate in switched else file)
        written.add(to)
        if not (to.is_file() and to.read_bytes() == data):
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(data)
            shutil.copystat(path, to) if data == path.read_bytes() else shutil.copymode(path, to)
    for path in COPY.rglob("*"):
        if path.is_file() and path not in written:
            path.unlink()
    return switched


@dataclasses.dataclass
class Suite:
    """A test binary."""

    name: str
    path: str
    folder: str
    seconds: float = 0.0


def build(suites):
    """Builds the tests: of all suites, or of those named."""
    suites = suites or [f"{crate}/{name}" for crate, names in SUITES.items() for name in names]
    built = []
    for crate in SUITES:
        targets = [name.split("/")[1] for name in suites if name.split("/")[0] == crate]
        if targets:
            built += build_crate(crate, targets)
    return built


def build_crate(crate, targets):
    command = ["cargo", "test", "--no-run", "--locked", "--message-format=json", f"-p{crate}"]
    command += ["--manifest-path", str(COPY / "Cargo.toml"), "--target-dir", str(ROOT / "target")]
    command += ["--lib"] * ("unit" in targets)
    command += [part for target in targets if target != "unit" for part in ("--test", target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    built = []
    for line in done.stdout.splitlines():
        message = json.loads(line)
        if message.get("reason") == "compiler-message" and message["message"]["level"] == "error":
            print(message["message"]["rendered"], file=sys.stderr)
        if message.get("reason") != "compiler-artifact" or not message.get("executable"):
            continue
        if not message["profile"]["test"]:
            continue
        folder = pathlib.Path(message["manifest_path"]).parent
        target = message["target"]
        name = target["name"] if target["kind"] == ["test"] else "unit"
        built.append(Suite(f"{folder.name}/{name}", message["executable"], str(folder)))
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        fail("the instrumented copy does not build")
    return built


# ---- runs ----------------------------------------------------------------------------------------


def run_suite(suite, number, tests=(), limit=600.0):
    """The failed tests of a run; None where all passed. A crash or a hang counts as one."""
    # the same random cases in every run: what fails does so because of the slip
    environment = {
        **os.environ, "ZOO": str(number), "CARGO_MANIFEST_DIR": suite.folder, "PROPTEST_RNG_SEED": "1",
    }
    command = [suite.path, *(["--exact", *tests] if tests else [])]
    try:
        done = subprocess.run(
            command, cwd=suite.folder, env=environment, timeout=limit,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", text=True,
        )
    except subprocess.TimeoutExpired:
        return ["hangs"]
    if done.returncode == 0:
        return None
    # what a test writes to a terminal may stand between its name and its result
    if number == 0:
        print(done.stdout[-3000:], file=sys.stderr)
    failed = done.stdout.rpartition("\nfailures:\n")[2].partition("\ntest result:")[0]
    failed = sorted({line.strip() for line in failed.splitlines() if line.startswith("    ")})
    return failed or ["aborts"]


def recorded():
    """What the last runs found, by entry: see `attempt`, and the commit."""
    return json.loads(MATRIX.read_text()) if MATRIX.is_file() else {}


def known_killers(entry, matrix):
    """What killed it when the matrix was recorded, as {suite: [test]}."""
    tests = {}
    for suite, test in matrix.get(entry.id, {}).get("killers", []):
        tests.setdefault(suite, []).append(test)
    return tests


def attempt(entry, suites, known, everything):
    """Runs one entry: what killed it before, then everything, until two tests have failed (one, where
    what killed it before is all that was built). Gives the failed tests, and whether all were run."""
    start = time.monotonic()
    killers, ran = [], set()

    def note(suite, failed):
        for test in failed or []:
            if [suite.name, test] not in killers:
                killers.append([suite.name, test])

    for suite in suites:
        if tests := known.get(suite.name, []):
            note(suite, run_suite(suite, entry.number, tests, 120))
    for suite in suites:
        if len(killers) >= 2 and not everything:
            break
        note(suite, run_suite(suite, entry.number, (), max(60.0, 10 * suite.seconds)))
        ran.add(suite.name)
    whole = len(ran) == sum(map(len, SUITES.values()))
    return dict(killers=sorted(killers), whole=whole, seconds=round(time.monotonic() - start, 1))


def time_suites(suites, jobs):
    """Runs everything with all switches off: it must pass. Sorts the suites by their time."""

    def one(suite):
        start = time.monotonic()
        failed = run_suite(suite, 0)
        suite.seconds = time.monotonic() - start
        return suite, failed

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for suite, failed in pool.map(one, suites):
            print(f"  {suite.name:32} {suite.seconds:6.1f} s", flush=True)
            if failed:
                fail(f"{suite.name} fails with all switches off: {', '.join(failed)}")
    suites.sort(key=lambda suite: suite.seconds)


def run(options):
    all = entries()
    chosen = [entry for entry in all if entry.is_switch]
    if options.sample:
        chosen = [entry for entry in chosen if entry.sample]
    if options.ids:
        chosen = [entry for entry in chosen if entry.id in options.ids]
        if missing := set(options.ids) - {entry.id for entry in chosen}:
            fail(f"there is no {', '.join(sorted(missing))} to run")
    switched = instrument(all, chosen)
    started = time.monotonic()
    matrix = recorded()
    known = {entry.id: known_killers(entry, matrix) for entry in chosen}
    first = {next(iter(known[entry.id]), "moe-runner/unit") for entry in chosen}
    suites = build(first if options.sample else set(filter(None, options.suites.split(","))))
    print(f"switches in {', '.join(sorted(switched))}", flush=True)
    built = time.monotonic() - started
    print(f"{len(suites)} test binaries with {len(chosen)} switches to throw, built in {built:.0f} s", flush=True)
    if not options.sample:
        time_suites(suites, options.jobs)
    results = {}
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        tasks = {pool.submit(attempt, e, suites, known[e.id], options.all): e for e in chosen}
        for task in concurrent.futures.as_completed(tasks):
            entry, result = tasks[task], task.result()
            results[entry.id] = result
            killers = result["killers"]
            how = f"{killers[0][0]} {killers[0][1]}" if killers else "SURVIVES"
            more = f" +{len(killers) - 1}" if len(killers) > 1 else ""
            print(f"{entry.id:5} {result['seconds']:6.1f} s  {how}{more}", flush=True)
    survivors = [id for id, result in results.items() if not result["killers"]]
    alone = [id for id, r in results.items() if r["whole"] and len(r["killers"]) == 1]
    print(f"{len(results)} slips: {len(results) - len(survivors)} killed, {len(survivors)} survive; "
          f"{len(alone)} by one test alone; {time.monotonic() - started:.0f} s")
    if not options.sample:
        commit = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(commit, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        rows = recorded() | {id: {**result, "commit": commit} for id, result in results.items()}
        rows = {entry.id: rows[entry.id] for entry in all if entry.id in rows}
        MATRIX.write_text(json.dumps(rows, indent=1) + "\n")
    if survivors:
        fail(f"no test notices {', '.join(survivors)}")


# ---- the page ------------------------------------------------------------------------------------


def page(_options):
    all, matrix = entries(), recorded()
    switches = [entry for entry in all if entry.is_switch]
    run = [e for e in switches if e.id in matrix]
    killed = [e for e in run if matrix[e.id]["killers"]]
    alone = [e for e in killed if matrix[e.id]["whole"] and len(matrix[e.id]["killers"]) == 1]
    impossible = [entry for entry in all if entry.impossible]
    gpu = [entry for entry in all if entry.gpu]
    issues = {issue for entry in all for issue in entry.issues or []}
    lines = [
        "# The bug zoo",
        "",
        "Every engine makes the same slips again. Here they are, collected from public reports and put into",
        "this code one at a time, to see whether the tests notice. `zoo/mutations.toml` has the places;",
        "`zoo/zoo.py run` builds the tests once with a switch at every place, runs each, and fails where one",
        "survives or where an entry no longer applies; `zoo/zoo.py page` writes this page.",
        "",
        "| | |",
        "|---|---|",
        f"| entries | {len(all)}, from {len(issues)} public reports |",
        f"| put into the code and run | {len(run)} |",
        f"| killed by the tests | {len(killed)}, of these by one test alone {len(alone)} |",
        f"| survive | {len(run) - len(killed)} |",
        f"| impossible here, by type | {len(impossible)} |",
        f"| need a GPU to run | {len(gpu)} |",
        "",
        "A run stops at the second failed test, so the number of killers is a least one. New in the wild: an",
        "entry first, then the test that kills it.",
        "",
        "## Killed, or not",
        "",
        "| | the slip | place | killed by | at commit | reports |",
        "|---|---|---|---|---|---|",
    ]
    cell = lambda text: str(text).replace("|", "\\|")
    cite = lambda entry: cell(", ".join(entry.issues or []))
    for entry in switches:
        result = matrix.get(entry.id, {})
        killers = result.get("killers", [])
        first = f"{killers[0][0]}: `{killers[0][1]}`" if killers else "**survives**" if result else "not run"
        more = f" +{len(killers) - 1}" if len(killers) > 1 else ""
        file = entry.file or entry.fields["places"][0]["file"]
        file = file.removeprefix("crates/").replace("/src/", ": ")
        lines.append(f"| {entry.id} | {cell(entry.slip)} | {file} | {cell(first)}{more} | {result.get('commit', '')} | {cite(entry)} |")
    lines += ["", "## Impossible here", "", "| | the slip | why | reports |", "|---|---|---|---|"]
    lines += [f"| {e.id} | {cell(e.slip)} | {cell(e.impossible)} | {cite(e)} |" for e in impossible]
    lines += ["", "## On GPUs", "", "These need a GPU to run: `cargo test -p moe-cuda` there is to fail with each.", ""]
    lines += ["| | the slip | place | reports |", "|---|---|---|---|"]
    lines += [f"| {e.id} | {cell(e.slip)} | {e.file.removeprefix('crates/')} | {cite(e)} |" for e in gpu]
    lines += ["", "## What was seen", "", "| date | symptom | reports | here |", "|---|---|---|---|"]
    seen = sorted((e for e in all if e.symptom), key=lambda e: str(e.date))
    lines += [f"| {e.date or ''} | {cell(e.symptom)} | {cite(e)} | {e.id} |" for e in seen]
    PAGE.write_text("\n".join(lines) + "\n")


def check(_options):
    all, read, by_file = entries(), reader(), {}
    for entry in all:
        for place in entry.places(read):
            by_file.setdefault(place.file, []).append(place)
    for file, places in by_file.items():
        render(read(file), places, 0, len(read(file)))
    print(f"{len(all)} entries apply")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("check").set_defaults(work=check)
    commands.add_parser("page").set_defaults(work=page)
    runs = commands.add_parser("run")
    runs.set_defaults(work=run)
    runs.add_argument("ids", nargs="*")
    runs.add_argument("--sample", action="store_true")
    runs.add_argument("--all", action="store_true")
    runs.add_argument("--suites", default="")
    runs.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    options.work(options)


if __name__ == "__main__":
    main()
