"""Asks one engine about all checkpoints of a folder, and about one with a fault in its file.

    moe-runner acid write acid --form all
    python gather.py ENGINE ask_transformers.py acid [FORM ...] >> docs/acid-readings.jsonl

ENGINE is the column's name. A line for all forms of an architecture of which the engine says the same:
log-probabilities to two digits, or the last error that it told when it refused. The fault is gate and
up swapped, in the names of a copy of Mixtral. A line's command begins with what the environment says to
the engine (OMP_NUM_THREADS, VLLM_…): it makes the line again.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent


def swapped(checkpoint, folder):
    """A copy whose gate and up have each other's names."""
    copy = pathlib.Path(shutil.copytree(checkpoint, pathlib.Path(folder) / checkpoint.name))
    path = next(copy.glob("model.*"))
    data = bytearray(path.read_bytes())
    if path.suffix == ".gguf":
        names = [f"blk.0.ffn_{name}_exps.weight".encode() for name in ("gate", "up")]
        first, second = [struct.pack("<Q", len(name)) + name for name in names]
        other = {first: second, second: first}
        either = b"|".join(re.escape(name) for name in other)
        data = re.sub(either, lambda name: other[name[0]], bytes(data))
    else:
        end = 8 + struct.unpack("<Q", data[:8])[0]
        other = {b"w1": b"w3", b"w3": b"w1"}
        data[8:end] = re.sub(rb"(?<=\.)w[13](?=\.)", lambda name: other[name[0]], bytes(data[8:end]))
    path.write_bytes(data)
    return copy


def short(value, zero):
    if value is None:
        return None
    value = round(value - zero, 2)
    return int(value) if value == int(value) else value


def ask(engine, asker, checkpoint, control=None):
    probes = json.loads((checkpoint / "probes.json").read_text())
    line = {"engine": engine, "family": probes["family"], "forms": [probes["form"]]}
    settings = [f"{k}={shlex.quote(v)}" for k, v in sorted(os.environ.items()) if re.match("OMP_|VLLM_|GGML_", k)]
    command = f"python crates/moe-acid/askers/gather.py '{engine}' {asker} ./acid {' '.join(sys.argv[4:])}"
    line["command"] = " ".join([*settings, command])
    done = subprocess.run([sys.executable, HERE / asker, checkpoint], capture_output=True, text=True)
    try:
        said = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        words = [f"status {done.returncode}", *filter(str.strip, done.stderr.splitlines())]
        words = [one for one in words if re.search("error|assert", one, re.IGNORECASE)] or words
        said, line["refused"] = None, words[-1][:160]
    if said:
        # of the probes' own tokens nothing is read
        first = len(probes["prompt"])
        line["log_probabilities"] = [
            [0] * first + [short(v, row[first]) for v in row[first:]]
            for row in said["log_probabilities"]
        ]
    if control:
        line["control"] = control
    return line


def main():
    engine, asker, folder, *forms = sys.argv[1:]
    checkpoints = sorted(path.parent for path in pathlib.Path(folder).glob("*/probes.json"))
    checkpoints = [path for path in checkpoints if not forms or path.name.split("-", 1)[1] in forms]
    mixtral = [path for path in checkpoints if path.name.startswith("mixtral-")]
    with tempfile.TemporaryDirectory() as copy:
        fault = ["gate and up swapped in the file", "gate and up swapped"]
        lines = [ask(engine, asker, swapped(mixtral[0], copy), fault)]
    for line in (ask(engine, asker, checkpoint) for checkpoint in checkpoints):
        same = [one for one in lines if {**one, "forms": line["forms"]} == line]
        same[0]["forms"].extend(line["forms"]) if same else lines.append(line)
    for line in lines:
        print(json.dumps(line, separators=(",", ":")))


if __name__ == "__main__":
    main()
