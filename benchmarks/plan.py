"""Plans every config of pods and GPUs, and keeps the figures.

    python -m benchmarks.plan [--again] [LOCATION ...]

Each row is `opd-jax plan --config=LOCATION --noremedies` in a process of its
own, one after the other: minutes each. Rows that are there are kept, unless
they are named or --again is given, so that an interrupted run goes on.
`python -m docs.generate` puts the table into docs/plan.md.
"""

import argparse
import importlib.metadata
import json
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results" / "plan.json"
FOLDERS = ("pods", "gpu")

Rows = dict[str, Mapping[str, Any]]


def locations() -> Iterator[str]:
  """Every experiment of `FOLDERS`: a file, or each of its topologies."""
  for folder in FOLDERS:
    for path in sorted((REPO / "configs" / folder).glob("*.py")):
      name = path.relative_to(REPO).as_posix()
      topologies = runpy.run_path(str(path)).get("TOPOLOGIES", ("",))
      for topology in topologies:
        yield f"{name}:{topology}" if topology else name


def read() -> Rows:
  """The figures of each location that has been planned."""
  return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def measure(location: str) -> dict[str, Any]:
  """The figures of a plan, and what made them."""
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "plan.json"
    command = [
      *(sys.executable, "-m", "opd_jax.cli", "plan", "--noremedies"),
      *(f"--config={location}", f"--json={file}"),
    ]
    subprocess.run(command, cwd=REPO, check=False, stdout=subprocess.DEVNULL)
    figures = json.loads(file.read_text())
  for program in figures.get("programs", {}).values():
    program["largest"] = program["largest"][:3]
  speed = figures.get("speed", {})
  if "decode" in speed:
    speed["decode"]["moves"] = speed["decode"]["moves"][:3]
  packages = ["jax"]
  if "programs" in figures:
    packages.append("libtpu")
  figures["versions"] = {
    name: importlib.metadata.version(name) for name in packages
  }
  return figures


def table(rows: Rows) -> str:
  """The rows of the table of docs/plan.md."""
  lines = [
    "| command | devices | memory used | temporaries | sample, score, update | "
    "tokens/s/chip | decode bytes | compiled in |",
    "|---|---|---|---|---|---|---|---|",
  ]
  lines += [
    _line(location, rows[location])
    for location in locations()
    if location in rows
  ]
  return "\n".join(lines)


def _line(location: str, figures: Mapping[str, Any]) -> str:
  estimate = figures["estimate"]
  used = estimate["total_bytes"] / figures["memory_bytes"]
  memory, temporaries, compiled = f"~{100 * used:.0f} %", "counted", "-"
  if "programs" in figures:
    memory = f"{100 * figures['used']:.0f} %" if figures["fits"] else "too much"
    temporaries = ", ".join(
      f"{program['temporary_bytes'] / 2**30:.1f} GiB"
      for program in figures["programs"].values()
    )
    compiled = f"{figures['compile_seconds']:.0f} s"
  speed = figures.get("speed")
  if speed is None:
    return (
      f"| `opd-jax plan --config={location}` | {figures['topology']}, "
      f"{figures['chips']} | does not fit | - | - | - | - | - |"
    )
  shares = ", ".join(
    f"{100 * phase['share']:.0f} %" for phase in speed["phases"].values()
  )
  decode = "-"
  if "decode" in speed:
    decode = f"{speed['decode']['ratio']:.2f}"
  return (
    f"| `opd-jax plan --config={location}` | {figures['topology']}, "
    f"{figures['chips']} | {memory} of {figures['memory_bytes'] / 2**30:.1f} "
    f"GiB | {temporaries} | {shares} | "
    f"{speed['tokens_per_second_per_chip']:,.0f} | {decode} | {compiled} |"
  )


def main() -> None:
  """Plans what is missing, and writes every row as it is done."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("locations", nargs="*")
  parser.add_argument("--again", action="store_true", help="all rows anew")
  options = parser.parse_args()
  rows = read()
  wanted = options.locations or [
    location
    for location in locations()
    if options.again or location not in rows
  ]
  for number, location in enumerate(wanted, start=1):
    print(f"{number}/{len(wanted)} {location}", flush=True)
    rows[location] = measure(location)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print(_line(location, rows[location]), flush=True)


if __name__ == "__main__":
  main()
