"""What nobody uses any more is freed, a model's memory above all: in fresh processes, where every library is
imported for the first time."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

BENCH = """
    def measured(sort):
        bench = wb.Bench(tiny_task(sort, evaluation=40), ledger=folder + f"/{sort}.journal", progress=False)
        for step in (
            wb.Prune(sparsity=0.5, criterion="wanda"),
            wb.Quantize(weight_bits=3, rounding="gptq"),
            wb.LowRank(rank_ratio=0.5),
        ):
            bench.measure(wb.Recipe(step))
        wb.sweep(bench, trials=2)
        bench.ledger.pareto()
        parts = bench, bench.task.model, bench.statistics, bench.setting.evaluator
        return [weakref.ref(part) for part in parts]

    parts = [part for sort in ("vit", "llama") for part in measured(sort)]
"""
SESSION = """
    from widgets.session.model_choice import ModelChoice
    from widgets.session.session import Session

    def loaded():
        session = Session(ledger=folder + "/points.journal", progress=False)
        parts = []
        for sort in ("vit", "llama", "resnet"):
            session.loader.load_now(ModelChoice(tiny_task(sort, evaluation=40)))
            session.run(wb.Recipe(wb.Prune(sparsity=0.5)))
            parts.append([weakref.ref(session.bench), weakref.ref(session.bench.task.model)])
        return session, parts

    session, parts = loaded()
    parts = parts[0] + parts[1]  # of the models before the last
    assert session.bench.task.model_name == "tiny-resnet"
"""


CANCELLED = """
    import time
    from widgets.session.model_choice import ModelChoice
    from widgets.session.session import Session

    def seen():
        point = session.state.point
        read = point is not None and not point.complete and point.items == point.items_total
        if read and len(point.recipe):
            session.cancel()  # what is measured after all items is not wanted: as a hand that moves on does

    def settled():
        while session.measurer.busy or session.measurer.running is not None:
            time.sleep(0.01)

    session = Session(ledger=folder + "/points.journal", progress=False)
    session.on_state.subscribe(seen)
    made, keep = [], session.keep
    session.keep = lambda compressed: (made.append(weakref.ref(compressed.model)), keep(compressed))
    session.loader.load_now(ModelChoice(tiny_task("llama", evaluation=40)))
    settled()
    gc.collect()
    gc.disable()  # it comes for many objects, not for large ones
    made.clear()
    for index in range(4):
        session.start(wb.Recipe(wb.Prune(sparsity=0.3 + 0.1 * index)))
        settled()
    assert (len(made), len(session.bench.ledger.pareto())) == (4, 1)  # no cancelled one was finished
    freed = [model() is None for model in made[:-1]]  # the last may be asked about
    parts = [lambda gone=gone: None if gone else "still there" for gone in freed]
"""


def freed_by(code, folder):
    """Return which parts are freed, as a fresh process prints them."""
    code = (
        f"import gc, sys, weakref\nfolder = {str(folder)!r}\nfrom tiny_tasks import tiny_task\nimport"
        " workbench as wb\n" + textwrap.dedent(code)
    )
    code += (
        "\ngc.collect()\nprint([part() is None for part in parts])\nif 'session' in globals():\n   "
        " session.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("code", [BENCH, SESSION, CANCELLED], ids=["bench", "session", "cancelled moves"])
def test_a_bench_and_its_models_are_freed(code, tmp_path):
    freed = freed_by(code, tmp_path)
    assert "True" in freed
    assert "False" not in freed, freed
