"""Kernels compile for GPUs that are not here: Triton brings its own compiler, which needs no GPU."""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

TABLE, ARCHITECTURES = "*i64", (80, 90)  # A100, H100
TYPES = [torch.bfloat16, torch.float16, torch.float32]


def compiled(kernel, arguments, constants, architecture, *, aligned=(), warps=8, **options):
    """Return the code of a kernel.

    `aligned` arguments are multiples of 16, as most sizes and all addresses are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else arguments[name] for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps, **options}
    ).asm["ptx"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pruning_by_magnitude_reads_and_writes_many_weights_an_instruction(architecture):
    from workbench.kernels import triton_weights as kernels

    numbers = {
        "threshold_ptr": "*i32",
        "stay_ptr": "*i32",
        "upto_ptr": "*i32",
        "ties_ptr": "*i32",
        "mask_ptr": "*u8",
        "size": "i32",
        "weights_ptr": TABLE,
        "out_ptr": TABLE,
    }
    for kernel in (kernels.count_ties, kernels.prune):
        code = compiled(
            kernel,
            numbers,
            {"BLOCK": 4096},
            architecture,
            aligned=["size"] + ["mask_ptr"] * (kernel is kernels.prune),
        )
        assert "ld.global.v4" in code
        assert kernel is kernels.count_ties or "st.global.v4" in code


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("block", [64, 16384])
def test_kernels_over_rows_compile(block, dtype, architecture):
    from workbench.kernels import triton_weights as kernels
    from workbench.kernels.weight_passes import tile, warps

    together, places = tile(block)
    constants = {"TYPE": kernels.named(dtype), "ROWS": together, "BLOCK": places}
    numbers = {
        "low_ptr": "*fp32",
        "high_ptr": "*fp32",
        "scale_ptr": "*fp32",
        "zero_ptr": "*u8",
        "best_ptr": "*i64",
    }
    numbers |= {"weights_ptr": TABLE, "out_ptr": TABLE} | dict.fromkeys(
        ("groups", "size", "candidates", "step", "most"), "i32"
    )
    for kernel, own in {kernels.extremes: {}, kernels.search: {"HAS_ZERO": True}}.items():
        code = compiled(kernel, numbers, constants | own, architecture, aligned=["size"], warps=warps(places))
        assert "ld.global.v4" in code
        assert ".local" not in code  # nothing falls out of the registers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("columns", [64, 2048, 16384])
def test_pruning_rows_reads_and_writes_many_weights_an_instruction_and_passes_none_around(
    columns, dtype, architecture
):
    from workbench.kernels import triton_weights as kernels
    from workbench.kernels.weight_passes import searched

    together, places, shared, registers = searched(columns, dtype.itemsize)
    constants = {"TYPE": kernels.named(dtype), "ROWS": together, "BLOCK": places}
    numbers = {
        "norm_ptr": "*fp32",
        "guess_ptr": "*fp32",
        "gone_ptr": "*i32",
        "rows": "i32",
        "columns": "i32",
    } | dict.fromkeys(("weights_ptr", "out_ptr", "mask_ptr"), TABLE)
    code = compiled(
        kernels.prune_rows,
        numbers,
        constants,
        architecture,
        aligned=["columns", "norm_ptr"],
        warps=shared,
        maxnreg=registers,
    )
    assert "ld.global.v4" in code
    assert "st.global.v4" in code
    assert ".local" not in code
    assert (
        code.count("bar.sync") <= 10
    )  # of sums and the numbering of ties; a change of layout takes several more


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["*bf16", "*fp16", "*fp32"])
def test_the_kernel_of_losses_compiles(name, architecture):
    from workbench.kernels import triton_losses as kernels

    numbers = {
        "logits_ptr": name,
        "label_ptr": "*i64",
        "loss_ptr": "*fp32",
        "answer_ptr": "*i64",
        "classes": "i32",
        "row_stride": "i32",
    }
    assert "ld.global.v4" in compiled(
        kernels.losses,
        numbers,
        {"BLOCK": 4096},
        architecture,
        aligned=["logits_ptr", "classes", "row_stride"],
        warps=4,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["*bf16", "*fp16", "*fp32"])
def test_kernels_of_blocks_compile(name, architecture):
    from workbench.kernels import triton_blocks as kernels

    numbers = (
        dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr", "gate_ptr", "up_ptr"), name)
        | dict.fromkeys(("rows", "width", "size"), "i32")
        | {"eps": "fp32"}
    )
    counts = {
        "rows",
        "q_blocks",
        "items",
        "tokens",
        "q_heads",
        "k_heads",
    }  # whatever they are, the same code serves
    numbers |= {
        argument: name if argument.endswith("_ptr") else "i32" for argument in kernels.rotary.arg_names
    }
    for kernel, constants in {
        kernels.rms_norm: {"ROWS": 1, "BLOCK": 4096},
        kernels.gated: {"BLOCK": 2048},
        kernels.rotary: {"HALF": 64, "ROWS": 16, "BLOCK": 64},
    }.items():
        aligned = [
            argument
            for argument in kernel.arg_names
            if argument in numbers and argument not in counts | {"eps", *constants}
        ]
        code = compiled(
            kernel,
            numbers,
            constants,
            architecture,
            aligned=aligned,
            warps=4 if kernel is kernels.rotary else 8,
        )
        assert "ld.global.v4" in code
        assert "st.global.v" in code
        assert ".local" not in code


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("gridded", [False, True])
def test_kernels_over_weights_compile(gridded, dtype, architecture):
    from workbench.kernels import triton_weights as kernels

    numbers = dict.fromkeys(("weights_ptr", "out_ptr", "dense_ptr", "now_ptr", "mask_ptr"), TABLE) | {
        "found_ptr": "*fp32",
        "size": "i32",
        "groups": "i32",
        "most": "i32",
    }
    name = kernels.named(dtype)
    survey = {
        "TYPE": name,
        "SCALE": kernels.named(torch.float16),
        "HAS_GRID": gridded,
        "GROUP": 64,
        "HAS_MASK": not gridded,
        "HAS_ZERO": True,
        "BLOCK": 4096,
    }
    assert "ld.global.v4" in compiled(
        kernels.survey,
        numbers | {"codes_ptr": TABLE, "scale_ptr": TABLE, "zero_ptr": TABLE},
        survey,
        architecture,
        aligned=["size"],
    )
    if gridded:
        grid = {"TYPE": name, "GROUP": 64, "HAS_ZERO": True, "BLOCK": 4096}
        code = compiled(
            kernels.to_grid,
            numbers | {"codes_ptr": "*u8", "scale_ptr": "*fp32", "zero_ptr": "*u8"},
            grid,
            architecture,
            aligned=["size", "codes_ptr"],
        )
        assert "st.global.v4" in code


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rounds", [True, False])
def test_the_column_loop_compiles_and_stays_in_registers(rounds, architecture):
    from workbench.kernels import triton_columns as kernels
    from workbench.kernels.column_solver import BLOCK, ROWS

    floats = dict.fromkeys(("weights_ptr", "upper_ptr", "scale_ptr", "out_ptr", "errors_ptr"), "*fp32")
    numbers = (
        floats
        | {"zero_ptr": "*u8", "kept_ptr": "*u8"}
        | dict.fromkeys(
            ("rows", "inputs", "part", "width", "scale_layer", "scale_row", "scale_column", "most"), "i32"
        )
    )
    constants = {"ROUND": rounds, "HAS_ZERO": rounds, "HAS_MASK": True, "ROWS": ROWS, "BLOCK": BLOCK}
    code = compiled(
        kernels.work_through,
        numbers,
        constants,
        architecture,
        aligned=["inputs", "width", "weights_ptr", "upper_ptr", "out_ptr", "errors_ptr"],
        warps=8,
    )
    assert "ld.global.v4" in code
    assert ".local" not in code
