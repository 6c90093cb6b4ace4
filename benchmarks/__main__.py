"""python -m benchmarks overhead | op | model"""

from __future__ import annotations

import argparse

from benchmarks import model, op, overhead

COMMANDS = {"overhead": overhead.main, "op": op.main, "model": model.main}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    COMMANDS[parser.parse_args().command]()
