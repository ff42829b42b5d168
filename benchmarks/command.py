"""What the benchmarks that run without pytest share: their options, and the loop over networks that holds the bars."""

import argparse
import json
import os
import sys
from pathlib import Path

import torch


def options(doc, networks):
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(networks)}; default all")
    parser.add_argument("--json", type=Path, help="write the table there")
    parser.add_argument("--smoke", action="store_true", help="few images, one round, no bars")
    return parser


def run(args, networks, measure, table, broken):
    """Measures and prints each network; ends with the bars that do not hold."""
    every = []
    for name in args.networks or networks:
        every.append(measure(name, args.smoke))
        print(table(every[-1]), flush=True)
        if args.json:  # what there is, should a later network fail
            args.json.write_text(json.dumps(machine() | {"networks": every}, indent=1) + "\n")
    if bad := [line for found in every for line in broken(found)]:
        sys.exit("\n".join(["bars that do not hold:", *bad]))


def machine():
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ": unknown")
    name = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPUs{cpu.partition(':')[2]}"
    )
    return {"machine": name, "torch": torch.__version__, "threads": torch.get_num_threads(), "load": os.getloadavg()}
