"""The program around the commands: help, errors, exit statuses, streams."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from deltafold.compress import DeltafoldError
from deltafold.compress.progress import Progress
from deltafold.compress.sizes import human
from deltafold.server.cli.bar import Bar
from deltafold.server.cli.main import COMMANDS, Lazy, cli
from deltafold.server.cli.output import table

ROOT = Path(__file__).parents[2]
#: The surface. A change here is a change that users see: change it on purpose, and `docs/cli.md` too.
SURFACE = {
    "compress": "-o --out --codec --set --edit --recipe --accept --against --base-quantization "
    "--target-size --max-kl --candidates --dry-run "
    "--calibrate --calibrate-rows --calibrate-length --reference --safe --device --fit-scales "
    "--fit-terms "
    "--fit-steps --fit-lr "
    "--jobs --max-memory --fresh --overwrite --quiet --json --debug",
    "family": "-o --out --method --codec --names --set --accept --overwrite --quiet --json --debug",
    "import-blocks": "-o --out --overwrite --quiet --json --debug",
    "import-lora": "-o --out --accept --overwrite --quiet --json --debug",
    "merge": "--base --method --weights -o --out --codec --set --edit --recipe --companions "
    "--overwrite --quiet --json --debug",
    "inspect": "--tensors --json --debug",
    "verify": "--base --full --quiet --json --debug",
    "eval": "--base --against --data --rows --length --device --dry-run --quiet --json --debug",
    "diagnose": "--calibrate --calibrate-rows --calibrate-length --codec --edit --steps --group-size "
    "--reference --safe --device -o --out --quiet --json --debug",
    "restore": "--base -o --out --dtype --overwrite --quiet --json --debug",
    "export": "--base --to -o --out --rank --drop --dtype --overwrite --quiet --json --debug",
    "report": "-o --out --svg-dir --json --debug",
    "zoo": "",
    "zoo add": "--name --copy --move --link --overwrite --quiet --json --debug",
    "zoo list": "--json --debug",
    "zoo rm": "--force --json --debug",
    "zoo alias": "--rm --json --debug",
    "zoo gc": "--dry-run --min-bytes --quiet --json --debug --unfinished",
    "zoo verify": "--base --full --quiet --json --debug",
    "pull": "-o --out --zoo --name --revision --overwrite --quiet --json --debug",
    "push": "--private --revision --dry-run --quiet --json --debug",
    "plan": "--zoo --engine --max-loras --dtype --json --debug",
    "codecs": "--json --debug",
    "schema": "--json --debug",
    "version": "--json --debug",
}
NAMES = [
    *(
        "compress",
        "family",
        "import-blocks",
        "import-lora",
        "merge",
        "inspect",
        "verify",
        "eval",
        "diagnose",
        "restore",
        "export",
    ),
    *("report", "zoo", "pull", "push"),
    *("plan", "serve", "chat", "demo"),
    *("codecs", "schema", "version"),
]


def run(*args, **options):
    return CliRunner().invoke(cli, [str(a) for a in args], **options)


def program(*args, code: str = "", **options):
    """The program as a process of its own, or a piece of code instead."""
    start = ["-c", code or "from deltafold.server.cli.main import main; main()"]
    return subprocess.run(
        [sys.executable, *start, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        **options,
    )


def command(name: str) -> click.Command:
    found: click.Command | None = cli
    for word in name.split():
        assert isinstance(found, click.Group)
        found = found.get_command(click.Context(found), word)
    assert found is not None
    return found


def with_members() -> list[str]:
    """Every command, and behind a group those that are in it."""
    names = []
    for name in COMMANDS:
        found = command(name)
        members = found.commands if isinstance(found, click.Group) else {}
        names += [name, *(f"{name} {member}" for member in members)]
    return names


def options_of(name: str) -> list[str]:
    return [o for p in command(name).params if isinstance(p, click.Option) for o in p.opts]


def test_the_list_of_commands_is_frozen():
    assert list(COMMANDS) == NAMES


@pytest.mark.parametrize("name", SURFACE)
def test_option_names_are_frozen(name):
    assert sorted(options_of(name)) == sorted(SURFACE[name].split())


@pytest.mark.parametrize("name", SURFACE)
def test_help_has_an_example_and_says_what_the_list_says(name):
    result = run(*name.split(), "--help")
    assert result.exit_code == 0
    assert f"deltafold {name}" in result.stdout
    assert all(p.help for p in command(name).params if isinstance(p, click.Option))
    assert COMMANDS[name.split()[0]].help.endswith(".")


def test_help_lists_every_command():
    result = run("--help")
    assert result.exit_code == 0
    for name, lazy in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(lazy.help)}$", result.stdout, re.MULTILINE)


def test_help_is_quick_because_it_imports_little():
    code = """
