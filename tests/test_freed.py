"""What nobody uses any more is freed, a model's memory above all: in fresh processes, where every library is imported for the first time."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

BENCH = """
    def measured(sort):
        bench = wb.Bench(tiny_task(sort, evaluation=40), ledger=folder + f"/{sort}.journal", progress=False)
        for recipe in (wb.Recipe(wb.Prune(sparsity=0.5, criterion="wanda")), wb.Recipe(wb.Quantize(weight_bits=3, rounding="gptq")), wb.Recipe(wb.LowRank(rank_ratio=0.5))):
            bench.measure(recipe)
        wb.sweep(bench, trials=2)
        bench.ledger.pareto()
        return [weakref.ref(part) for part in (bench, bench.task.model, bench.statistics, bench.evaluator)]

    parts = [part for sort in ("vit", "llama") for part in measured(sort)]
"""
SESSION = """
    from widgets.choice import Choice
    from widgets.session import Session

    def loaded():
        session = Session(on_live=lambda: None, on_history=lambda: None, on_loaded=lambda: None, on_error=print, on_not_loaded=print, ledger=folder + "/points.journal", progress=False)
        parts = []
        for sort in ("vit", "llama", "resnet"):
            session.load_now(Choice(tiny_task(sort, evaluation=40)))
            session.run(wb.Recipe(wb.Prune(sparsity=0.5)))
            parts.append([weakref.ref(session.bench), weakref.ref(session.bench.task.model)])
        return session, parts

    session, parts = loaded()
    parts = parts[0] + parts[1]  # of the models before the last
    assert session.bench.task.model_name == "tiny-resnet"
"""


@pytest.mark.parametrize("made", [BENCH, SESSION], ids=["bench", "session"])
def test_a_bench_and_its_model_are_freed(made, tmp_path):
    code = f"import gc, sys, weakref\nfolder = {str(tmp_path)!r}\nfrom tiny_tasks import tiny_task\nimport workbench as wb\n" + textwrap.dedent(made)
    code += "\ngc.collect()\nprint([part() is None for part in parts])\nif 'session' in globals():\n    session.close()\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    freed = done.stdout.strip().splitlines()[-1]
    assert "True" in freed
    assert "False" not in freed, freed
