"""python -m benchmarks overhead | op | keras"""

from __future__ import annotations

import argparse

from benchmarks import keras, op, overhead

COMMANDS = {"overhead": overhead.main, "op": op.main, "keras": keras.main}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    COMMANDS[parser.parse_args().command]()
