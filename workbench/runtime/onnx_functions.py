"""What the nodes for products of integers stand for, as ONNX functions that ONNX Runtime inlines when it
loads a model.

One node a layer keeps the export quick; here is what it does, in ONNX's own text. Inputs are rounded to bytes
as the simulated layer does, multiplied by the codes, scaled, and the bias is added.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

DOMAIN, CONTRIB = "workbench", "com.microsoft"
MIDDLE = 128  # the byte that stands for code 0


@dataclass(frozen=True)
class Axis:
    """A convolution's window along one axis; `size` is that of the input."""

    kernel: int
    stride: int
    padding: int
    dilation: int
    size: int

    @property
    def out(self) -> int:
        """Return the number of positions."""
        return (self.size + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    def slices(self, source: str, result: str, axis: int) -> list[str]:
        """Return the lines that gather the window's positions along an axis of [N, height, width, channels]
        into the channels.
        """
        if (self.kernel, self.stride) == (1, 1):
            return [f"{result} = Identity ({source})"]
        lines = [
            f"{result}_axis = Constant <value = int64[1] {{{axis}}}> ()",
            f"{result}_step = Constant <value = int64[1] {{{self.stride}}}> ()",
        ]
        for index in range(self.kernel):
            start = index * self.dilation
            lines += [
                f"{result}_start{index} = Constant <value = int64[1] {{{start}}}> ()",
                (
                    f"{result}_end{index} = Constant <value = int64[1]"
                    f" {{{start + (self.out - 1) * self.stride + 1}}}> ()"
                ),
                (
                    f"{result}_{index} = Slice ({source}, {result}_start{index}, {result}_end{index},"
                    f" {result}_axis, {result}_step)"
                ),
            ]
        slices = ", ".join(f"{result}_{index}" for index in range(self.kernel))
        return [*lines, f"{result} = Concat <axis = 3> ({slices})"]


@dataclass(frozen=True)
class Variant:
    """One sort of integer product: of a "Linear" or a "Conv", and how its inputs are rounded.

    `per_row`: each row or image has its own scale.
    """

    kind: str
    static: bool
    per_row: bool
    symmetric: bool
    bits: int
    axes: tuple[Axis, ...] = ()  # of a Conv: rows, columns

    @property
    def name(self) -> str:
        """Return the operator's name."""
        window = "".join(
            f"_{axis.kernel}_{axis.stride}_{axis.padding}_{axis.dilation}_{axis.size}" for axis in self.axes
        )
        scales = "Static" if self.static else "PerRow" if self.per_row else "PerTensor"
        return f"{self.kind}{scales}{'Symmetric' if self.symmetric else 'Asymmetric'}{self.bits}{window}"

    @staticmethod
    def named(name: str) -> Variant:
        """Return the variant of an operator's name."""
        match = re.fullmatch(
            r"(Linear|Conv)(Static|PerRow|PerTensor)(Symmetric|Asymmetric)(\d)((?:_\d+)*)", name
        )
        if match is None:
            raise ValueError(f"{name!r} is no operator of the workbench")
        numbers = [int(part) for part in match[5].split("_")[1:]]
        axes = tuple(Axis(*numbers[start : start + 5]) for start in range(0, len(numbers), 5))
        return Variant(
            match[1],
            static=match[2] == "Static",
            per_row=match[2] == "PerRow",
            symmetric=match[3] == "Symmetric",
            bits=int(match[4]),
            axes=axes,
        )

    @property
    def codes(self) -> tuple[int, int]:
        """Return the least and the largest code."""
        most = (1 << (self.bits - 1)) - 1
        return (-most if self.symmetric else -most - 1), most

    @property
    def corrected(self) -> bool:
        """Return whether zero points differ from row to row, which the product does not know of."""
        return self.per_row and not self.symmetric

    def inputs(self) -> list[str]:
        """Return the names of the node's inputs."""
        own = ["input_scale", "input_zero"] if self.static else []
        return ["x", "w", "w_zero", "w_scale", "bias", *own, *(["sums"] if self.corrected else [])]

    def text(self) -> str:
        """Return the function in ONNX's text form."""
        lines = [
            *constants(self),
            *rounding(self),
            *(patches(self) if self.kind == "Conv" else ["matrix = Identity (codes)"]),
            *product(self),
            *shaped(self),
        ]
        body = "\n".join(f"  {line}" for line in lines)
        return (
            f'<opset_import: ["" : 18, "{CONTRIB}" : 1], domain: "{DOMAIN}">\n{self.name}'
            f" ({', '.join(self.inputs())}) => (y)\n{{\n{body}\n}}"
        )


def constants(variant: Variant) -> list[str]:
    """Return numbers that the rest uses."""
    least, most = variant.codes
    return [
        f"middle = Constant <value = uint8 {{{MIDDLE}}}> ()",
        f"least = Constant <value = uint8 {{{MIDDLE + least}}}> ()",
        f"most = Constant <value = uint8 {{{MIDDLE + most}}}> ()",
        "one = Constant <value = float {1.0}> ()",
        "nought = Constant <value = float {0.0}> ()",
        "last = Constant <value = int64[1] {-1}> ()",
        "second = Constant <value = int64[1] {1}> ()",
        (
            "others = Constant <value = int64[3] {1, 2, 3}> ()"
            if variant.kind == "Conv"
            else "others = Identity (last)"
        ),
    ]


def rounding(variant: Variant) -> list[str]:
    """Return the lines that make `codes`, `scale` and `zero` of `x`."""
    rows = ["rows = Identity (x)" if variant.kind == "Conv" else "rows = Flatten <axis = -1> (x)"]
    least, most = variant.codes
    if variant.static:
        return [
            *rows,
            "scale = Identity (input_scale)",
            "zero = Identity (input_zero)",
            "raw = QuantizeLinear (rows, scale, zero)",
            "codes = Clip (raw, least, most)",
        ]
    if not variant.per_row and not variant.symmetric and variant.bits == 8:
        return [*rows, "codes, scale, zero = DynamicQuantizeLinear (rows)"]
    over = ", others" if variant.per_row else ""
    axis = "<axis = 0> " if variant.per_row else ""
    if variant.symmetric:
        lines = [
            "size = Abs (rows)",
            f"high = ReduceMax <keepdims = 0> (size{over})",
            f"steps = Constant <value = float {{{float(most)}}}> ()",
            "wanted = Div (high, steps)",
            *guarded(),
            *(
                ["long = Shape (scale)", "zero = Expand (middle, long)"]
                if variant.per_row
                else ["zero = Identity (middle)"]
            ),
        ]
    else:
        lines = [
            f"bottom = ReduceMin <keepdims = 0> (rows{over})",
            f"top = ReduceMax <keepdims = 0> (rows{over})",
            "low = Min (bottom, nought)",
            "high = Max (top, nought)",
            "width = Sub (high, low)",
            f"steps = Constant <value = float {{{float(most - least)}}}> ()",
            "wanted = Div (width, steps)",
            *guarded(),
            "below = Div (low, scale)",
            f"start = Constant <value = float {{{float(least)}}}> ()",
            "exact = Sub (start, below)",
            "whole = Round (exact)",
            f"shift = Constant <value = float {{{float(MIDDLE)}}}> ()",
            "moved = Add (whole, shift)",
            f"floor = Constant <value = float {{{float(MIDDLE + least)}}}> ()",
            f"ceiling = Constant <value = float {{{float(MIDDLE + most)}}}> ()",
            "kept = Clip (moved, floor, ceiling)",
            "zero = Cast <to = 2> (kept)",
        ]
    end = (
        ["raw = QuantizeLinear (rows, scale, zero)", "codes = Clip (raw, least, most)"]
        if variant.bits < 8
        else ["codes = QuantizeLinear (rows, scale, zero)"]
    )
    return [*rows, *lines, *(line.replace("QuantizeLinear ", f"QuantizeLinear {axis}") for line in end)]


def guarded() -> list[str]:
    """Return the lines that make `scale` of `wanted`: 1 where nothing but zeros was read."""
    return ["some = Greater (wanted, nought)", "scale = Where (some, wanted, one)"]


def patches(variant: Variant) -> list[str]:
    """Return the lines that make `matrix` [positions, kernel * channels] of codes [N, channels, height,
    width].
    """
    rows, columns = variant.axes
    border = [0, rows.padding, columns.padding, 0] * 2
    value = "middle" if variant.symmetric else "zero"
    lines = [
        "pixels_last = Transpose <perm = [0, 2, 3, 1]> (codes)",
        f"border = Constant <value = int64[8] {{{', '.join(map(str, border))}}}> ()",
        (
            f"padded = Pad (pixels_last, border, {value})"
            if any(border) and not variant.corrected
            else "padded = Identity (pixels_last)"
        ),
        *columns.slices("padded", "across", 2),
        *rows.slices("across", "patch", 1),
        "count = Shape <start = 0, end = 1> (x)",
        "width_at = Shape <start = 3, end = 4> (patch)",
        "matrix_shape = Concat <axis = 0> (last, width_at)",
        "matrix = Reshape (patch, matrix_shape)",
    ]
    if variant.per_row:  # all positions of an image share its scale
        lines += ["long_patch = Shape <start = 0, end = 1> (matrix)", *repeated("scale", "row_scale")]
        lines += repeated("zero", "row_zero") if variant.corrected else []
    return lines


def repeated(name: str, result: str) -> list[str]:
    """Return the lines that repeat each image's number for all its positions."""
    return [
        f"{name}_column = Unsqueeze ({name}, second)",
        "share = Div (long_patch, count)" if name == "scale" else "share_again = Identity (share)",
        f"{name}_shape = Concat <axis = 0> (count, share)",
        f"{name}_wide = Expand ({name}_column, {name}_shape)",
        f"{result} = Reshape ({name}_wide, last)",
    ]


def product(variant: Variant) -> list[str]:
    """Return the lines that make `made` [rows, outputs] of `matrix`."""
    multiply = f"{CONTRIB}.MatMulIntegerToFloat"
    if not variant.per_row:
        return [f"made = {multiply} (matrix, w, scale, w_scale, zero, w_zero, bias)"]
    scale, zero = ("row_scale", "row_zero") if variant.kind == "Conv" else ("scale", "zero")
    lines = [f"plain = {multiply} (matrix, w, one, w_scale, middle, w_zero)"]
    if variant.corrected:
        lines += [
            f"zero_float = Cast <to = 1> ({zero})",
            f"shift_again = Constant <value = float {{{float(MIDDLE)}}}> ()",
            "apart = Sub (zero_float, shift_again)",
            "apart_column = Unsqueeze (apart, second)",
            "excess = Mul (apart_column, sums)",
            "right = Sub (plain, excess)",
        ]
    return [
        *lines,
        f"row = Unsqueeze ({scale}, second)",
        f"scaled = Mul ({'right' if variant.corrected else 'plain'}, row)",
        "made = Add (scaled, bias)",
    ]


def shaped(variant: Variant) -> list[str]:
    """Return the lines that give `made` the shape of the layer's output."""
    if variant.kind == "Linear":
        return [
            "front = Shape <start = 0, end = -1> (x)",
            "whole_shape = Concat <axis = 0> (front, last)",
            "y = Reshape (made, whole_shape)",
        ]
    return [
        f"places = Constant <value = int64[2] {{{variant.axes[0].out}, {variant.axes[1].out}}}> ()",
        "whole_shape = Concat <axis = 0> (count, places, last)",
        "spread = Reshape (made, whole_shape)",
        "y = Transpose <perm = [0, 3, 1, 2]> (spread)",
    ]


def add_functions(proto: Any) -> None:
    """Put the functions into a model that its nodes name, in place."""
    names = sorted({node.op_type for node in proto.graph.node if node.domain == DOMAIN})
    if not names:
        return
    from onnx import helper, parser

    proto.functions.extend(parser.parse_function(Variant.named(name).text()) for name in names)
    domains = {entry.domain for entry in proto.opset_import}
    proto.opset_import.extend(
        helper.make_opsetid(domain, 1) for domain in (DOMAIN, CONTRIB) if domain not in domains
    )
