"""What a line of a journal says, and whether it fits what the lines before it made: studies and trials."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, TypeGuard

from pydantic_core import from_json

LONGEST = 2**28  # bytes of a line that is read: a point with tens of thousands of layers has a tenth of it
AT_ONCE = 2**20  # bytes
(
    CREATE_STUDY,
    DELETE_STUDY,
    STUDY_USER_ATTR,
    STUDY_SYSTEM_ATTR,
    CREATE_TRIAL,
    TRIAL_PARAM,
    TRIAL_STATE,
    TRIAL_INTERMEDIATE,
    TRIAL_USER_ATTR,
    TRIAL_SYSTEM_ATTR,
    DISCARD_TRIALS,
) = range(11)  # Optuna's numbers of operations
OF_A_STUDY = {DELETE_STUDY, STUDY_USER_ATTR, STUDY_SYSTEM_ATTR, CREATE_TRIAL}
TABLES = ("distributions", "params", "user_attrs", "system_attrs", "intermediate_values")  # of a trial


class StudyLine(NamedTuple):
    """A study that a line made; `name` is None once it is deleted."""

    name: str | None
    objectives: int


class Made(NamedTuple):
    """What the lines before one made, in Optuna's own count."""

    studies: tuple[StudyLine, ...] = ()
    trials: int = 0

    def after(self, log: dict[str, Any]) -> Made:
        """Return the studies and trials there are once this line, which fits, is applied."""
        operation, studies = log["op_code"], self.studies
        if operation == CREATE_STUDY:
            if any(study.name == log["study_name"] for study in studies):
                return self
            return self._replace(studies=(*studies, StudyLine(log["study_name"], len(log["directions"]))))
        if operation == DELETE_STUDY:
            gone = log["study_id"]
            kept = (
                study_line._replace(name=None) if n == gone else study_line
                for n, study_line in enumerate(studies)
            )
            return self._replace(studies=tuple(kept))
        if operation == CREATE_TRIAL and studies[log["study_id"]].name is not None:
            return self._replace(trials=self.trials + 1)
        return self


def parsed(line: bytes) -> dict[str, Any] | None:
    """Return a line as Optuna reads it, None if it says nothing.

    Half of a surrogate pair, which other tools may write, only the slower parser takes.
    """
    try:
        log = from_json(line)
    except ValueError:
        try:
            log = json.loads(line)
        except (ValueError, RecursionError):
            return None
    return log if isinstance(log, dict) and is_whole(log.get("op_code")) else None


def misfit(log: dict[str, Any], made: Made) -> str:
    """Return why a line cannot be applied after those that made this, "" if nothing is seen.

    Optuna leaves some such lines out without a word, and takes others that nobody can read afterwards. What
    it refuses by itself need not be seen here.
    """
    operation = log["op_code"]
    if operation not in range(11) or not isinstance(log.get("worker_id"), str):
        return f"operation {str(operation)[:20]} of no worker, or unknown"
    if operation == CREATE_STUDY:
        return new_study(log)
    if operation in OF_A_STUDY:
        number = log.get("study_id")
        if not is_whole(number) or not 0 <= number < len(made.studies):
            return f"there is no study {str(number)[:20]}"
        return new_trial(log, made.studies[number]) if operation == CREATE_TRIAL else ""
    if operation != DISCARD_TRIALS:
        number = log.get("trial_id")
        if not is_whole(number) or not 0 <= number < made.trials:
            return f"there is no trial {str(number)[:20]}"
    return ""


def new_study(log: dict[str, Any]) -> str:
    """Return the fault of a line that makes a study, "" if none is seen."""
    directions = log.get("directions")
    if not isinstance(log.get("study_name"), str):
        return "its study has no name"
    if not isinstance(directions, list) or not directions or not all(d in (1, 2) for d in directions):
        return "its study has no directions"
    return ""


def new_trial(log: dict[str, Any], study: StudyLine) -> str:
    """Return the fault of a line that makes a trial, "" if none is seen."""
    for name in TABLES:
        if not isinstance(log.get(name, {}), dict):
            return f"its {name} are no table"
    values = log.get("values")
    if values is not None and not (
        isinstance(values, list) and len(values) == study.objectives and all(map(is_number, values))
    ):
        return f"its values are not {study.objectives} numbers"
    return ""


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value of JSON is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def lines_of(file: BinaryIO, is_last: Callable[[bytes], bool]) -> Iterator[tuple[bytes | None, int]]:
    """Yield each line that was written to its end, and how many bytes it takes.

    None stands for one too long to be read. The last line may lack its end if `is_last` of it is true.
    """
    while line := file.readline(LONGEST):
        length = len(line)
        if length == LONGEST and not line.endswith(b"\n"):
            while (more := file.readline(AT_ONCE)) and not more.endswith(b"\n"):
                length += len(more)
            if not more:
                return
            yield None, length + len(more)
        elif line.endswith(b"\n") or is_last(line):
            yield line, length
        else:
            return