import sys
from deltafold.server.cli.main import cli
for args in (["--help"], ["compress", "--help"], ["restore", "--help"], ["version"]):
    try:
        cli(args, prog_name="deltafold")
    except SystemExit as end:
        assert end.code == 0, end.code
heavy = {"torch", "transformers", "fastapi", "numpy", "pydantic", "tqdm"} & set(sys.modules)
assert not heavy, heavy
"""
    done = program(code=code)
    assert done.returncode == 0, done.stderr


def test_a_module_that_is_not_there_does_not_break_the_rest(monkeypatch):
    gone = {**COMMANDS, "demo": Lazy("deltafold.server.cli.nowhere:demo", "Gone.")}
    monkeypatch.setattr("deltafold.server.cli.main.COMMANDS", gone)
    assert run("--help").exit_code == 0
    result = run("demo")
    assert result.exit_code == 2
    assert "not part of this installation" in result.stderr


def test_a_missing_library_names_its_extra(monkeypatch):
    def load(name):
        raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")

    monkeypatch.setattr("deltafold.server.cli.main.import_module", load)
    result = run("serve")
    assert result.exit_code == 4
    assert "error[missing-extra]" in result.stderr
    assert "pip install 'deltafold[serve]'" in result.stderr


@pytest.mark.parametrize("args", [["vesion"], ["compress"], ["inspect", "x", "--colour"]])
def test_usage_errors(args):
    result = run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr
    as_json = run(*args, "--json")
    assert as_json.exit_code == 2
    assert json.loads(as_json.stdout)["error"]["code"] == "bad-argument"
    assert as_json.stderr == ""


def test_near_names():
    assert "Did you mean version?" in run("vesion").stderr


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["inspect", "/no/such"], 4, ["error[not-found]", "  fix: "]),
        (["compress", "/no/such", "b", "-o", "c"], 4, ["error[not-found]"]),
        (["compress", ".", "b", "-o", "c", "--codec", "x"], 2, ["unknown-codec", "fix: deltafold"]),
        (
            ["compress", ".", "b", "-o", "c", "--codec", "int:bits=9"],
            2,
            ["bad-recipe", "fix: --codec int:bits=4,group=0"],
        ),
        (
            ["compress", ".", "b", "-o", "c", "--set", "a*=int:bits=9"],
            2,
            ["bad-recipe", "fix: --set 'a*=int:bits=4,group=0'"],
        ),
        (
            ["compress", ".", "b", "-o", "c", "--set", "a*=x"],
            2,
            ["unknown-codec", "fix: deltafold codecs"],
        ),
        (["compress", ".", "b", "-o", "c", "--set", "a"], 2, ["bad-argument", "'*norm*=exact'"]),
        (["compress", ".", "b", "-o", "c", "--set", "=a"], 2, ["bad-argument", "'*norm*=exact'"]),
        (["compress", ".", "b", "-o", "c", "--recipe", "/no"], 4, ["not-found", "/no"]),
        (
            ["merge", "a", "--base", ".", "-o", "c", "--method", "ties", "--weights", "1;2"],
            2,
            ["bad-argument", "fix: --weights 0.7,0.3"],
        ),
        (["verify", "/no/such", "--full"], 4, ["not-found"]),
    ],
)
def test_errors_go_to_stderr_and_end_in_the_fix(args, status, words):
    result = run(*args)
    assert result.exit_code == status
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stderr
    data = json.loads(run(*args, "--json").stdout)
    assert set(data) == {"error"}
    assert set(data["error"]) == {"code", "message", "facts", "fix"}


@pytest.fixture
def failing(monkeypatch):
    """Makes `deltafold version` raise."""

    def fail(error: BaseException):
        def raises(name):
            raise error

        monkeypatch.setattr("deltafold.server.cli.version._version", raises)

    return fail


def test_a_bug(failing):
    failing(ZeroDivisionError("one over nothing"))
    result = run("version")
    assert result.exit_code == 1
    assert "bug in deltafold: ZeroDivisionError: one over nothing" in result.stderr
    assert "--debug" in result.stderr
    assert "Traceback" not in result.stderr
    assert json.loads(run("version", "--json").stdout)["error"]["code"] == "bug"


@pytest.mark.parametrize("args", [["version", "--debug"], ["--debug", "version"]])
def test_debug_prints_the_traceback(failing, args):
    failing(ZeroDivisionError("one over nothing"))
    result = run(*args)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    failing(DeltafoldError("busy", "somebody else is at it."))
    result = run(*args)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 5, "not-enough-memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 5, "not-enough-memory"),
        (PermissionError(13, "Permission denied", "/secret"), 4, "not-found"),
        (DeltafoldError("coverage", "a tensor is missing."), 3, "coverage"),
    ],
)
def test_statuses(failing, error, status, code):
    failing(error)
    assert run("version").exit_code == status
    result = run("version", "--json")
    assert result.exit_code == status
    assert json.loads(result.stdout)["error"]["code"] == code


def test_colours(failing):
    failing(DeltafoldError("busy", "somebody else is at it."))
    assert "\x1b[31m" in run("version", color=True).stderr
    assert "\x1b" not in run("version").stderr
    assert "\x1b" not in run("version", color=True, env={"NO_COLOR": "1"}).stderr


def test_interrupting_a_real_run(pair):
    code = """
