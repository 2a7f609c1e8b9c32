"""What the documents tell people to type is understood; what they quote is really said; what they link to is there."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import kubernetes_validate
import pytest
import typer
import yaml

from deployments.cli import app, main
from deployments.config import AppConfig
from tests.docs.programs import check_click, check_docker, check_flags, check_pip, commented
from tests.images.recipe import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "helm").rglob("*.md")])
PAGES += sorted((ROOT / "examples").rglob("*.md"))
HELM = Path(sys.executable).parent / "helm"
CHART_ONLY = set(yaml.safe_load((ROOT / "helm" / "dibit" / "values.yaml").read_text(encoding="utf-8")))
CHART_ONLY -= set(AppConfig.model_fields)
"""Values of the chart that are no options of the application too."""
CONFIGURED = [ROOT / name for name in ("Dockerfile", "compose.yaml", "serve_config.yaml")]
"""Files whose comments show commands."""
OTHERS = {"curl", "cd", "cmake", "torchrun", "build/bin/llama-quantize"}
"""Programs whose arguments are not looked at."""

COMMAND = re.compile(
    r"^(?:\$ )?((?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:dibit|helm|kubectl|make|python|serve|ray|docker|hf|kind|pip)\b .*)$"
)


def fenced(text: str) -> Iterator[str]:
    """Lines of shell blocks, continued ones joined, without comments and output."""
    for block in re.findall(r"^```(?:sh|console|bash|shell)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield line.strip()


def inline(text: str) -> Iterator[str]:
    """Commands between backticks."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", prose):
        if COMMAND.match(code) and not re.search(r"[<…]|\.\.\.", code):
            yield code


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for line in [*fenced(text), *inline(text)]:
            if COMMAND.match(line):
                found.append((page.relative_to(ROOT).as_posix(), line))
    for file in CONFIGURED:
        found += [(file.name, re.sub(r"\s{2,}.*", "", line)) for line in commented(file) if COMMAND.match(line)]
    return list(dict.fromkeys(found))


def test_every_line_to_type_is_looked_at() -> None:
    for page in PAGES:
        for line in fenced(page.read_text(encoding="utf-8")):
            assert COMMAND.match(line) or words(line)[0] in OTHERS, f"{page.name}: {line}"


def words(line: str) -> list[str]:
    """Of the command itself: no environment, no redirection, no comment, no second command."""
    parts = shlex.split(line.removeprefix("$ "), comments=True)
    while re.match(r"^[A-Z_]+=", parts[0]):
        parts.pop(0)
    for end in (">", "|", "&&", ";", "<", "2>"):
        if end in parts:
            parts = parts[: parts.index(end)]
    return parts


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_are_understood(page: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = words(line)
    match Path(program).name:
        case "dibit":
            check_dibit(arguments)
        case "helm":
            check_helm(made_before(page, arguments, tmp_path, capsys))
        case "make":
            targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
            assert {word for word in arguments if "=" not in word} <= targets
        case "python":
            check_python(arguments, (ROOT / page).parent)
        case "pip":
            check_pip(arguments)
        case "docker":
            check_docker(arguments)
        case "ray" | "serve" | "hf" as name:
            check_click(name, arguments)
        case name:
            check_flags(name, arguments)


def check_dibit(arguments: list[str]) -> None:
    """Parse as the program would, without doing anything."""
    command: click.Command = typer.main.get_command(app)
    context = click.Context(command, info_name="dibit")
    while isinstance(command, click.Group):
        assert arguments, "a command is missing"
        name, *arguments = arguments
        found = command.get_command(context, name)
        assert found is not None, f"there is no dibit {name}"
        command = found
        if "--help" in arguments:
            return
    files = [ROOT / word for word in arguments if word.startswith("examples/")]
    assert all(path.exists() for path in files)
    command.make_context(command.name, list(arguments), parent=context)


def made_before(page: str, arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The arguments, with files that a `dibit` command of the page writes to in the place of their names."""
    made = {}
    for line in fenced((ROOT / page).read_text(encoding="utf-8")):
        command, _, name = line.partition(" > ")
        if name in arguments:
            with pytest.raises(SystemExit) as ended:
                main(words(command)[1:])
            assert ended.value.code == 0, command
            made[name] = folder / name
            made[name].write_text(capsys.readouterr().out, encoding="utf-8")
    return [str(made.get(word, word)) for word in arguments]


def check_helm(arguments: list[str]) -> None:
    verb, *rest = arguments
    if verb not in ("install", "upgrade") or "helm/dibit" not in rest:
        assert verb in (
            "history",
            "install",
            "lint",
            "repo",
            "rollback",
            "status",
            "template",
            "test",
            "uninstall",
            "upgrade",
        )
        return
    flags = [word for word in rest if word not in ("--reuse-values", "--reset-then-reuse-values")]
    done = subprocess.run([HELM, "template", *flags], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def check_python(arguments: list[str], folder: Path) -> None:
    """The module or script is there, and knows the flags."""
    if arguments[0] == "-m":
        name = arguments[1]
        if name in ("venv", "pip", "pytest"):
            return
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"there is no module {name}"
        place = (
            Path(spec.origin)
            if spec.origin
            else Path(next(iter(spec.submodule_search_locations or []))) / "__main__.py"
        )
        assert place.is_file()
        arguments = arguments[1:]
    else:
        place = next(base / arguments[0] for base in (ROOT, folder) if (base / arguments[0]).is_file())
    sources = place.parent.rglob("*.py") if place.name in ("__init__.py", "__main__.py") else [place]
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    for word in arguments[1:]:
        if word.startswith("--"):
            flag = word.partition("=")[0]
            made = flag.removeprefix("--").replace("-", "_")
            assert f'"{flag}"' in text or re.search(rf"\b{made}\b", text), f"{place} knows no {flag}"


def test_troubleshooting_quotes_what_the_program_says() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    said = "".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))
        for room in ("deployments", "engine", "kernels")
        for path in (ROOT / room).rglob("*.py")
    )
    quotes = re.findall(r"^\| (?:\d+ )?`([^`]+)` \|", text, re.MULTILINE)
    assert len(quotes) > 15
    missing = [quote for quote in quotes if quote not in said]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"^(https?:|#|mailto:)", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_yaml_blocks_say_what_the_program_reads(page: Path) -> None:
    for block in re.findall(r"^```ya?ml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for content in yaml.safe_load_all(block):
            if "apiVersion" in content:
                kubernetes_validate.validate(content, "1.34", strict=True)
            elif CHART_ONLY & set(content):
                chart = [HELM, "template", "docs", ROOT / "helm" / "dibit", "--values", "-"]
                done = subprocess.run(chart, input=yaml.safe_dump(content), capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr
            elif "applications" not in content:
                AppConfig.model_validate({"model": "some/model", **content.get("args", content)})
