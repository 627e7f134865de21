"""What the command line says of itself: its overview, each command's help, hints at what was meant, completion."""

import subprocess
from importlib import metadata

import pytest

from vismem.cli import build_parser, main
from vismem.cli.look import VERSIONS
from vismem.cli.parser import STATUSES
from vismem.steps import BASELINES, STEPS


def usage_error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a wrong command line says."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a command prints that ends by itself, such as --help, with its lines joined."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_the_overview_has_every_command_in_a_group_and_every_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    text = build_parser().format_help()
    commands = build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    for word in (*commands, *STATUSES):  # type: ignore[misc]
        assert f"\n  {word} " in text
    assert main([]) == 2
    assert capsys.readouterr().err == text


def test_what_argparse_cannot_say_stands_below_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, "models", "--help")
    assert all(f" {action} " in said.partition(" actions:")[2] for action in VERSIONS)
    assert "vismem repro --force all steps again" in told(capsys, "repro", "--help")


@pytest.mark.parametrize("step", STEPS + BASELINES, ids=lambda step: step.name)
def test_a_step_s_help_says_what_it_does_reads_writes_and_depends_on(capsys: pytest.CaptureFixture[str], step) -> None:
    said = told(capsys, step.name, "--help")
    assert step.about[1:] in said
    for word in (*(f"artifacts/{name}" for name in (*step.inputs, step.name)), *step.sections, *step.optional):
        assert word in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("sumary",), "vismem: no command 'sumary' (did you mean 'summary'?)"),
        (("stage1", "--prams", "x"), "vismem stage1: unknown arguments --prams (did you mean '--params'?) x"),
        (("models", "rolback"), "no action 'rolback' (did you mean 'rollback'?); there are list, show, compare, "),
        (("params", "--set", "seed"), "'seed' is not KEY=VALUE"),
        (("params", "--set", "seed={"), "the value of 'seed={' is not valid YAML"),
        (("infer", "--image", "a.png"), "give one question, at the end or with --prompt"),
        (("infer", "--image", "a.png", "one?", "--prompt", "two?"), "give one question, at the end or with --prompt"),
        (("ask", "--image", "a.png"), "give one question, at the end or with --prompt"),
        (("models", "--artifacts"), "unknown argument --artifacts "),
        (("evaluate", "--suite", "paper", "--base", "x"), "--base goes with --model"),
    ],
)
def test_a_wrong_command_line_is_one_line_with_what_was_meant(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], said: str
) -> None:
    line = usage_error(capsys, *argv)
    assert said in line
    assert line.endswith("--help`")


@pytest.mark.parametrize("known", ["'show', 'list'", "show, list"], ids=["Python 3.12.7", "Python 3.12.8"])
def test_what_was_meant_is_found_in_the_words_of_every_python(capsys: pytest.CaptureFixture[str], known: str) -> None:
    with pytest.raises(SystemExit):
        build_parser().error(f"argument action: invalid choice: 'shw' (choose from {known})")
    assert "no action 'shw' (did you mean 'show'?); there are show, list; see" in capsys.readouterr().err


def test_the_version_is_that_of_the_installed_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "--version") == f"vismem {metadata.version('vismem')}"


def test_bash_completes_commands_options_and_profiles(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    (tmp_path / "deploy" / "profiles").mkdir(parents=True)
    (tmp_path / "deploy" / "profiles" / "smoke.yaml").touch()
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out + (
        'typed() { COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)); _shtab_vismem "$1" "${@: -1}"; echo "${COMPREPLY[*]}"; }\n'
        "typed vismem stag; typed vismem stage1 --pro; typed vismem stage1 --profile s; typed vismem models ro\n"
    )
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "stage1 stage2",
        "--profile --processes",
        "smoke",
        "rollback",
    ]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_too(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    assert main(["completion", shell]) == 0
    said = capsys.readouterr().out
    assert all(step.name in said for step in STEPS)
