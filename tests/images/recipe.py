"""The Dockerfile, as its stages and what each of them takes from others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction.

    Attributes:
        kind: "RUN", "COPY", ...
        flags: what stands before its value, such as "--from=package".
        value: the rest.
    """

    kind: str
    flags: tuple[str, ...]
    value: str

    @property
    def stages(self) -> list[str]:
        """Stages that it takes files from."""
        return re.findall(r"\bfrom=([\w-]+)", " ".join(self.flags))

    @property
    def sources(self) -> list[str]:
        """What a COPY takes from the checkout; nothing if it takes from a stage."""
        return [] if self.kind != "COPY" or self.stages else self.value.split()[:-1]


@dataclass(slots=True)
class Stage:
    """A FROM and the instructions that follow it."""

    name: str
    base: str
    steps: list[Step] = field(default_factory=list)


def stages() -> dict[str, Stage]:
    """All stages by name, in their order."""
    found: dict[str, Stage] = {}
    stage = Stage("", "")  # what stands before the first FROM
    for item in DockerfileParser(path=str(ROOT)).structure:
        kind, value = item["instruction"], item["value"]
        if kind == "FROM":
            base, _, name = value.partition(" AS ")
            stage = found[name] = Stage(name, base)
        elif kind != "COMMENT":
            flags = []
            while match := re.match(r"(--\S+)\s+", value):
                flags.append(match[1])
                value = value[match.end() :]
            stage.steps.append(Step(kind, tuple(flags), value))
    return found


def lineage(name: str) -> list[Stage]:
    """The stages that a target is built from, itself the last, in the order of the file."""
    every, wanted = stages(), {name}
    for stage in reversed(every.values()):
        if stage.name in wanted:
            wanted.add(stage.base)
            wanted.update(source for step in stage.steps for source in step.stages)
    return [stage for stage in every.values() if stage.name in wanted]


def inherited(name: str, kind: str) -> Iterator[str]:
    """Values of a kind of instruction in a stage and those below it, the nearest first."""
    every = stages()
    while name in every:
        yield from (step.value for step in reversed(every[name].steps) if step.kind == kind)
        name = every[name].base
