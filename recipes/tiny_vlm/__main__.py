"""`python -m recipes.tiny_vlm`: make the tiny VLM, and a memory for it."""

import argparse
import shlex
import sys
from pathlib import Path

from recipes.tiny_vlm.memory import memory_config, train_memory
from recipes.tiny_vlm.train import Settings, train_last, train_longer, train_tiny_vlm
from recipes.tiny_vlm.wide import WideSettings, train_wide
from vismem.provenance import git_state


def main() -> None:
    """Train what the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m recipes.tiny_vlm", description="Train the tiny VLM from nothing.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--memory", type=Path, help="also train a memory for it, into this folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--keep", action="store_true", help="take the model that is in --out, train the memory only")
    which.add_argument("--last", action="store_true", help="take that model, and train it for the last phase")
    longer = "take that model, and add to its card what its last phase once more would gain"
    which.add_argument("--longer", action="store_true", help=longer)
    which.add_argument("--wide", action="store_true", help="a model for NLVR's wide images, on generated boxes")
    arguments = parser.parse_args()
    origin = {"command": shlex.join(["python", "-m", "recipes.tiny_vlm", *sys.argv[1:]]), "git": git_state()}
    if arguments.wide:
        print("model:", train_wide(arguments.out, arguments.seed, WideSettings(), origin))
    elif not arguments.keep:
        train_one = train_longer if arguments.longer else train_last if arguments.last else train_tiny_vlm
        print("model:", train_one(arguments.out, arguments.seed, Settings(), origin))
    if arguments.memory:
        config = memory_config(arguments.out, arguments.seed)
        print("memory:", train_memory(arguments.memory, arguments.out, config, origin))


if __name__ == "__main__":
    main()
