"""Record the golden results again, after a change that is meant to change them.

`python tests/record_golden.py [model ...]`. With `GOLDEN=folder` they are written elsewhere, and with
the same `pytest tests/test_golden.py` compares with those: bit for bit on a machine of another kind.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch


def main(names: list[str]) -> None:
    """Record some models, or all."""
    with tempfile.TemporaryDirectory() as place:
        os.environ |= {
            "XDG_STATE_HOME": f"{place}/state",
            "WORKBENCH_CACHE": f"{place}/cache",
            "TQDM_DISABLE": "1",
        }
        from golden_points import FOLDER, Recorder, machine
        from golden_recipes import MODELS, recipes_of

        torch.set_num_threads(1)
        FOLDER.mkdir(parents=True, exist_ok=True)
        for name in names or MODELS:
            start = time.perf_counter()
            recorder = Recorder(name, Path(place))
            points = {recipe: recorder.record(recipe) for recipe in recipes_of(name)}
            lines = ",\n".join(
                f"{json.dumps(recipe)}: {json.dumps(point)}" for recipe, point in points.items()
            )
            text = f'{{"machine": {json.dumps(machine())},\n"points": {{\n{lines}\n}}}}\n'
            (FOLDER / f"{name}.json").write_text(text)
            print(
                f"{name}: {len(points)} recipes in {time.perf_counter() - start:.1f} s, {len(text) >> 10} kB"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
