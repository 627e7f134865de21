"""The options that commands share, and what they mean: parameters, a profile, settings, the outputs' folder."""

import argparse
import os
from pathlib import Path
from typing import Any

import yaml

from vismem.cli.parser import Parser
from vismem.config import PARAMS_FILE, Config, load_config
from vismem.workspace import make_workspace, rebase


def common_options() -> Parser:
    """The options of commands that read parameters."""
    parser = Parser(add_help=False)
    add = parser.add_argument
    add("--params", type=Path, default=PARAMS_FILE, metavar="FILE", help="parameter file (default: %(default)s)")
    add("--profile", metavar="PROFILE", help="a profile of deploy/profiles/; it works in runs/PROFILE/")
    about = "one parameter, as in stage1.steps=30 or prepare.sources.0.train=500; may be repeated"
    add("--set", type=setting, action="append", default=[], metavar="KEY=VALUE", dest="settings", help=about)
    return parser


def output_options() -> Parser:
    """The option of commands that read or write the steps' outputs."""
    parser = Parser(add_help=False)
    about = "folder of the steps' outputs (default: artifacts)"
    parser.add_argument("--artifacts", type=Path, metavar="FOLDER", help=about)
    return parser


def setting(text: str) -> tuple[str, Any]:
    """Key and value of `KEY=VALUE`: a dotted key, and a value as in params.yaml."""
    key, equals, value = text.partition("=")
    if not (key.strip() and equals):
        raise argparse.ArgumentTypeError(f"'{text}' is not KEY=VALUE, such as stage1.steps=30")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"the value of '{text}' is not valid YAML") from None


def load(arguments: argparse.Namespace) -> Config:
    """The parameters that the common options name."""
    return load_config(arguments.params, arguments.profile, dict(arguments.settings))


def enter(arguments: argparse.Namespace) -> tuple[Config, Path]:
    """The parameters and the artifacts' folder; with a profile, also change to its workspace."""
    config, artifacts = load(arguments), getattr(arguments, "artifacts", None)
    if arguments.profile is None:
        return config, artifacts or Path("artifacts")
    root, folder = arguments.params.resolve().parent, make_workspace(arguments.params, arguments.profile)
    artifacts = artifacts.absolute() if artifacts else Path("artifacts")
    os.chdir(folder)
    return rebase(config, root, folder), artifacts