import signal, sys, time
# A shell's background jobs ignore Ctrl-C, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
from deltafold.compress import streaming
encode = streaming.encode_tensor
def slow(*args):
    print("packing", file=sys.stderr, flush=True)
    time.sleep(30)
    return encode(*args)
streaming.encode_tensor = slow
from deltafold.server.cli.main import main
main()
"""
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            code,
            "compress",
            pair.base,
            pair.variant,
            "-o",
            pair.out,
            "--jobs",
            "1",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        while "packing" not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert "interrupted; what is done is kept" in err
    assert "Traceback" not in err
    assert not pair.out.exists()
    assert pair.out.with_name("delta.partial").is_dir(), "the journal is kept"


def test_output_that_nobody_reads():
    line = f"{sys.executable} -c 'from deltafold.server.cli.main import main; main()' codecs"
    done = subprocess.run(
        ["bash", "-c", f"{line} | head -c 1"], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr


def test_the_installed_program():
    script = Path(sys.executable).with_name("deltafold")
    if not script.exists():
        pytest.skip("deltafold is not installed as a script here")
    done = subprocess.run([script, "version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("deltafold ")


class Terminal:
    """A stream that says it is a terminal, or not."""

    def __init__(self, live: bool):
        self.live, self.text = live, ""

    def isatty(self) -> bool:
        return self.live

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_the_bar_in_a_terminal(monkeypatch):
    stream = Terminal(live=True)
    bar = Bar(stream)
    for phase in ("hash", "hash", "pack"):
        for done in (1, 2, 3):
            bar(Progress(phase, "w", done, 3, 10**6))
    bar.close()
    assert "pack" in stream.text
    assert "/3 tensors" in stream.text
    assert "GB/s, peak" in stream.text
    assert " left" in stream.text


def test_plain_lines_elsewhere(monkeypatch):
    stream = Terminal(live=False)
    bar = Bar(stream)
    for _ in range(2):
        for done in range(1, 4):
            bar(Progress("hash", "w", done, 3, 10**6))
    monkeypatch.setattr("deltafold.server.cli.bar._EVERY", 0.0)
    bar(Progress("pack", "w", 1, 2, 10**6))
    bar(Progress("pack", "w", 2, 2, 10**6))
    bar.close()
    lines = stream.text.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("hash: 3/3 tensors, ")
    assert lines[2].endswith(" s left")
    assert re.fullmatch(r"pack: 2/2 tensors, [\d.]+ GB/s, peak [\d.]+ GiB", lines[3])


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1023 * 1024, "1023 KiB"),
        (1234567890, "1.15 GiB"),
        (5 * 2**50, "5120 TiB"),
    ],
)
def test_sizes(nbytes, text):
    assert human(nbytes) == text


def test_tables():
    assert table(["a", "n"], [["long name", "1"], ["b", "22"]], "n") == (
        "a           n\nlong name   1\nb          22"
    )


def documented(text: str) -> dict[str, set[str]]:
    """Option names of each command's section in `docs/cli.md`."""
    sections = re.split(r"^###? `deltafold ([\w -]+)`$", text, flags=re.MULTILINE)
    found = zip(sections[1::2], sections[2::2], strict=True)
    return {
        name: set(re.findall(r"^\| `([^`]+)`", body.split("\n## ")[0], re.MULTILINE))
        for name, body in found
    }


def test_the_docs_know_every_option():
    documented_options = documented((ROOT / "docs" / "cli.md").read_text("utf-8"))
    assert list(documented_options) == with_members()
    for name in documented_options:
        listed = {o for cell in documented_options[name] for o in re.findall(r"--?[a-z-]+", cell)}
        expected = set(options_of(name))
        expected |= {
            o for p in command(name).params if isinstance(p, click.Option) for o in p.secondary_opts
        }
        assert listed == expected - {"--debug"}, name
